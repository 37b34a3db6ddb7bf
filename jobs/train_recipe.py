"""The flags of `deebert train` as a recipe. Knows nothing of data, models or folders."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from deebert.training import BackboneStage, Distillation, OffRampStage, Recipe, Teacher
    from jobs.train import TrainJob


def recipe_of(job: TrainJob, *, model_type: str | None = None) -> Recipe:
    """The recipe that the flags describe.

    Args:
        job: the flags.
        model_type: of the backbone, where it is known: what is left out may hang on it.

    Raises:
        RecipeError: they contradict each other.
    """
    from deebert.precision import resolve_precision
    from deebert.training import PAPER_EPOCHS, RECIPES, EarlyStopping, Interpolation

    named, epochs = RECIPES[job.recipe], PAPER_EPOCHS.get(model_type)
    keeps_weights = job.from_classifier is not None
    stage_1 = None if keeps_weights or named.stage_1 is None else _stage_1(job, named.stage_1, epochs)
    stage_3 = None if keeps_weights or named.stage_3 is None else _stage_3(job, named.stage_3, epochs)
    if job.interpolation is not None:
        first, last = job.interpolation
        kept = None if first == last == 1 else Interpolation(first=first, last=last)
        # Of the last stage that moves the backbone: what begins with a finished model.
        if stage_3 is not None:
            stage_3 = replace(stage_3, interpolation=kept)
        elif stage_1 is not None:
            stage_1 = replace(stage_1, interpolation=kept)
    return replace(
        named,
        stage_1=stage_1,
        stage_2=_stage_2(job, named.stage_2, epochs, is_last=stage_3 is None),
        stage_3=stage_3,
        early_stopping=None
        if job.held_out is None
        else EarlyStopping(held_out=job.held_out, patience=job.patience, every_steps=job.evaluate_every),
        seed=job.seed,
        precision=resolve_precision(job.precision),
        checkpoint_steps=job.checkpoint_steps,
    )


def _stage_1(job: TrainJob, stage: BackboneStage, epochs: float | None) -> BackboneStage:
    return replace(_through_backbone(job, stage, epochs), teacher=_teacher(job))


def _stage_3(job: TrainJob, stage: BackboneStage, epochs: float | None) -> BackboneStage:
    """Its teacher is the recipe's own: what stages 1 and 2 made."""
    teacher = None if stage.teacher is None else replace(stage.teacher, temperature=job.temperature)
    return replace(_through_backbone(job, stage, epochs), teacher=teacher)


def _through_backbone(job: TrainJob, stage: BackboneStage, epochs: float | None) -> BackboneStage:
    from deebert.training import Joint

    objective = stage.objective
    if isinstance(objective, Joint):
        objective = replace(
            objective,
            **_given(weighting=job.weighting, off_ramp_learning_rate=job.off_ramp_learning_rate),
            self_distillation=_distillation(job, objective.self_distillation),
        )
    return replace(
        stage,
        objective=objective,
        **_given(
            epochs=epochs if job.epochs is None else job.epochs,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            accumulation_steps=job.accumulation_steps,
        ),
        **_of_every_stage(job),
    )


def _stage_2(
    job: TrainJob, stage: OffRampStage | None, epochs: float | None, *, is_last: bool
) -> OffRampStage | None:
    from deebert.training import PAPER_STAGE_2, OffRampStage

    if job.stage_2 == "none" or (job.stage_2 is None and stage is None):
        if job.off_ramp_epochs is not None or job.off_ramp_batch_size is not None:
            raise UsageError(
                "--off-ramp-epochs and --off-ramp-batch-size are for stage 2, which this training has not: give "
                "--stage-2 fast or leave them out"
            )
        return None
    distillation = _distillation(job, None if stage is None else stage.self_distillation)
    mode = job.stage_2 or (stage or OffRampStage()).mode
    if mode == "fast" and is_last and job.new_off_ramps_read == "attention":
        raise UsageError(
            "--off-ramp-pooling attention learns what it reads, which a fast stage 2 keeps as it is: give "
            "--stage-2 exact, or --recipe best, whose third stage trains it"
        )
    if stage is None or stage.mode != mode:
        stage = PAPER_STAGE_2 if mode == "exact" else OffRampStage()
    if job.off_ramp_epochs is not None or mode == "fast":
        epochs = job.off_ramp_epochs
    return replace(
        stage,
        self_distillation=distillation,
        **_given(
            epochs=epochs,
            batch_size=job.off_ramp_batch_size,
            learning_rate=job.off_ramp_learning_rate,
            accumulation_steps=job.accumulation_steps if mode == "exact" else None,
        ),
        **_of_every_stage(job),
    )


def _of_every_stage(job: TrainJob) -> dict[str, Any]:
    return _given(
        weight_decay=job.weight_decay,
        warmup_share=job.warmup,
        adam_epsilon=job.adam_epsilon,
        max_grad_norm=job.max_grad_norm,
        exit_head_learning_rate=job.exit_head_learning_rate,
    )


def _distillation(job: TrainJob, named: Distillation | None) -> Distillation | None:
    from deebert.training import Distillation

    if job.self_distillation is None:
        return None if named is None else replace(named, temperature=job.temperature)
    if job.self_distillation == 0:
        return None
    return Distillation(weight=job.self_distillation, temperature=job.temperature)


def _teacher(job: TrainJob) -> Teacher | None:
    from deebert.training import Teacher

    if job.teacher is None:
        return None
    return Teacher(
        folder=job.teacher,
        weight=job.teacher_weight,
        temperature=job.temperature,
        hidden_weight=job.teacher_hidden_weight,
        allow_pickle=job.allow_pickle,
    )


def _given(**values: Any) -> dict[str, Any]:
    """The flags that were given."""
    return {name: value for name, value in values.items() if value is not None}
