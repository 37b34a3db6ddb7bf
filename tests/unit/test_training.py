"""Training by recipe: what each stage may touch, that it learns, that it resumes, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from deebert.encoder import PackedEncoder
from deebert.errors import CheckpointError, DataError, RecipeError
from deebert.evaluation import LabelledSequences
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.training import (
    LOG_NAME,
    Alternating,
    BackboneStage,
    BornAgain,
    Distillation,
    EarlyStopping,
    Joint,
    Recipe,
    Teacher,
    TrainingReport,
    check_labels,
    read_log,
    train,
    unfinished,
)
from deebert.training import recipes as recipes_module
from deebert.training import trainer as trainer_module
from deebert.training.cached_stage import OffRampStack
from deebert.training.data import LengthGrouped, Rows, hold_out
from deebert.training.frozen import collect_answers, final_logits
from deebert.training.optimizer import scheduled_adamw
from deebert.training.trainer import frozen, last_checkpoint, step_of
from tests.conftest import ModelFactory
from tests.training_toy import QUICK_1, QUICK_2, accuracies, changed, toy, weights

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


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Run:
    """Trains a model on a toy problem; keyword arguments reach `train`."""

    def run_(
        model: DeeBertForSequenceClassification,
        recipe: Recipe,
        data: LabelledSequences | None = None,
        work_dir: Path | None = None,
        **options: Any,
    ) -> TrainingReport:
        rows = toy(48, seed=0) if data is None else data
        return train(model, tokenizer, rows, recipe, work_dir or tmp_path, show_progress=False, **options)

    return run_


def padded(tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    rows = [tokens.sequence(i).input_ids.long() for i in range(len(tokens))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return ids, mask


def names(model: DeeBertForSequenceClassification, *prefixes: str) -> set[str]:
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def without_dropout(model: DeeBertForSequenceClassification) -> DeeBertForSequenceClassification:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


class TestEveryRecipe:
    @pytest.mark.parametrize("name", RECIPES)
    def test_its_losses_fall_and_every_off_ramp_learns(
        self, name: str, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3)

        report = run(model, RECIPES[name], toy(300, seed=1))

        assert min(accuracies(model, toy(200, seed=2))) > 0.85
        assert not model.training
        assert all(p.requires_grad for p in model.parameters())
        for stage in report.stages:
            records = [
                r for r in read_log(tmp_path / LOG_NAME) if r["stage"] == stage.number and "losses" in r
            ]
            for layer in records[-1]["losses"]:
                assert records[-1]["losses"][layer] < 0.5 * records[0]["losses"][layer]


class TestStage1:
    def test_of_two_stages_leaves_the_off_ramps_bit_for_bit(self, tiny_model: ModelFactory, run: Run) -> None:
        model = tiny_model(num_layers=2)
        before = weights(model)

        run(model, replace(TWO_STAGE, stage_2=replace(QUICK_2, learning_rate=1e-30)))

        assert not changed(before, model) & names(model, "off_ramps.")
        assert changed(before, model) >= names(model, "final_classifier.")

    def test_joint_moves_everything(self, tiny_model: ModelFactory, run: Run) -> None:
        model = tiny_model(num_layers=2)
        before = weights(model)

        run(model, JOINT)

        # Token types and far positions never occur; a key's bias has no effect on attention.
        still = {name for name in before if "embeddings" in name or "key.bias" in name}
        assert changed(before, model) | still == set(before)

    @pytest.mark.parametrize(("steps", "moves"), [(1, False), (2, True)])
    def test_alternating_begins_with_the_final_loss_alone(
        self, steps: int, moves: bool, tiny_model: ModelFactory, run: Run
    ) -> None:
        model = tiny_model(num_layers=2)
        before = weights(model)

        run(
            model,
            replace(JOINT, stage_1=replace(QUICK_1, objective=Alternating(), epochs=steps)),
            toy(16, seed=0),
        )

        assert (changed(before, model) >= names(model, "off_ramps.0.")) == moves
        assert bool(changed(before, model) & names(model, "off_ramps.0.")) == moves
        assert changed(before, model) >= names(model, "final_classifier.")

    def test_accumulated_pieces_make_the_same_step(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        # 40 rows in batches of 16: the last batch's pieces are smaller.
        models = [without_dropout(tiny_model(num_layers=2)) for _ in range(2)]

        for pieces, model in zip((1, 4), models, strict=True):
            stage = replace(QUICK_1, objective=Joint(), accumulation_steps=pieces, epochs=2)
            run(model, replace(JOINT, stage_1=stage), toy(40, seed=3), tmp_path / str(pieces))

        logged = [[r["loss"] for r in read_log(tmp_path / p / LOG_NAME)] for p in ("1", "4")]
        assert logged[0] == pytest.approx(logged[1], abs=1e-4)
        for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            # A key's bias has no effect: its gradient is rounding, which Adam makes a full step of.
            if "key.bias" not in name:
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_off_ramps_can_have_a_learning_rate_of_their_own(
        self, tiny_model: ModelFactory, run: Run
    ) -> None:
        model = tiny_model(num_layers=2)
        before = weights(model)
        objective = Joint(off_ramp_learning_rate=1e-3)
        stage = replace(QUICK_1, objective=objective, epochs=1, learning_rate=1e-5)

        run(model, replace(JOINT, stage_1=stage), toy(16, seed=0))  # one batch, one step

        # Adam's first step is the learning rate, whatever the gradient.
        steps = {
            name: (value - before[name]).abs().max().item() for name, value in model.state_dict().items()
        }
        for name in ("off_ramps.0.dense.weight", "off_ramps.0.classifier.bias"):
            assert steps[name] == pytest.approx(1e-3, rel=1e-2)
        for name in ("final_classifier.dense.weight", "backbone.encoder.layer.0.output.dense.weight"):
            assert steps[name] == pytest.approx(1e-5, rel=0.1)

    def test_a_step_is_of_the_stages_own_numbers(self, tiny_model: ModelFactory, run: Run) -> None:
        model = without_dropout(tiny_model(num_layers=2))
        before = weights(model)
        # So large an epsilon makes Adam's first step as long as the gradient, which is cut to a length of 0.001.
        stage = replace(QUICK_1, objective=Joint(), epochs=1, learning_rate=1.0, adam_epsilon=1.0)
        stage = replace(stage, max_grad_norm=1e-3, weight_decay=0.25)

        run(model, replace(JOINT, stage_1=stage), toy(16, seed=0))  # one batch, one step

        # Biases and norms do not decay.
        kept = {name: 1.0 if "LayerNorm" in name or name.endswith("bias") else 0.75 for name in before}
        steps = [value - kept[name] * before[name] for name, value in model.named_parameters()]
        assert torch.cat([step.flatten() for step in steps]).norm().item() == pytest.approx(1e-3, rel=1e-2)

    def test_dropout_is_the_seeds(self, tiny_model: ModelFactory, run: Run) -> None:
        first, second = tiny_model(num_layers=2), tiny_model(num_layers=2)

        for seed, model in enumerate((first, second)):
            run(model, replace(JOINT, seed=seed), toy(1, seed=0))  # one row has one order

        assert changed(weights(first), second) >= names(first, "final_classifier.")

    def test_warm_up_counts_the_batch_that_is_not_full(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        stage = replace(QUICK_1, objective=Joint(), warmup_share=0.5)

        run(tiny_model(num_layers=2), replace(JOINT, stage_1=stage), toy(17, seed=0))  # 4 epochs of 2 steps

        rates = [r["learning_rate"] for r in read_log(tmp_path / LOG_NAME) if "learning_rate" in r]
        shares = (0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25)
        assert rates == pytest.approx([share * QUICK_1.learning_rate for share in shares])

    def test_each_epoch_reads_the_rows_in_its_own_order(self, tiny_model: ModelFactory, run: Run) -> None:
        model, data, seen = tiny_model(num_layers=2), toy(10, seed=1), []
        texts = [data.tokens.sequence(i).input_ids.tolist() for i in range(10)]
        model.register_forward_pre_hook(
            lambda module, args, given: seen.extend(given["input_ids"].tolist()), with_kwargs=True
        )

        run(model, replace(JOINT, stage_1=replace(QUICK_1, objective=Joint(), batch_size=4, epochs=3)), data)

        sampler, expected = LengthGrouped(data.tokens.layout.lengths, 4, JOINT.seed), []
        for sampler.epoch in range(3):
            expected += list(sampler)
        assert [[token for token in row if token] for row in seen] == [texts[i] for i in expected]
        assert expected[:10] != expected[10:20]

    def test_a_records_losses_are_means_over_its_samples(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        # 10 rows of a batch in pieces of 4, 4 and 2.
        for pieces in (1, 4):
            stage = replace(QUICK_1, objective=Joint(), accumulation_steps=pieces, epochs=1)
            model = without_dropout(tiny_model(num_layers=2))
            run(model, replace(JOINT, stage_1=stage), toy(10, seed=3), tmp_path / str(pieces))

        whole, pieced = (read_log(tmp_path / pieces / LOG_NAME)[0]["losses"] for pieces in ("1", "4"))
        assert pieced == pytest.approx(whole, abs=1e-5)

    def test_a_records_losses_are_those_since_the_record_before(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        uniform = replace(JOINT, stage_1=replace(QUICK_1, objective=Joint(weighting="uniform")))

        run(tiny_model(num_layers=3), uniform)

        records = [r for r in read_log(tmp_path / LOG_NAME) if "losses" in r]
        assert len(records) == 12
        assert [sum(r["losses"].values()) for r in records] == pytest.approx(
            [r["loss"] for r in records], rel=1e-4
        )

    def test_warm_up_raises_the_learning_rate_from_zero(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        run(tiny_model(num_layers=2), replace(JOINT, stage_1=replace(JOINT.stage_1, warmup_share=0.5)))

        rates = [r["learning_rate"] for r in read_log(tmp_path / LOG_NAME) if "learning_rate" in r]
        assert rates[0] < rates[3] < rates[5]
        assert rates[-1] < rates[5]

    def test_bfloat16_trains_and_leaves_float32_weights_and_forward(
        self, tiny_model: ModelFactory, run: Run
    ) -> None:
        model = tiny_model(num_layers=2)

        run(model, replace(JOINT, precision="bfloat16"), toy(200, seed=1))

        assert {p.dtype for p in model.parameters()} == {torch.float32}
        with torch.no_grad():
            states = model(*padded(toy(4, seed=2).tokens), output_hidden_states=True).hidden_states
        assert states[-1].dtype == torch.float32
        assert not torch.equal(states[-1], states[-1].bfloat16().float())
        assert min(accuracies(model, toy(100, seed=2))) > 0.8

    def test_float16_without_a_gpu_is_refused(self, tiny_model: ModelFactory, run: Run) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(RecipeError, match=r"^float16 training needs a GPU: choose bfloat16 or float32$"):
            run(tiny_model(num_layers=2), replace(JOINT, precision="float16"))


def test_what_was_frozen_before_stays_frozen_after(model: DeeBertForSequenceClassification) -> None:
    model.backbone.embeddings.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}

    with frozen([model.backbone]):
        assert not any(p.requires_grad for p in model.backbone.parameters())
        assert all(p.requires_grad for p in model.off_ramps.parameters())

    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("recipe", [OFF_RAMPS, EXACT], ids=["fast", "exact"])
class TestStage2:
    def test_changes_every_off_ramp_and_nothing_else_bit_for_bit(
        self, recipe: Recipe, model: DeeBertForSequenceClassification, run: Run
    ) -> None:
        before = weights(model)

        run(model, recipe)

        assert changed(before, model) == names(model, "off_ramps.")

    def test_learns_on_a_frozen_backbone(
        self, recipe: Recipe, pooling: str, tiny_model: ModelFactory, run: Run
    ) -> None:
        model = tiny_model("bert", pooling)
        held_out = toy(200, seed=2)
        before = accuracies(model, held_out)

        run(model, recipe, toy(400, seed=1))

        after = accuracies(model, held_out)
        assert after[-1] == before[-1]  # full depth is untouched
        assert all(a > b for a, b in zip(after[:-1], before[:-1], strict=True))
        assert max(after[:-1]) > 0.8

    def test_forgets_what_was_measured_of_other_weights(
        self, recipe: Recipe, tiny_model: ModelFactory, run: Run
    ) -> None:
        model = tiny_model(int8_agreement=0.999)
        run(model, recipe)
        assert model.config.int8_agreement is None

    def test_is_deterministic(self, recipe: Recipe, tiny_model: ModelFactory, run: Run) -> None:
        first, second = tiny_model(), tiny_model()

        for model in (first, second):
            run(model, recipe)

        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def test_the_order_of_the_rows_is_the_seeds(
        self, recipe: Recipe, tiny_model: ModelFactory, run: Run
    ) -> None:
        first, second = (without_dropout(tiny_model(num_layers=2)) for _ in range(2))

        for seed, model in enumerate((first, second)):
            run(model, replace(recipe, seed=seed))

        assert changed(weights(first), second) >= names(first, "off_ramps.0.classifier.")

    def test_the_learning_rate_rises_and_falls(
        self, recipe: Recipe, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        assert recipe.stage_2 is not None
        run(tiny_model(num_layers=2), replace(recipe, stage_2=replace(recipe.stage_2, warmup_share=0.5)))

        rates = [r["learning_rate"] for r in read_log(tmp_path / LOG_NAME) if "learning_rate" in r]
        middle = len(rates) // 2
        assert rates[0] == 0.0 < rates[1] < rates[middle] == pytest.approx(QUICK_2.learning_rate)
        assert rates[-1] == pytest.approx(QUICK_2.learning_rate / (len(rates) - middle))

    def test_does_nothing_without_off_ramps(self, recipe: Recipe, tiny_model: ModelFactory, run: Run) -> None:
        model = tiny_model(off_ramp_layers=[])
        before = weights(model)

        report = run(model, recipe)

        assert report.stages == ()
        assert not changed(before, model)

    def test_self_distillation_changes_what_is_learned(
        self, recipe: Recipe, tiny_model: ModelFactory, run: Run
    ) -> None:
        assert recipe.stage_2 is not None
        alone, taught = tiny_model(num_layers=3), tiny_model(num_layers=3)
        pure = replace(recipe, stage_2=replace(recipe.stage_2, self_distillation=Distillation(weight=1.0)))

        run(alone, recipe, toy(200, seed=1))
        run(taught, pure, toy(200, seed=1))

        # An untrained final classifier teaches nonsense: its pupil knows less of the labels and more of it.
        assert max(accuracies(taught, toy(200, seed=2))[:-1]) < max(accuracies(alone, toy(200, seed=2))[:-1])
        with torch.no_grad():
            said = [m(*padded(toy(100, seed=4).tokens)) for m in (alone, taught)]
        agreement = [(s.off_ramp_logits[-1].argmax(-1) == s.logits.argmax(-1)).float().mean() for s in said]
        assert agreement[1] > agreement[0]


def test_the_optimizer_of_cached_states_has_what_the_stage_says() -> None:
    stage = replace(QUICK_2, weight_decay=0.3, adam_epsilon=1e-5, warmup_share=0.5)

    optimizer, _ = scheduled_adamw([torch.nn.Parameter(torch.zeros(1))], stage, 1e-3, 10)

    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["eps"], group["initial_lr"]) == (0.3, 1e-5, 1e-3)


class TestCachedStates:
    @pytest.mark.parametrize("layers", [None, [2, 3]])
    def test_off_ramps_on_cached_states_answer_as_in_the_model(
        self, tiny_model: ModelFactory, family: str, pooling: str, layers: list[int] | None
    ) -> None:
        model = tiny_model(family, pooling, off_ramp_layers=layers)
        data = toy(40, seed=3)
        chosen = model.config.off_ramp_layers

        answers = collect_answers(
            model, data, torch.float32, 64, layers=chosen, final=True, show_progress=False
        )
        with torch.no_grad():
            cached = OffRampStack(model).eval()(answers.states)
            expected = model(*padded(data.tokens))

        assert answers.states.shape == (4 if layers is None else 2, 40, 32)
        torch.testing.assert_close(cached, expected.off_ramp_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(answers.final_logits, expected.logits, atol=1e-4, rtol=0)
        alone = final_logits(model, data, torch.float32, 64, show_progress=False)
        assert torch.equal(alone, answers.final_logits)  # type: ignore[arg-type]

    def test_the_backbone_runs_no_deeper_than_is_asked_for(
        self, model: DeeBertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: set[int] = set()
        layer = PackedEncoder.layer

        def noting(self: PackedEncoder, index: int, *rest: Any) -> Tensor:
            seen.add(index)
            return layer(self, index, *rest)

        monkeypatch.setattr(PackedEncoder, "layer", noting)
        collect_answers(
            model, toy(5, seed=3), torch.float32, 64, layers=[1, 2], final=False, show_progress=False
        )

        assert seen == {0, 1}

    def test_states_are_computed_in_the_precision_that_they_are_kept_in(
        self, model: DeeBertForSequenceClassification
    ) -> None:
        whole, half = (
            collect_answers(model, toy(40, seed=3), dtype, 64, layers=[4], final=True, show_progress=False)
            for dtype in (torch.float32, torch.bfloat16)
        )

        assert (half.states.dtype, whole.states.dtype) == (torch.bfloat16, torch.float32)
        assert not torch.equal(half.states, whole.states.bfloat16())  # more than the last rounding is lost
        assert (half.states.float() - whole.states).abs().mean() < 0.02
        assert half.final_logits is not None
        assert whole.final_logits is not None
        assert half.final_logits.dtype == torch.float32
        assert not torch.equal(half.final_logits, whole.final_logits)

    def test_the_stack_writes_back_what_it_read(self, model: DeeBertForSequenceClassification) -> None:
        before = weights(model)
        stack = OffRampStack(model)

        with torch.no_grad():
            stack.dense[1, 2, 3] += 1.0  # input 2 of output 3
        stack.write_back(model)

        assert changed(before, model) == {"off_ramps.1.dense.weight"}
        difference = model.state_dict()["off_ramps.1.dense.weight"] - before["off_ramps.1.dense.weight"]
        assert difference.nonzero().tolist() == [[3, 2]]


@pytest.fixture(scope="module")
def teacher(
    tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a model that knows the toy problem."""
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_model(num_layers=2, seed=5)
    train(model, tokenizer, toy(300, seed=1), TWO_STAGE, folder / "work", show_progress=False)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


class TestTeacher:
    def test_alone_it_teaches_the_final_classifier_its_answers(
        self, teacher: Path, tiny_model: ModelFactory, run: Run
    ) -> None:
        model, data = tiny_model(num_layers=2), toy(300, seed=1)
        # Labels without meaning: what the student knows afterwards, it has from the teacher.
        scrambled = LabelledSequences(tokens=data.tokens, labels=data.labels.roll(7))
        stage = replace(QUICK_1, teacher=Teacher(folder=str(teacher), weight=1.0))

        run(model, replace(TWO_STAGE, stage_1=stage), scrambled)

        assert accuracies(model, toy(200, seed=2))[-1] > 0.85

    def test_its_states_pull_the_students(self, teacher: Path, tiny_model: ModelFactory, run: Run) -> None:
        distances = []
        theirs = DeeBertForSequenceClassification.from_pretrained(teacher).eval()
        ids, mask = padded(toy(50, seed=2).tokens)
        for hidden_weight in (0.0, 10.0):
            model = tiny_model(num_layers=2)
            stage = replace(QUICK_1, teacher=Teacher(folder=str(teacher), hidden_weight=hidden_weight))
            run(model, replace(TWO_STAGE, stage_1=stage), toy(200, seed=1))
            with torch.no_grad():
                pair = [m.hidden_states(ids, mask, None)[-1][mask.bool()] for m in (model, theirs)]
            distances.append((pair[0] - pair[1]).square().mean().item())

        assert distances[1] < 0.5 * distances[0]

    def test_one_of_other_labels_is_refused(self, teacher: Path, tiny_model: ModelFactory, run: Run) -> None:
        stage = replace(QUICK_1, teacher=Teacher(folder=str(teacher)))

        with pytest.raises(
            RecipeError, match="has other labels, another problem type or another vocabulary than the model"
        ):
            run(tiny_model(num_labels=4), replace(TWO_STAGE, stage_1=stage))

    def test_one_of_another_depth_can_teach_its_answers_but_not_its_states(
        self, teacher: Path, tiny_model: ModelFactory, run: Run
    ) -> None:
        answers = replace(QUICK_1, epochs=1, teacher=Teacher(folder=str(teacher)))
        states = replace(answers, teacher=Teacher(folder=str(teacher), hidden_weight=1.0))

        run(tiny_model(num_layers=3), replace(TWO_STAGE, stage_1=answers))
        with pytest.raises(RecipeError, match="has another depth or width than the model"):
            run(tiny_model(num_layers=3), replace(TWO_STAGE, stage_1=states))

    def test_one_that_is_not_there_is_refused(self, tiny_model: ModelFactory, run: Run) -> None:
        stage = replace(QUICK_1, teacher=Teacher(folder="/no/such/teacher"))

        with pytest.raises(CheckpointError, match="no such model folder: '/no/such/teacher'"):
            run(tiny_model(num_layers=2), replace(TWO_STAGE, stage_1=stage))


class TestStage3:
    def test_goes_on_with_all_of_the_model(self, tiny_model: ModelFactory, run: Run, tmp_path: Path) -> None:
        model = tiny_model(num_layers=3)
        recipe = Recipe(stage_1=None, stage_2=None, stage_3=replace(QUICK_1, objective=Joint()))
        before = weights(model)

        report = run(model, recipe, toy(300, seed=1))

        assert [stage.number for stage in report.stages] == [3]
        trained = {n for n in before if "key.bias" not in n and "embeddings" not in n}
        assert trained <= changed(before, model)
        assert min(accuracies(model, toy(200, seed=2))) > 0.8

    @pytest.mark.parametrize("share", [0.25, 0.5])
    def test_keeps_the_share_of_its_change_that_is_asked_for(
        self, share: float, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        stage, ended = replace(QUICK_1, objective=Joint()), {}
        before = weights(tiny_model(num_layers=2))

        for kept in (1.0, share):
            model = tiny_model(num_layers=2)
            recipe = Recipe(stage_1=None, stage_2=None, stage_3=replace(stage, interpolation=kept))
            run(model, recipe, toy(48, seed=1), tmp_path / str(kept))
            ended[kept] = weights(model)

        for name, weight in before.items():
            there = ended[1.0][name]
            torch.testing.assert_close(
                ended[share][name], (1 - share) * weight + share * there, rtol=0, atol=1e-6
            )
        assert not torch.equal(
            ended[1.0]["final_classifier.classifier.weight"], before["final_classifier.classifier.weight"]
        )

    def test_born_again_it_says_what_it_said_whatever_the_labels_say(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        model, data = tiny_model(num_layers=2), toy(300, seed=1)
        run(model, TWO_STAGE, data, tmp_path / "before")
        knows = accuracies(model, toy(200, seed=2))[-1]
        scrambled = LabelledSequences(tokens=data.tokens, labels=data.labels.roll(7))
        pure = BackboneStage(
            epochs=4,
            batch_size=16,
            learning_rate=2e-3,
            objective=Joint(self_distillation=Distillation(weight=1.0)),
            teacher=BornAgain(weight=1.0),
        )

        run(model, replace(OFF_RAMPS, stage_2=None, stage_3=pure), scrambled, tmp_path / "after")

        assert min(accuracies(model, toy(200, seed=2))) > knows - 0.1 > 0.7

    def test_every_stage_computes_in_the_precision_asked_for(
        self, tiny_model: ModelFactory, run: Run
    ) -> None:
        model, seen = tiny_model(num_layers=2), []
        product = model.backbone.encoder.layer[0].intermediate.dense
        product.register_forward_hook(lambda module, x, out: seen.append(out.dtype))
        stages = replace(THREE_STAGES, precision="bfloat16", stage_2=replace(QUICK_2, mode="exact"))

        report = run(model, stages)

        # The second runs the backbone too, and the third answers once with packed weights, which no hook sees.
        assert len(report.stages) == 3
        assert set(seen) == {torch.bfloat16}

    def test_there_is_none_without_off_ramps(self, tiny_model: ModelFactory, run: Run) -> None:
        report = run(tiny_model(num_layers=2, off_ramp_layers=[]), THREE_STAGES)

        assert [stage.number for stage in report.stages] == [1]


class _PowerCutError(Exception):
    pass


class _CutAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise _PowerCutError


STAGES = {
    "joint": replace(JOINT_DISTILLED, checkpoint_steps=4),
    "joint, two learning rates": replace(
        JOINT, stage_1=replace(QUICK_1, objective=Joint(off_ramp_learning_rate=5e-3)), checkpoint_steps=4
    ),
    "two-stage": replace(TWO_STAGE, checkpoint_steps=4),
    "accumulating": replace(
        JOINT, stage_1=replace(QUICK_1, objective=Joint(), accumulation_steps=2), checkpoint_steps=4
    ),
    "alternating": replace(RECIPES["alternating"], checkpoint_steps=5),
    "exact": replace(EXACT, checkpoint_steps=4),
    "stage 3": replace(THREE_STAGES, stage_1=None, checkpoint_steps=4),
    "stage 3, half of it": replace(
        THREE_STAGES,
        stage_1=None,
        stage_3=replace(QUICK_1, objective=Joint(), interpolation=0.5),
        checkpoint_steps=4,
    ),
    "200 steps": replace(
        JOINT, stage_1=replace(QUICK_1, objective=Joint(), batch_size=2), checkpoint_steps=33
    ),
    "stopping early": replace(JOINT, early_stopping=EarlyStopping(held_out=0.2, patience=2, every_steps=4)),
}


class TestResume:
    """A training cut short and resumed is the training undisturbed, dropout, row order and all."""

    @pytest.mark.parametrize(
        ("name", "cut"),
        [
            ("joint", 2),  # before the first checkpoint
            ("joint", 6),  # within an epoch
            ("joint", 9),  # the checkpoint lies in a later epoch
            ("joint", 28),  # at the end
            ("joint, two learning rates", 6),
            ("two-stage", 9),
            ("accumulating", 10),
            ("alternating", 8),
            ("exact", 9),
            ("stage 3", 9),
            ("stage 3, half of it", 9),
            ("200 steps", 36),  # a record every second step, and one at the checkpoint between two
            ("stopping early", 10),
        ],
    )
    def test_is_exact(
        self,
        name: str,
        cut: int,
        tiny_model: ModelFactory,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        recipe, data = STAGES[name], toy(100, seed=1)
        whole, halves = tiny_model(num_layers=2), tiny_model(num_layers=2)
        undisturbed = run(whole, recipe, data, tmp_path / "whole")

        with monkeypatch.context() as patch:
            add_to_every_trainer(patch, _CutAt(cut))
            with pytest.raises(_PowerCutError):
                run(halves, recipe, data, tmp_path / "halves", resume=True)
        fresh = tiny_model(num_layers=2)
        resumed = run(fresh, recipe, data, tmp_path / "halves", resume=True)

        assert not changed(weights(whole), fresh)
        assert [s.loss for s in resumed.stages] == [s.loss for s in undisturbed.stages]
        assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")

    def test_patience_outlives_a_kill(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        noise = replace(
            toy(60, seed=1), labels=toy(60, seed=2).labels
        )  # nothing to learn: the loss will rise
        stage = replace(QUICK_1, objective=Joint(), epochs=50)
        stopping = EarlyStopping(held_out=0.3, patience=3, every_steps=3)
        recipe = replace(JOINT, stage_1=stage, early_stopping=stopping)
        undisturbed = run(tiny_model(num_layers=2), recipe, noise, tmp_path / "whole")

        with monkeypatch.context() as patch:
            # One evaluation before the end: the checkpoint has lost patience twice.
            add_to_every_trainer(patch, _CutAt(undisturbed.stages[0].steps - 1))
            with pytest.raises(_PowerCutError):
                run(tiny_model(num_layers=2), recipe, noise, tmp_path / "halves", resume=True)
        resumed = run(tiny_model(num_layers=2), recipe, noise, tmp_path / "halves", resume=True)

        assert undisturbed.stages[0].steps < 150
        assert resumed.stages[0].steps == undisturbed.stages[0].steps
        assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")

    def test_a_finished_stage_is_not_trained_again(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        first = run(model := tiny_model(num_layers=2), TWO_STAGE)
        (tmp_path / "stage-2.safetensors").unlink()
        before = (tmp_path / "stage-1.safetensors").stat().st_mtime_ns

        second = run(again := tiny_model(num_layers=2), TWO_STAGE, resume=True)

        assert second.stages[0] == first.stages[0]
        assert (tmp_path / "stage-1.safetensors").stat().st_mtime_ns == before
        assert not changed(weights(model), again)

    def test_a_checkpoint_that_a_kill_cut_short_does_not_count(self, tmp_path: Path) -> None:
        for step, state in ((4, '{"global_step": 4}'), (8, '{"global'), (12, None)):
            (tmp_path / f"checkpoint-{step}").mkdir()
            if state is not None:
                (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)

        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    def test_a_finished_training_says_again_what_it_took(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        first, log = run(tiny_model(num_layers=2), TWO_STAGE), (tmp_path / LOG_NAME).read_text()

        second = run(tiny_model(num_layers=2), TWO_STAGE, resume=True)

        assert second == first
        assert (tmp_path / LOG_NAME).read_text() == log

    def test_the_latest_whole_checkpoint_counts(self, tmp_path: Path) -> None:
        # Stopping early keeps the best one too.
        for step in (4, 12, 8):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")

        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"

    @pytest.mark.parametrize(
        ("recipe", "last"),  # of 12 steps
        [
            (replace(JOINT, checkpoint_steps=1000), 0),
            (replace(JOINT, checkpoint_steps=4), 8),  # at the end the weights themselves are what is kept
            (replace(JOINT, early_stopping=EarlyStopping(held_out=0.25, every_steps=5)), 12),
        ],
        ids=["no checkpoint", "one before the end", "one at the end"],
    )
    def test_a_stage_killed_before_its_weights_were_written_ends_once(
        self,
        recipe: Recipe,
        last: int,
        tiny_model: ModelFactory,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def cut(*args: object) -> None:
            raise _PowerCutError

        run(whole := tiny_model(num_layers=2), recipe, None, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(recipes_module, "_save", cut)
            with pytest.raises(_PowerCutError):
                run(tiny_model(num_layers=2), recipe, None, tmp_path / "halves")
        assert read_log(tmp_path / "halves" / LOG_NAME)[-1]["done"]
        assert step_of(last_checkpoint(tmp_path / "halves" / "stage-1")) == last

        run(again := tiny_model(num_layers=2), recipe, None, tmp_path / "halves", resume=True)

        assert not changed(weights(whole), again)
        assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")

    def test_its_seconds_are_of_all_attempts(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = replace(JOINT, checkpoint_steps=4)
        with monkeypatch.context() as patch:
            add_to_every_trainer(patch, _CutAt(6))
            with pytest.raises(_PowerCutError):
                run(tiny_model(num_layers=2), recipe)
        log = tmp_path / LOG_NAME
        records = [{**r, "seconds": 1000.0 * r["step"]} for r in read_log(log)]  # as if it had taken hours
        log.write_text("".join(json.dumps(r) + "\n" for r in records))

        report = run(tiny_model(num_layers=2), recipe, resume=True)

        # Steps 5 and 6 came after the checkpoint and are done again.
        assert 4000 < report.stages[0].seconds < 5000
        seconds = [r["seconds"] for r in read_log(log)]
        assert seconds[:4] == [1000.0, 2000.0, 3000.0, 4000.0]
        assert seconds == sorted(seconds)
        assert seconds[4] > 4000

    def test_without_it_what_is_there_is_begun_again(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        run(first := tiny_model(num_layers=2), TWO_STAGE)
        log = timeless(tmp_path)
        run(second := tiny_model(num_layers=2), TWO_STAGE)

        assert not changed(weights(first), second)
        assert timeless(tmp_path) == log

    def test_with_nothing_there_it_begins(self, tiny_model: ModelFactory, run: Run, tmp_path: Path) -> None:
        assert not unfinished(tmp_path)
        report = run(tiny_model(num_layers=2), JOINT, resume=True)
        assert len(report.stages) == 1
        assert unfinished(tmp_path)

    def test_another_recipe_is_refused_with_the_difference_named(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        run(tiny_model(num_layers=2), JOINT)

        other = replace(JOINT, stage_1=replace(JOINT.stage_1, learning_rate=1e-3))
        with pytest.raises(RecipeError) as refused:
            run(tiny_model(num_layers=2), other, resume=True)

        assert str(refused.value) == (
            f"the training begun in '{tmp_path}' had another recipe.stage_1.learning_rate (0.002, now 0.001): resume "
            "with what it was begun with, or begin again in another folder"
        )

    def test_other_data_or_another_model_is_refused(self, tiny_model: ModelFactory, run: Run) -> None:
        run(tiny_model(num_layers=2), JOINT)

        with pytest.raises(RecipeError, match="had another data "):
            run(tiny_model(num_layers=2), JOINT, toy(48, seed=9), resume=True)
        with pytest.raises(RecipeError, match="had another model "):
            run(tiny_model(num_layers=2, seed=1), JOINT, resume=True)


def add_to_every_trainer(patch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    original = trainer_module._StageTrainer.__init__

    def init(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs)
        self.add_callback(callback)

    patch.setattr(trainer_module._StageTrainer, "__init__", init)


def timeless(work_dir: Path) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_log(work_dir / LOG_NAME)]


def off_ramp_losses(model: DeeBertForSequenceClassification, data: LabelledSequences) -> list[float]:
    with torch.no_grad():
        logits = model(*padded(data.tokens)).off_ramp_logits
    return [torch.nn.functional.cross_entropy(one, data.labels).item() for one in logits]


class TestEarlyStopping:
    def test_stops_once_the_held_out_loss_rises_and_keeps_the_best_weights(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        model, data = tiny_model(num_layers=2), toy(60, seed=1)
        noise = replace(data, labels=toy(60, seed=2).labels)  # nothing to learn
        stage = replace(QUICK_1, objective=Joint(), epochs=100)

        report = run(
            model,
            replace(
                JOINT, stage_1=stage, early_stopping=EarlyStopping(held_out=0.3, patience=2, every_steps=3)
            ),
            noise,
        )

        judged = [r for r in read_log(tmp_path / LOG_NAME) if "held_out_loss" in r]
        losses = [r["held_out_loss"] for r in judged]
        assert report.stages[0].steps < 300
        assert len(losses) == losses.index(min(losses)) + 1 + 2
        _, held = hold_out(noise, 0.3, seed=42)
        with torch.no_grad():
            said = model(*padded(held.tokens), labels=held.labels)
        best = judged[losses.index(min(losses))]
        assert said.loss.item() == pytest.approx(best["held_out_losses"]["2"], abs=1e-5)

    def test_a_stage_through_the_backbone_is_judged_at_its_last_step_too(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        data, model = toy(60, seed=1), tiny_model(num_layers=3)
        _, held = hold_out(data, 0.3, seed=42)
        stage = replace(QUICK_1, objective=Joint(), epochs=1)  # of 3 steps
        stopping = EarlyStopping(held_out=0.3, every_steps=2)

        run(model, replace(JOINT, stage_1=stage, early_stopping=stopping), data)

        judged = [r for r in read_log(tmp_path / LOG_NAME) if "held_out_loss" in r]
        assert [r["step"] for r in judged] == [2, 3]
        # There is much to learn: the last step is the best, and the one that is kept.
        assert judged[1]["held_out_loss"] < judged[0]["held_out_loss"]
        *last, _ = judged[1]["held_out_losses"].values()
        assert off_ramp_losses(model, held) == pytest.approx(last, abs=1e-4)

    def test_alternating_is_judged_by_the_whole_loss_at_every_step(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        stage = replace(QUICK_1, objective=Alternating(weighting="uniform"), epochs=1)
        stopping = EarlyStopping(held_out=0.3, every_steps=1)

        run(tiny_model(num_layers=3), replace(JOINT, stage_1=stage, early_stopping=stopping), toy(60, seed=1))

        judged = [r for r in read_log(tmp_path / LOG_NAME) if "held_out_loss" in r]
        assert [r["step"] for r in judged] == [1, 2, 3]
        for record in judged:
            assert set(record["held_out_losses"]) == {"1", "2", "3"}
            assert record["held_out_loss"] == pytest.approx(sum(record["held_out_losses"].values()), rel=1e-5)

    def test_a_fast_stage_2_keeps_each_off_ramps_best(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        data = toy(60, seed=1)
        noise = replace(data, labels=toy(60, seed=2).labels)
        _, held = hold_out(noise, 0.3, seed=42)
        stage = replace(QUICK_2, epochs=60, learning_rate=2e-2)
        stopping = EarlyStopping(held_out=0.3, patience=3)
        stopped = tiny_model()

        report = run(stopped, replace(OFF_RAMPS, stage_2=stage, early_stopping=stopping), noise)

        assert report.stages[0].steps < 60 * math.ceil(42 / 16)
        judged = [
            list(r["held_out_losses"].values()) for r in read_log(tmp_path / LOG_NAME) if "held_out_loss" in r
        ]
        lowest = [min(ramp) for ramp in zip(*judged, strict=True)]
        assert len({[j[i] for j in judged].index(low) for i, low in enumerate(lowest)}) > 1  # not all at once
        assert off_ramp_losses(stopped, held) == pytest.approx(lowest, abs=1e-4)

    @pytest.mark.parametrize(
        ("epochs", "judged_after"),
        [(0.7, [2]), (1, [3]), (1.7, [3, 5])],  # of 3 steps each
    )
    def test_a_fast_stage_2_is_judged_at_its_last_step_too(
        self, epochs: float, judged_after: list[int], tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        data, model = toy(60, seed=1), tiny_model(num_layers=3)
        _, held = hold_out(data, 0.3, seed=42)
        stage, stopping = replace(QUICK_2, epochs=epochs), EarlyStopping(held_out=0.3)
        before = off_ramp_losses(model, held)

        run(model, replace(OFF_RAMPS, stage_2=stage, early_stopping=stopping), data)

        judged = [r for r in read_log(tmp_path / LOG_NAME) if "held_out_loss" in r]
        assert [r["step"] for r in judged] == judged_after
        # There is much to learn: every step makes every off-ramp better, and the last ones count.
        last = list(judged[-1]["held_out_losses"].values())
        assert all(now < then for now, then in zip(last, before, strict=True))
        assert off_ramp_losses(model, held) == pytest.approx(last, abs=1e-4)

    def test_a_fast_stage_2_trains_with_dropout_and_is_judged_without(
        self, tiny_model: ModelFactory, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: set[tuple[bool, bool]] = set()
        forward = OffRampStack.forward

        def noting(self: OffRampStack, pooled: Tensor) -> Tensor:
            seen.add((torch.is_grad_enabled(), self.training))
            return forward(self, pooled)

        monkeypatch.setattr(OffRampStack, "forward", noting)
        run(tiny_model(num_layers=2), replace(OFF_RAMPS, early_stopping=EarlyStopping(held_out=0.3)))

        assert seen == {(True, True), (False, False)}

    def test_rows_held_out_are_a_share_that_nobody_trains_on(self) -> None:
        data = toy(50, seed=1)

        fit, held = hold_out(data, 0.2, seed=3)

        ids = [tuple(d.tokens.sequence(i).input_ids.tolist()) for d in (fit, held) for i in range(len(d))]
        assert (len(fit), len(held)) == (40, 10)
        assert sorted(ids) == sorted(tuple(data.tokens.sequence(i).input_ids.tolist()) for i in range(50))

    def test_which_rows_are_held_out_is_the_seeds(self) -> None:
        first, again, other = (hold_out(toy(50, seed=1), 0.2, seed)[1].tokens.input_ids for seed in (3, 3, 4))

        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_share_is_rounded_to_the_nearest_row(self) -> None:
        assert [len(hold_out(toy(10, seed=0), share, seed=0)[1]) for share in (0.14, 0.17, 0.29)] == [1, 2, 3]

    @pytest.mark.parametrize(("share", "held"), [(0.1, 0), (0.9, 4)])
    def test_too_few_rows_for_both_are_refused(self, share: float, held: int) -> None:
        said = f"a held-out share of {share} of 4 rows leaves {held} of them held out"
        with pytest.raises(DataError, match=said):
            hold_out(toy(4, seed=0), share, seed=0)


class TestRowOrder:
    def test_each_epoch_has_every_row_once_in_its_own_order(self) -> None:
        sampler = LengthGrouped(np.random.default_rng(0).integers(1, 50, 203), 8, seed=1)
        orders = []
        for epoch in (0, 1, 0):
            sampler.epoch = epoch
            orders.append(list(sampler))

        assert all(sorted(order) == list(range(203)) for order in orders)
        assert orders[0] == orders[2] != orders[1]

    def test_a_batch_that_is_not_full_comes_last(self) -> None:
        lengths = np.repeat([1, 2, 3, 4], [8, 8, 8, 3])

        order = lengths[list(LengthGrouped(lengths, 8, seed=1))]

        assert all(len(set(order[start : start + 8])) == 1 for start in (0, 8, 16))
        assert order[24:].tolist() == [4, 4, 4]

    def test_batches_have_like_lengths(self) -> None:
        lengths = np.random.default_rng(0).integers(1, 100, 2000)
        batches = lengths[list(LengthGrouped(lengths, 10, seed=1))].reshape(-1, 10)

        assert np.ptp(batches, axis=1).mean() < 0.1 * np.ptp(lengths.reshape(-1, 10), axis=1).mean()

    def test_long_and_short_batches_mix(self) -> None:
        lengths = np.random.default_rng(0).integers(1, 100, 2000)
        means = lengths[list(LengthGrouped(lengths, 10, seed=1))].reshape(-1, 10).mean(axis=1)

        # Neighbours are no more alike than strangers.
        assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


class TestLogAndReport:
    def test_each_record_has_place_losses_rate_and_time(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        report = run(tiny_model(num_layers=3), TWO_STAGE, toy(64, seed=0))

        records = read_log(tmp_path / LOG_NAME)
        first, second = ([r for r in records if r["stage"] == s] for s in (1, 2))
        assert set(first[0]) == {"stage", "step", "epoch", "loss", "losses", "learning_rate", "seconds"}
        assert [r["step"] for r in first[:-1]] == list(range(1, 17))
        assert (first[-2]["epoch"], second[-2]["epoch"]) == (4, 6)
        assert set(first[0]["losses"]) == {"3"}  # stage 1 of the paper trains the final classifier alone
        assert set(second[0]["losses"]) == {"1", "2"}
        assert first[-1] == {
            "stage": 1, "done": True, "step": 16, "loss": report.stages[0].loss, "seconds": report.stages[0].seconds
        }  # fmt: skip
        assert [r["seconds"] for r in first] == sorted(r["seconds"] for r in first)

    def test_a_long_stage_has_a_hundred_records(
        self, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        stage = replace(QUICK_1, objective=Joint(), batch_size=1, epochs=20)

        run(tiny_model(num_layers=2), replace(JOINT, stage_1=stage), toy(10, seed=0))

        steps = [r["step"] for r in read_log(tmp_path / LOG_NAME) if "losses" in r]
        assert steps == list(range(2, 201, 2))

    def test_the_report_states_stage_2s_share(self) -> None:
        from deebert.training import StageReport

        stages = tuple(
            StageReport(number=i, seconds=s, steps=1, loss=0.0) for i, s in ((1, 200.0), (2, 30.0))
        )

        assert str(TrainingReport(stages=stages)) == "stage 1 took 200 s; stage 2 took 30 s, 15 % of stage 1"

    def test_a_line_cut_short_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / LOG_NAME
        path.write_text(json.dumps({"stage": 1, "step": 1}) + '\n{"stage": 1, "st')

        assert read_log(path) == [{"stage": 1, "step": 1}]


class Terminal(io.StringIO):
    """Where bars are drawn."""

    def isatty(self) -> bool:
        return True


class TestWhatIsShown:
    def shown(
        self, recipe: Recipe, model: Any, tokenizer: Any, work_dir: Path, *, resume: bool = False
    ) -> None:
        train(model, tokenizer, toy(48, seed=0), recipe, work_dir, resume=resume, show_progress=True)

    def test_a_log_has_a_line_for_each_tenth_with_the_loss(
        self,
        tiny_model: ModelFactory,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        stage = replace(QUICK_1, objective=Joint(), epochs=5)

        with caplog.at_level("INFO", "deebert.training.callbacks"):
            self.shown(replace(JOINT, stage_1=stage), tiny_model(num_layers=2), tokenizer, tmp_path)

        losses = {r["step"]: r["loss"] for r in read_log(tmp_path / LOG_NAME) if "losses" in r}
        assert len(losses) == 15
        assert [m for m in caplog.messages if m.startswith("stage")] == [
            f"stage 1: step {step} of 15, loss {losses[step]:.3f}"
            for step in (2, 3, 5, 6, 8, 9, 11, 12, 14, 15)
        ]

    def test_a_terminal_has_a_bar_that_goes_on_where_the_stage_does(
        self,
        tiny_model: ModelFactory,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        recipe, bars = replace(JOINT, checkpoint_steps=4), []
        for cut in (6, None):
            monkeypatch.setattr(sys, "stderr", terminal := Terminal())
            with monkeypatch.context() as patch:
                if cut is not None:
                    add_to_every_trainer(patch, _CutAt(cut))
                with contextlib.suppress(_PowerCutError):
                    self.shown(recipe, tiny_model(num_layers=2), tokenizer, tmp_path, resume=True)
            bars.append([text for text in terminal.getvalue().split("\r") if "stage 1" in text])

        (cut_short, resumed), last = bars, read_log(tmp_path / LOG_NAME)[-2]
        assert "| 0/12 [" in cut_short[0]
        assert "| 4/12 [" in resumed[0]
        assert "| 12/12 [" in resumed[-1]
        assert f"loss={last['loss']:.3f}]" in resumed[-1]


class TestData:
    def test_no_rows_are_refused(self) -> None:
        nothing = LabelledSequences(tokens=PackedTokens.pack([]), labels=torch.tensor([], dtype=torch.long))

        with pytest.raises(DataError, match="the training data has no rows: give a file with at least one"):
            check_labels(nothing, 2)

    @pytest.mark.parametrize(("labels", "low", "high"), [([0, 3], 0, 3), ([-1, 2], -1, 2), ([7, 7], 7, 7)])
    def test_labels_that_the_model_does_not_have_are_refused_before_training(
        self, tiny_model: ModelFactory, run: Run, labels: list[int], low: int, high: int
    ) -> None:
        model = tiny_model()
        before = weights(model)
        data = LabelledSequences(tokens=PackedTokens.pack([[2, 3], [2, 3]]), labels=torch.tensor(labels))

        with pytest.raises(DataError, match=f"the labels run from {low} to {high} but the model has 3"):
            run(model, TWO_STAGE, data)
        assert not changed(before, model)

    def test_a_row_is_its_texts_ids_token_types_label_and_target(self) -> None:
        tokens = PackedTokens.pack([[2, 7, 3], [2, 8, 3, 9, 3]], [[0, 0, 0], [0, 0, 0, 1, 1]])
        data = LabelledSequences(tokens=tokens, labels=torch.tensor([2, 0]))

        rows = Rows(data, torch.tensor([[0.5, 0.25, 0.0], [1.0, 2.0, 3.0]]))

        assert (len(rows), rows.lengths.tolist()) == (2, [3, 5])
        assert rows[1] == {
            "input_ids": [2, 8, 3, 9, 3],
            "token_type_ids": [0, 0, 0, 1, 1],
            "labels": 0,
            "target_logits": [1.0, 2.0, 3.0],
        }
        assert Rows(toy(1, seed=0))[0].keys() == {"input_ids", "labels"}

    def test_labels_within_the_model_are_accepted(self) -> None:
        check_labels(toy(20, seed=0), 3)
