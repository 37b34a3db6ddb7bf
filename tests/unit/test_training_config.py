"""Recipes: what cannot be meant cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from deebert.errors import RecipeError
from deebert.training import (
    ALTERNATING,
    BEST,
    JOINT,
    OFF_RAMPS,
    RECIPES,
    TWO_STAGE,
    Alternating,
    BackboneStage,
    BornAgain,
    Distillation,
    EarlyStopping,
    FinalOnly,
    Interpolation,
    Joint,
    OffRampStage,
    Recipe,
    StageConfig,
    Teacher,
)


def test_the_default_is_the_papers_two_stages() -> None:
    recipe = Recipe()

    assert recipe == TWO_STAGE
    assert recipe.stage_1 is not None
    assert (recipe.stage_1.epochs, recipe.stage_1.batch_size, recipe.stage_1.learning_rate) == (3, 8, 2e-5)
    assert (recipe.stage_1.weight_decay, recipe.stage_1.adam_epsilon, recipe.stage_1.max_grad_norm) == (
        0,
        1e-8,
        1,
    )
    assert (recipe.stage_1.warmup_share, recipe.stage_1.objective) == (0, FinalOnly())
    assert recipe.stage_2 is not None
    assert recipe.stage_2.mode == "fast"
    assert recipe.seed == 42


def test_the_named_recipes() -> None:
    assert [name for name in RECIPES if name != "best"] == ["two-stage", "joint", "alternating", "off-ramps"]
    assert JOINT.stage_1 == BackboneStage(objective=Joint())
    assert ALTERNATING.stage_1 == BackboneStage(objective=Alternating())
    assert (JOINT.stage_2, ALTERNATING.stage_2, OFF_RAMPS.stage_1) == (None, None, None)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: Recipe(stage_1=None, stage_2=None),
            "a recipe without a stage trains nothing: give it at least one",
        ),
        (
            lambda: Recipe(stage_2=None),
            "a stage 1 of the final loss alone leaves the off-ramps untrained: add stage 2, or train jointly",
        ),
        (
            lambda: Recipe(stage_3=BackboneStage()),
            "a stage 3 of the final loss alone would leave the off-ramps behind: give it a joint objective",
        ),
        (
            lambda: Recipe(stage_1=BackboneStage(teacher=BornAgain())),
            "before stage 1 there is nothing to be born again from: give it another teacher",
        ),
        (
            lambda: Alternating(weighting="equilibrium"),
            "gradient equilibrium averages over all classifiers and every other step of alternating training has "
            "one: choose linear or uniform weights",
        ),
        (
            lambda: StageConfig(batch_size=8, accumulation_steps=3),
            "a batch of 8 samples does not fall into 3 equal pieces: choose accumulation_steps that divides "
            "batch_size",
        ),
        (
            lambda: OffRampStage(accumulation_steps=2),
            "a fast stage 2 needs no accumulation_steps, its batches hold one vector per off-ramp and sample: "
            "leave it at 1",
        ),
        (lambda: Joint(weighting="log"), "weighting is 'log': choose one of linear, uniform, equilibrium"),  # type: ignore[arg-type]
        (lambda: OffRampStage(mode="slow"), "mode is 'slow': choose one of fast, exact"),  # type: ignore[arg-type]
        (lambda: Joint(off_ramp_learning_rate=0), "off_ramp_learning_rate is 0: give more than 0"),
        (lambda: StageConfig(epochs=0), "epochs is 0: give more than 0"),
        (lambda: StageConfig(learning_rate=float("nan")), "learning_rate is nan: give more than 0"),
        (lambda: StageConfig(learning_rate=float("inf")), "learning_rate is inf: give a finite number"),
        (lambda: OffRampStage(epochs=float("inf")), "epochs is inf: give a finite number"),
        (lambda: StageConfig(warmup_share=1.0), "warmup_share is 1.0: give a share from 0 to below 1"),
        (
            lambda: Interpolation(first=0, last=0),
            "interpolation is 0: give a share above 0, or no such stage",
        ),
        (
            lambda: Interpolation(first=1.1, last=0),
            "the interpolation's first share is 1.1: give one from 0 to 1",
        ),
        (
            lambda: Interpolation(first=1, last=-0.1),
            "the interpolation's last share is -0.1: give one from 0 to 1",
        ),
        (lambda: Distillation(weight=0), "the distillation weight is 0: give a share above 0 and up to 1"),
        (lambda: Distillation(temperature=0), "the distillation temperature is 0: give more than 0"),
        (lambda: Teacher(folder="t", hidden_weight=-1), "the teacher's hidden_weight is -1: give 0 or more"),
        (lambda: EarlyStopping(held_out=1), "held_out is 1: give a share between 0 and 1"),
        (
            lambda: Recipe(precision="int8"),  # type: ignore[arg-type]
            "precision is 'int8': choose one of float32, bfloat16, float16",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(build: Callable[[], object], sentence: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build()
    assert str(refused.value) == sentence


def test_an_exact_stage_2_may_accumulate() -> None:
    assert OffRampStage(mode="exact", accumulation_steps=4).accumulation_steps == 4


def test_the_json_form_tells_recipes_apart() -> None:
    joint = replace(JOINT, stage_1=BackboneStage(objective=Joint(self_distillation=Distillation())))
    forms = [r.to_dict() for r in (TWO_STAGE, JOINT, joint, ALTERNATING, OFF_RAMPS, replace(JOINT, seed=1))]

    assert all(a != b for i, a in enumerate(forms) for b in forms[:i])
    assert Recipe().to_dict() == TWO_STAGE.to_dict()


def test_a_recipe_without_what_is_new_keeps_the_form_that_it_had_before_there_was_any() -> None:
    # A training begun then can be resumed.
    assert "stage_3" not in TWO_STAGE.to_dict()
    assert "stage_3" in replace(TWO_STAGE, stage_3=JOINT.stage_1).to_dict()
    assert "interpolation" not in TWO_STAGE.to_dict()["stage_1"]
    taught = replace(TWO_STAGE, stage_1=BackboneStage(teacher=Teacher(folder="t", allow_pickle=True)))
    assert "allow_pickle" not in taught.to_dict()["stage_1"]["teacher"]
    assert BEST.stage_3 is not None
    kept = replace(BEST.stage_3, interpolation=Interpolation(first=1.0, last=0.0))
    kept_in_part = replace(BEST, stage_3=kept).to_dict()["stage_3"]
    assert kept_in_part == {
        **BEST.to_dict()["stage_3"],
        "interpolation": {"first": 1.0, "last": 0.0},
    }
