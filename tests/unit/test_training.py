"""Training by recipe: what each stage may touch, that it learns, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

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
    Interpolation,
    Joint,
    Recipe,
    Teacher,
    TrainingReport,
    check_labels,
    read_log,
    train,
)
from deebert.training.cached_stage import OffRampStack
from deebert.training.data import LengthGrouped, Rows
from deebert.training.frozen import collect_answers, final_logits
from deebert.training.log import TrainingLog
from deebert.training.optimizer import scheduled_adamw
from deebert.training.stage import StageContext
from deebert.training.trainer import frozen
from tests.conftest import ModelFactory
from tests.training_toy import (
    EXACT,
    JOINT,
    OFF_RAMPS,
    QUICK_1,
    QUICK_2,
    RECIPES,
    THREE_STAGES,
    TWO_STAGE,
    Run,
    accuracies,
    changed,
    padded,
    toy,
    weights,
    without_dropout,
)


def names(model: DeeBertForSequenceClassification, *prefixes: str) -> set[str]:
    return {name for name in model.state_dict() if name.startswith(prefixes)}


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

    def test_padding_comes_after_the_text_whatever_side_the_tokenizer_pads(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        models, stage = [tiny_model("bert", "cls") for _ in range(2)], replace(QUICK_1, epochs=1)

        for side, model in zip(("right", "left"), models, strict=True):
            sided = copy.deepcopy(tokenizer)
            sided.padding_side = side
            recipe = replace(TWO_STAGE, stage_1=stage)
            train(model, sided, toy(32, seed=0), recipe, tmp_path / side, show_progress=False)
            assert sided.padding_side == side

        assert not changed(weights(models[0]), models[1])

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


def test_the_optimizer_of_cached_states_has_what_the_stage_says(
    model: DeeBertForSequenceClassification,
) -> None:
    stage = replace(QUICK_2, weight_decay=0.3, adam_epsilon=1e-5, warmup_share=0.5)
    stack = OffRampStack(model)

    optimizer, _ = scheduled_adamw(stack, stage, 1e-3, 10)

    decaying, others = optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in decaying["params"]} == {id(stack.dense), id(stack.classifier)}
    assert {id(p) for p in others["params"]} == {id(stack.dense_bias), id(stack.classifier_bias)}
    assert [(g["eps"], g["initial_lr"]) for g in (decaying, others)] == [(1e-5, 1e-3)] * 2


def test_a_fast_stage_decays_what_an_exact_one_does(
    tiny_model: ModelFactory, run: Run, tmp_path: Path
) -> None:
    ended = []
    for mode in ("fast", "exact"):
        model = without_dropout(tiny_model(num_layers=2))
        with torch.no_grad():
            model.off_ramps[0].dense.bias.fill_(1.0)  # type: ignore[union-attr]
        stage = replace(QUICK_2, mode=mode, epochs=3, batch_size=48, learning_rate=1e-3, weight_decay=100.0)
        run(model, replace(OFF_RAMPS, stage_2=stage), work_dir=tmp_path / mode)
        ended.append(weights(model))

    for name in names(model, "off_ramps."):
        torch.testing.assert_close(ended[0][name], ended[1][name], atol=1e-4, rtol=1e-3, msg=name)


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
        # States are of order 1; those of six seeds err by 0.010 to 0.021, with our kernels and without.
        assert (half.states.float() - whole.states).abs().mean() < 0.05
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

    @pytest.mark.parametrize("shared_pooler", [False, True])
    def test_keeps_of_each_layer_the_share_of_its_change_that_is_asked_for(
        self, shared_pooler: bool, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        stage, ended = replace(QUICK_1, objective=Joint()), {}

        def begin() -> DeeBertForSequenceClassification:
            layers = {"num_layers": 3, "off_ramp_layers": [0, 1, 2]}
            return tiny_model(**layers, shares_off_ramp_pooler=shared_pooler, learns_to_exit=True)

        before = weights(begin())
        graded = Interpolation(first=0.75, last=0.25)
        for name, kept in (("all", None), ("part", graded)):
            recipe = Recipe(stage_1=None, stage_2=None, stage_3=replace(stage, interpolation=kept))
            run(model := begin(), recipe, toy(48, seed=1), tmp_path / name)
            ended[name] = weights(model)

        shares = {
            "backbone.embeddings.": 0.75,
            "backbone.encoder.layer.0.": 0.75,
            "backbone.encoder.layer.1.": 0.5,
            "backbone.encoder.layer.2.": 0.25,
            "off_ramps.0.": 0.75,  # on the embeddings
            "off_ramps.1.": 0.75,
            "off_ramps.2.": 0.5,
            "off_ramp_pooler.": 0.5,
            "final_classifier.": 0.25,
            "exit_head.": 1.0,
        }
        for name, weight in before.items():
            (share,) = (share for start, share in shares.items() if name.startswith(start))
            there = ended["all"][name]
            between = (1 - share) * weight + share * there
            torch.testing.assert_close(ended["part"][name], between, rtol=0, atol=1e-6, msg=name)
        names = {n for n in before if not torch.equal(before[n], ended["all"][n])}
        unmoved = {start for start in shares if not any(n.startswith(start) for n in names)}
        assert unmoved == (set() if shared_pooler else {"off_ramp_pooler."})

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


class TestDivergence:
    """A training that has left the numbers ends in a sentence, before it spends hours or is saved."""

    @pytest.mark.parametrize("stopping", [None, EarlyStopping(held_out=0.25, every_steps=1)])
    @pytest.mark.parametrize("name", ["two-stage", "joint", "exact", "fast"])
    def test_a_loss_that_is_not_finite_ends_it(
        self, name: str, stopping: EarlyStopping | None, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        recipe = {"two-stage": TWO_STAGE, "joint": JOINT, "exact": EXACT, "fast": OFF_RAMPS}[name]
        stages = {f"stage_{number}": replace(s, learning_rate=1e39) for number, s in recipe.stages.items()}
        recipe = replace(recipe, **stages, early_stopping=stopping)  # type: ignore[arg-type]

        with pytest.raises(RecipeError) as refused:
            run(tiny_model(num_layers=2), recipe, toy(200, seed=1))

        number = min(recipe.stages)
        told = rf"stage {number} diverged, its (held out )?loss is (nan|inf) at step [12]: begin again with a smaller "
        assert re.fullmatch(told + "learning rate", str(refused.value))
        assert not (tmp_path / f"stage-{number}.safetensors").exists()
        assert not any("done" in record for record in read_log(tmp_path / LOG_NAME))

    @pytest.mark.parametrize("recipe", [JOINT, OFF_RAMPS, EXACT], ids=["joint", "fast", "exact"])
    def test_weights_that_are_not_finite_are_not_kept(
        self, recipe: Recipe, tiny_model: ModelFactory, run: Run, tmp_path: Path
    ) -> None:
        stages = {f"stage_{n}": replace(s, learning_rate=1e39, epochs=1) for n, s in recipe.stages.items()}

        with pytest.raises(
            RecipeError, match=r"^stage \d diverged, its weights are not finite at step 1: begin"
        ):
            run(tiny_model(num_layers=2), replace(recipe, **stages), toy(16, seed=0))  # type: ignore[arg-type]

        assert not list(tmp_path.glob("*.safetensors"))

    def test_float16_has_one_remedy_more(self, tmp_path: Path) -> None:
        context = StageContext(
            number=1,
            recipe=replace(JOINT, precision="float16"),
            work_dir=tmp_path,
            log=TrainingLog(None),
            log_path=tmp_path / LOG_NAME,
            resume=False,
            show_progress=False,
        )

        with pytest.raises(RecipeError, match=r"learning rate, or bfloat16 or float32 instead of float16$"):
            context.write(step=1, loss=float("nan"))


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
