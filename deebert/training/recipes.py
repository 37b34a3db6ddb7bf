"""Training a model by a recipe: its stages one after the other, resumable.

Stage 1 fine-tunes the backbone, with the final classifier alone as in the paper or with all off-ramps. Stage
2 freezes both and trains the off-ramps. (Xin et al., 2020, section 2.3: the second stage must not touch what
the first one reached.) Stage 3, which the paper has not, goes on with all of them together, and may keep a part of what
it learned. Knows nothing of commands or of where labelled data comes from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deebert.checkpoint import load_checkpoint, weights_digest
from deebert.errors import RecipeError
from deebert.evaluation import LabelledSequences
from deebert.modeling import DeeBertForSequenceClassification
from deebert.precision import DTYPES
from deebert.training.cached_stage import train_cached_off_ramps
from deebert.training.config import (
    BackboneStage,
    BornAgain,
    FinalOnly,
    Joint,
    OffRampStage,
    Recipe,
    Teacher,
)
from deebert.training.data import Rows, check_labels, hold_out
from deebert.training.equilibrium import gradient_equilibrium
from deebert.training.frozen import final_logits
from deebert.training.interpolation import interpolate, snapshot
from deebert.training.log import TrainingLog
from deebert.training.losses import backbone_loss, off_ramp_loss
from deebert.training.processes import processes
from deebert.training.stage import StageContext, StageReport
from deebert.training.trainer import StageData, frozen, train_through_backbone

LOG_NAME = "training_log.jsonl"
_PLAN_NAME = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """What a training took, stage by stage."""

    stages: tuple[StageReport, ...]

    def __str__(self) -> str:
        parts = [f"stage {s.number} took {s.seconds:.0f} s" for s in self.stages]
        for i, stage in enumerate(self.stages[1:], start=1):
            first = self.stages[0]
            parts[i] += f", {100 * stage.seconds / max(first.seconds, 1e-9):.0f} % of stage {first.number}"
        return "; ".join(parts)


def train(
    model: DeeBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: LabelledSequences,
    recipe: Recipe,
    work_dir: Path,
    *,
    resume: bool = False,
    show_progress: bool = True,
) -> TrainingReport:
    """Train `model` in place; it ends in eval mode.

    Under `torchrun` every process calls this with the same arguments and ends with the same weights; only the
    first one writes.

    Args:
        model: fresh from `from_backbone`, or one to go on with.
        tokenizer: pads batches.
        data: training samples.
        recipe: what to do.
        work_dir: for checkpoints and the log, `LOG_NAME`; shared by all processes.
        resume: go on with what an earlier call with the same arguments left in `work_dir`. Killed and resumed is
            undisturbed, to the bit where the hardware is deterministic. Otherwise what is there is begun again.
        show_progress: bars on a terminal, lines in a log elsewhere.

    Raises:
        DataError: no samples, or a label that the model does not have.
        RecipeError: the recipe does not fit the models or the machine, it diverges, or `work_dir` holds another
            training.
        CheckpointError: the teacher cannot be loaded.
    """
    check_labels(data, model.final_classifier.classifier.out_features, model.config.problem)
    _check_fast(model, recipe)
    # Both were measured of other weights.
    model.config.int8_agreement = model.config.exit_policy = None
    training = _Training(model, tokenizer, data, recipe, work_dir, show_progress=show_progress)
    training.claim(resume=resume)
    try:
        return TrainingReport(stages=tuple(training.stages()))
    finally:
        model.train(False)


def unfinished(work_dir: Path) -> bool:
    """Whether `train` has begun there."""
    return (work_dir / _PLAN_NAME).exists()


class _Training:
    """One call of `train`."""

    def __init__(
        self,
        model: DeeBertForSequenceClassification,
        tokenizer: PreTrainedTokenizerBase,
        data: LabelledSequences,
        recipe: Recipe,
        work_dir: Path,
        *,
        show_progress: bool,
    ) -> None:
        self._model, self._tokenizer, self._recipe, self._work_dir = model, tokenizer, recipe, work_dir
        self._plan = {
            "recipe": recipe.to_dict(),
            "model": weights_digest(model),
            "data": _data_digest(data),
            "labels": sorted(dict(model.config.id2label or {}).items()),
        }
        self._rows, self._held_out = data, None
        if recipe.early_stopping is not None:
            self._rows, self._held_out = hold_out(data, recipe.early_stopping.held_out, recipe.seed)
        self._is_main = processes().is_main_process
        self._show_progress = show_progress and self._is_main
        self._resume = False

    def claim(self, *, resume: bool) -> None:
        """Make the folder this training's: go on with what is in it, or empty it."""
        plan_path = self._work_dir / _PLAN_NAME
        self._resume = resume and plan_path.exists()
        if self._resume:
            ours = json.loads(json.dumps(self._plan))
            # A plan of an earlier version says nothing of labels.
            begun = {"labels": ours["labels"], **json.loads(plan_path.read_text())}
            _check_same(begun, ours, self._work_dir)
        processes().wait_for_everyone()
        if self._is_main and not self._resume:
            for number in (1, 2, 3):
                shutil.rmtree(self._context(number).folder, ignore_errors=True)
                self._weights(number).unlink(missing_ok=True)
            (self._work_dir / LOG_NAME).unlink(missing_ok=True)
            self._work_dir.mkdir(parents=True, exist_ok=True)
            # Whole or not at all: a plan cut short would refuse to be resumed.
            partial = plan_path.with_name(_PLAN_NAME + ".unfinished")
            partial.write_text(json.dumps(self._plan, indent=1))
            partial.replace(plan_path)
        processes().wait_for_everyone()

    def stages(self) -> list[StageReport]:
        """Run what is not done yet."""
        # Without off-ramps, as in a static baseline, there is nothing beyond stage 1 to train.
        has_ramps = len(self._model.off_ramps) > 0
        return [
            self._stage(number, stage)
            for number, stage in self._recipe.stages.items()
            if number == 1 or has_ramps
        ]

    def _stage(self, number: int, stage: BackboneStage | OffRampStage) -> StageReport:
        context, weights = self._context(number), self._weights(number)
        report = context.finished() if self._resume and weights.exists() else None
        if report is not None:
            self._model.load_state_dict(load_file(weights))
            return report
        self._model.to(processes().device)
        report = (
            self._backbone_stage(stage, context)
            if isinstance(stage, BackboneStage)
            else self._off_ramp_stage(stage, context)
        )
        if self._is_main:
            _save(self._model.state_dict(), weights)
            shutil.rmtree(context.folder, ignore_errors=True)
        processes().wait_for_everyone()
        return report

    def _backbone_stage(self, stage: BackboneStage, context: StageContext) -> StageReport:
        model, config = self._model, self._model.config
        other = stage.teacher if isinstance(stage.teacher, Teacher) else None
        teacher = None if other is None else _load_teacher(other, model)
        # Itself as it stands now: a resumed stage, too, begins with what the stage before it left.
        source = model if isinstance(stage.teacher, BornAgain) else teacher
        data = StageData(
            rows=self._with_answers(self._rows, source),
            held_out=None if self._held_out is None else self._with_answers(self._held_out, source),
            hidden_teacher=teacher if other is not None and other.hidden_weight else None,
        )
        loss = backbone_loss(stage, config.off_ramp_layers, config.num_hidden_layers)
        objective = stage.objective
        before = None if stage.interpolation is None else snapshot(model)
        with contextlib.ExitStack() as during:
            if isinstance(objective, FinalOnly):
                during.enter_context(frozen(model.exit_modules))
            if isinstance(objective, Joint) and objective.weighting == "equilibrium":
                during.enter_context(gradient_equilibrium(model))
            report = train_through_backbone(
                model,
                self._tokenizer,
                data,
                stage,
                loss,
                context,
                off_ramp_learning_rate=getattr(objective, "off_ramp_learning_rate", None),
            )
        if stage.interpolation is not None and before is not None:
            interpolate(model, before, stage.interpolation)
        return report

    def _off_ramp_stage(self, stage: OffRampStage, context: StageContext) -> StageReport:
        model = self._model.train(False)
        if stage.mode == "fast":
            return train_cached_off_ramps(model, self._rows, self._held_out, stage, context)
        # The frozen final classifier's answers are constants: taken once, without dropout.
        source = model if stage.self_distillation is not None else None
        data = StageData(
            rows=self._with_answers(self._rows, source),
            held_out=None if self._held_out is None else self._with_answers(self._held_out, source),
        )
        with frozen([model.backbone, model.final_classifier]):
            return train_through_backbone(model, self._tokenizer, data, stage, off_ramp_loss(stage), context)

    def _with_answers(self, data: LabelledSequences, source: DeeBertForSequenceClassification | None) -> Rows:
        if source is None:
            return Rows(data)
        recipe = self._recipe
        logits = final_logits(
            source.to(processes().device),
            data,
            DTYPES[recipe.precision],
            recipe.micro_batch_tokens,
            show_progress=self._show_progress,
        )
        return Rows(data, logits)

    def _context(self, number: int) -> StageContext:
        log_path = self._work_dir / LOG_NAME
        return StageContext(
            number=number,
            recipe=self._recipe,
            work_dir=self._work_dir,
            log=TrainingLog(log_path if self._is_main else None),
            log_path=log_path,
            resume=self._resume,
            show_progress=self._show_progress,
        )

    def _weights(self, number: int) -> Path:
        return self._work_dir / f"stage-{number}.safetensors"


def _check_fast(model: DeeBertForSequenceClassification, recipe: Recipe) -> None:
    """Before stage 1 spends hours: a cache of what attention reads holds only while its query stays as it is."""
    stage = recipe.stage_2 if len(model.off_ramps) and recipe.stage_3 is None else None
    if model.config.off_ramp_pooling == "attention" and stage is not None and stage.mode == "fast":
        raise RecipeError(
            "a fast stage 2 trains on cached vectors, so that the queries of attention pooling stay as they are, and "
            "no later stage trains them: train stage 2 exact, or a third stage after it"
        )


def _load_teacher(
    teacher: Teacher, student: DeeBertForSequenceClassification
) -> DeeBertForSequenceClassification:
    model = load_checkpoint(teacher.folder, allow_pickle=teacher.allow_pickle).model
    ours, theirs = student.config, model.config
    if (ours.id2label, ours.problem, ours.backbone_config.vocab_size) != (
        theirs.id2label,
        theirs.problem,
        theirs.backbone_config.vocab_size,
    ):
        raise RecipeError(
            f"the teacher {teacher.folder!r} has other labels, another problem type or another vocabulary than the "
            "model: train one on the same labels and backbone"
        )
    if teacher.hidden_weight and (ours.num_hidden_layers, ours.hidden_size) != (
        theirs.num_hidden_layers,
        theirs.hidden_size,
    ):
        raise RecipeError(
            f"the teacher {teacher.folder!r} has another depth or width than the model, so that its token states "
            "cannot be matched: leave its hidden weight at 0"
        )
    return model.requires_grad_(False)


def _check_same(begun: dict[str, Any], now: dict[str, Any], work_dir: Path) -> None:
    if begun == now:
        return
    name, was, is_now = next(_differences(begun, now))
    raise RecipeError(
        f"the training begun in {str(work_dir)!r} had another {name} ({was}, now {is_now}): resume with what it was "
        "begun with, or begin again in another folder"
    )


def _differences(begun: Any, now: Any, name: str = "") -> Any:
    if isinstance(begun, dict) and isinstance(now, dict):
        for key in sorted({*begun, *now}):
            yield from _differences(begun.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif begun != now:
        yield name, begun, now


def _data_digest(data: LabelledSequences) -> str:
    digest = hashlib.sha256(data.tokens.layout.lengths.tobytes())
    digest.update(data.tokens.input_ids.numpy().tobytes())
    digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".unfinished")
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial)
    partial.replace(path)
