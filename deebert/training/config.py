"""What a training is asked to do: a `Recipe` of at most three stages.

A recipe that could not train every off-ramp, or whose parts contradict each other, cannot be built. Knows
nothing of models, data or devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from deebert.errors import RecipeError
from deebert.precision import TRAINING_PRECISIONS, Precision

Weighting = Literal["linear", "uniform", "equilibrium"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
OffRampMode = Literal["fast", "exact"]
OFF_RAMP_MODES: tuple[OffRampMode, ...] = get_args(OffRampMode)


def _require(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise RecipeError(f"{name} is {value}: give {remedy}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{name} is {value}: give a finite number")


def _among(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise RecipeError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Hyper-parameters of one stage: AdamW with linear decay, a fresh optimizer each stage."""

    epochs: float = 3.0
    batch_size: int = 8
    """Samples per optimizer step, over all processes and accumulated pieces."""
    learning_rate: float = 2e-5
    """At its peak."""
    weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    warmup_share: float = 0.0
    """Share of the steps in which the learning rate rises from 0 to its peak."""
    accumulation_steps: int = 1
    """Pieces that a batch is computed in: less memory, the same gradient."""
    exit_head_learning_rate: float = 5e-3
    """At its peak, where a learning-to-exit head trains: one layer that nothing else hangs on takes large steps."""

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "epochs", self.epochs, "more than 0")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        rate = self.exit_head_learning_rate
        _require(rate > 0, "exit_head_learning_rate", rate, "more than 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _require(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "more than 0")
        _require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "more than 0")
        _require(0 <= self.warmup_share < 1, "warmup_share", self.warmup_share, "a share from 0 to below 1")
        if self.accumulation_steps < 1 or self.batch_size % self.accumulation_steps:
            raise RecipeError(
                f"a batch of {self.batch_size} samples does not fall into {self.accumulation_steps} equal pieces: "
                "choose accumulation_steps that divides batch_size"
            )


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """(1 - weight) · cross-entropy + weight · T² · KL(target at T ‖ answer at T) (Hinton et al., 2015).

    Multi-label models take the mean over their labels' own; a regression the squared distances to the label and to
    the target, whatever the temperature.
    """

    weight: float = 0.5
    """Share of the loss, above 0 and at most 1."""
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _require(0 < self.weight <= 1, "the distillation weight", self.weight, "a share above 0 and up to 1")
        _require(self.temperature > 0, "the distillation temperature", self.temperature, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Teacher(Distillation):
    """A separately fine-tuned DeeBERT model whose answers the final classifier learns, beside the labels."""

    folder: str
    """Its model folder: same labels and tokenizer; for `hidden_weight` also the same depth and width."""
    hidden_weight: float = 0.0
    """Weight of the mean squared distance between both models' token states, over all layers."""
    allow_pickle: bool = False
    """Its weights may be a pickle, read by torch's safe reader."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.hidden_weight >= 0, "the teacher's hidden_weight", self.hidden_weight, "0 or more")


@dataclass(frozen=True, kw_only=True)
class BornAgain(Distillation):
    """The teacher is the model itself as it stands before the stage (Furlanello et al., 2018)."""


@dataclass(frozen=True, kw_only=True)
class FinalOnly:
    """The final classifier's loss alone: stage 1 of the paper. Off-ramps stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The sum of all off-ramps' losses and the final classifier's."""

    weighting: Weighting = "linear"
    """Of the off-ramp after layer i of n: ``linear`` i/n (on the embeddings 1/n), ``uniform`` 1, ``equilibrium`` 1
    with every layer's gradient averaged over the classifiers above it (Li et al., 2019). The final classifier's
    is 1."""
    self_distillation: Distillation | None = None
    """Off-ramps learn from the final classifier too, which does not feel it."""
    off_ramp_learning_rate: float | None = None
    """At its peak; None is the backbone's. New off-ramps can take larger steps than a pretrained backbone."""

    def __post_init__(self) -> None:
        _among(self.weighting, WEIGHTINGS, "weighting")
        rate = self.off_ramp_learning_rate
        _require(rate is None or rate > 0, "off_ramp_learning_rate", rate, "more than 0")


@dataclass(frozen=True, kw_only=True)
class Alternating(Joint):
    """The final loss alone on one step, `Joint` on the next (Xin et al., BERxiT, 2021)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting == "equilibrium":
            raise RecipeError(
                "gradient equilibrium averages over all classifiers and every other step of alternating training "
                "has one: choose linear or uniform weights"
            )


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Where a stage's weights end on the straight line from those before it, 0, to those that it trained, 1.

    WiSE-FT (Wortsman et al., 2022, eq. 1) with a share for each layer, which changes evenly from the first to the last.
    """

    first: float
    """Of the embeddings, the first layer and their off-ramps."""
    last: float
    """Of the last layer and the final classifier."""

    def __post_init__(self) -> None:
        for name, share in (("first", self.first), ("last", self.last)):
            _require(0 <= share <= 1, f"the interpolation's {name} share", share, "one from 0 to 1")
        _require(self.first > 0 or self.last > 0, "interpolation", 0, "a share above 0, or no such stage")

    def at(self, layer: float, num_layers: int) -> float:
        """The share of a layer, from 1 to `num_layers`."""
        return self.first + (self.last - self.first) * (layer - 1) / max(1, num_layers - 1)


@dataclass(frozen=True, kw_only=True)
class BackboneStage(StageConfig):
    """Stage 1 or 3: trains the backbone and the final classifier, and the off-ramps if the objective has them.

    The defaults are the paper's, for BERT (RoBERTa: 10 epochs).
    """

    objective: FinalOnly | Joint | Alternating = FinalOnly()
    teacher: Teacher | BornAgain | None = None
    interpolation: Interpolation | None = None
    """None keeps the whole change. Says something only of a model that was of use before."""


@dataclass(frozen=True, kw_only=True)
class OffRampStage(StageConfig):
    """Stage 2: trains the off-ramps; the backbone and the final classifier stay bit for bit.

    ``fast`` trains on cached states, seen once and without dropout in the frozen backbone; ``exact`` on the
    living backbone with its dropout, as in the paper. The defaults are for ``fast``: no backbone hangs on
    the off-ramps, so that a larger step than the paper's 2e-5 is safe.
    """

    batch_size: int = 32
    learning_rate: float = 5e-4
    mode: OffRampMode = "fast"
    self_distillation: Distillation | None = None
    """Off-ramps learn from the frozen final classifier too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _among(self.mode, OFF_RAMP_MODES, "mode")
        if self.mode == "fast" and self.accumulation_steps > 1:
            raise RecipeError(
                "a fast stage 2 needs no accumulation_steps, its batches hold one vector per off-ramp and sample: "
                "leave it at 1"
            )


PAPER_STAGE_2 = OffRampStage(mode="exact", batch_size=8, learning_rate=2e-5)
"""The paper's own, for BERT."""
PAPER_EPOCHS: Mapping[str | None, float] = MappingProxyType({"roberta": 10.0})
"""Of stages that run the backbone, by its `model_type`, where the paper's are not those of BERT, the defaults here."""


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stop a stage, and keep its best weights, when the loss on held-out rows no longer falls."""

    held_out: float = 0.1
    """Share of the training rows that no stage trains on."""
    patience: int = 3
    """Evaluations in a row without a better loss."""
    every_steps: int = 500
    """Steps of stage 1, and of an exact stage 2, between evaluations; a fast stage 2 is evaluated each epoch and
    at its end."""

    def __post_init__(self) -> None:
        _require(0 < self.held_out < 1, "held_out", self.held_out, "a share between 0 and 1")
        _require(self.patience >= 1, "patience", self.patience, "at least 1")
        _require(self.every_steps >= 1, "every_steps", self.every_steps, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training."""

    stage_1: BackboneStage | None = BackboneStage()
    """None keeps the backbone and the final classifier as they come."""
    stage_2: OffRampStage | None = OffRampStage()
    """After a joint stage 1 it retrains the off-ramps on what has stopped moving."""
    stage_3: BackboneStage | None = None
    """Goes on with all of a finished model together: with off-ramps that already answer, and its own full depth as
    the teacher, it teaches the shallow layers what the deep ones know without costing these."""
    early_stopping: EarlyStopping | None = None
    seed: int = 42
    precision: Precision = "float32"
    """What products are computed in; weights and optimizers are float32."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints of a stage that runs the backbone."""
    micro_batch_tokens: int = 4096
    """Tokens per packed micro-batch where frozen models answer."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError("a recipe without a stage trains nothing: give it at least one")
        if self.stage_3 is not None and not isinstance(self.stage_3.objective, Joint):
            raise RecipeError(
                "a stage 3 of the final loss alone would leave the off-ramps behind: give it a joint objective"
            )
        if self.stage_1 is not None and isinstance(self.stage_1.teacher, BornAgain):
            raise RecipeError(
                "before stage 1 there is nothing to be born again from: give it another teacher"
            )
        if (
            self.stage_1 is not None
            and isinstance(self.stage_1.objective, FinalOnly)
            and self.stage_2 is None
            and self.stage_3 is None
        ):
            raise RecipeError(
                "a stage 1 of the final loss alone leaves the off-ramps untrained: add stage 2, or train jointly"
            )
        begins_off_ramps = self.stage_1 is not None and isinstance(self.stage_1.objective, FinalOnly)
        if self.stage_2 is None and begins_off_ramps and self.stage_3 and self.stage_3.interpolation:
            raise RecipeError(
                "a stage 3 whose change is kept in part needs off-ramps that answer before it: add stage 2, or keep "
                "the whole change"
            )
        _among(self.precision, TRAINING_PRECISIONS, "precision")
        _require(self.checkpoint_steps >= 1, "checkpoint_steps", self.checkpoint_steps, "at least 1")
        _require(self.micro_batch_tokens >= 1, "micro_batch_tokens", self.micro_batch_tokens, "at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON form: equal for equal recipes, and different for different ones."""
        values = asdict(self)
        for name in ("stage_1", "stage_3"):
            if (stage := getattr(self, name)) is not None:
                values[name]["objective"]["type"] = type(stage.objective).__name__
                if stage.interpolation is None:
                    del values[name]["interpolation"]
                if isinstance(stage.teacher, Teacher):
                    del values[name]["teacher"]["allow_pickle"]  # trains nothing else
        # What was not there in earlier versions is left out, so that trainings begun then can be resumed.
        if self.stage_3 is None:
            del values["stage_3"]
        return values

    @property
    def stages(self) -> Mapping[int, BackboneStage | OffRampStage]:
        """Those that there are, by number."""
        all_of_them = {1: self.stage_1, 2: self.stage_2, 3: self.stage_3}
        return {number: stage for number, stage in all_of_them.items() if stage is not None}


TWO_STAGE = Recipe()
"""The paper's, with stage 2 on cached states."""
JOINT = Recipe(stage_1=BackboneStage(objective=Joint()), stage_2=None)
ALTERNATING = Recipe(stage_1=BackboneStage(objective=Alternating()), stage_2=None)
OFF_RAMPS = Recipe(stage_1=None)
"""Stage 2 alone, on a model that was fine-tuned elsewhere."""
BEST = replace(
    TWO_STAGE,
    stage_2=PAPER_STAGE_2,
    stage_3=BackboneStage(
        objective=Joint(
            weighting="uniform", self_distillation=Distillation(weight=0.5), off_ramp_learning_rate=5e-4
        ),
        teacher=BornAgain(weight=0.5),
    ),
)
"""The winner here, of off-ramps on attention pooling: two stages, the second exact so that it learns what to read, then
all together, taught by what the two made. See DECISIONS.md."""

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "two-stage": TWO_STAGE,
        "joint": JOINT,
        "alternating": ALTERNATING,
        "off-ramps": OFF_RAMPS,
        "best": BEST,
    }
)
