"""A toy problem that a tiny model learns in seconds, and quick recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from deebert.encoder import PackedEncoder
from deebert.evaluation import LabelledSequences, off_ramp_scores, trace
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.training import (
    Alternating,
    BackboneStage,
    BornAgain,
    Distillation,
    Joint,
    OffRampStage,
    Recipe,
    TrainingReport,
)
from deebert.training import trainer as trainer_module

MARKED = (90, 91, 92)
"""Token ids, one for each label: a text belongs to the label whose token it holds."""
QUICK_1 = BackboneStage(epochs=4, batch_size=16, learning_rate=2e-3)
QUICK_2 = OffRampStage(epochs=6, batch_size=16, learning_rate=5e-3)
DISTILLED = Distillation(weight=0.5, temperature=2.0)
TWO_STAGE = Recipe(stage_1=QUICK_1, stage_2=QUICK_2, micro_batch_tokens=512)
JOINT = replace(TWO_STAGE, stage_1=replace(QUICK_1, objective=Joint()), stage_2=None)
JOINT_DISTILLED = replace(
    TWO_STAGE, stage_1=replace(QUICK_1, objective=Joint(self_distillation=DISTILLED)), stage_2=None
)
OFF_RAMPS = replace(TWO_STAGE, stage_1=None)
EXACT = replace(OFF_RAMPS, stage_2=replace(QUICK_2, mode="exact"))
RECIPES = {
    "two-stage": TWO_STAGE,
    "two-stage, distilled": replace(TWO_STAGE, stage_2=replace(QUICK_2, self_distillation=DISTILLED)),
    "two-stage, exact": replace(
        TWO_STAGE, stage_2=replace(QUICK_2, mode="exact", self_distillation=DISTILLED)
    ),
    "joint": JOINT,
    "joint, distilled": JOINT_DISTILLED,
    "joint, equilibrium": replace(
        TWO_STAGE, stage_1=replace(QUICK_1, objective=Joint(weighting="equilibrium"))
    ),
    "alternating": replace(
        TWO_STAGE, stage_1=replace(QUICK_1, objective=Alternating(self_distillation=DISTILLED)), stage_2=None
    ),
    "joint, refreshed": replace(JOINT_DISTILLED, stage_2=QUICK_2),
}
THREE_STAGES = replace(
    TWO_STAGE, stage_3=replace(QUICK_1, objective=Joint(weighting="uniform"), teacher=BornAgain())
)

Run = Callable[..., TrainingReport]


def toy(num_rows: int, seed: int) -> LabelledSequences:
    """Random texts of 4 to 12 tokens, half of them the marked token that gives the label away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    texts, labels = [], []
    for _ in range(num_rows):
        (label,), (length,) = draw(0, 3), draw(2, 11)
        words = draw(5, 80, length)
        words = [
            MARKED[label] if place == 0 or marked else w
            for place, (w, marked) in enumerate(zip(words, draw(0, 2, length), strict=True))
        ]
        texts.append([2, *words, 3])
        labels.append(label)
    return LabelledSequences(tokens=PackedTokens.pack(texts), labels=torch.tensor(labels))


def weights(model: DeeBertForSequenceClassification) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: DeeBertForSequenceClassification) -> set[str]:
    """Names of the weights that are not bit for bit what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def accuracies(model: DeeBertForSequenceClassification, data: LabelledSequences) -> tuple[float, ...]:
    return off_ramp_scores(trace(PackedEncoder.of(model), data.tokens), data.labels)


def padded(tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    rows = [tokens.sequence(i).input_ids.long() for i in range(len(tokens))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return ids, mask


def without_dropout(model: DeeBertForSequenceClassification) -> DeeBertForSequenceClassification:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


class PowerCutError(Exception):
    """In place of a kill, where the process has to live on."""


class CutAt(TrainerCallback):
    """Ends a training after so many steps of a stage."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise PowerCutError


def add_to_every_trainer(patch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    original = trainer_module._StageTrainer.__init__

    def init(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs)
        self.add_callback(callback)

    patch.setattr(trainer_module._StageTrainer, "__init__", init)
