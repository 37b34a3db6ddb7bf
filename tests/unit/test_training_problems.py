"""Regressions, multi-label models and learning-to-exit heads train, by every kind of stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deebert.encoder import PackedEncoder
from deebert.errors import DataError, RecipeError
from deebert.evaluation import LabelledSequences, off_ramp_scores, trace
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.problem import SINGLE_LABEL
from deebert.training import (
    LOG_NAME,
    Alternating,
    BackboneStage,
    Distillation,
    EarlyStopping,
    Joint,
    OffRampStage,
    Recipe,
    Teacher,
    check_labels,
    read_log,
    train,
)
from deebert.training.cached_exit_head import CachedExitHead
from tests.conftest import ModelFactory
from tests.training_toy import MARKED, QUICK_1, QUICK_2, changed, toy, weights, without_dropout

DISTILLED = Distillation(weight=0.5, temperature=2.0)
NOISE = 95
"""Token id: the label of a text that holds it is drawn at random."""
EXACT = OffRampStage(mode="exact", epochs=4, batch_size=16, learning_rate=5e-3)
RECIPES = {
    "fast": Recipe(stage_1=QUICK_1, stage_2=replace(QUICK_2, self_distillation=DISTILLED)),
    "exact": Recipe(stage_1=QUICK_1, stage_2=replace(EXACT, self_distillation=DISTILLED)),
    "joint": Recipe(
        stage_1=replace(QUICK_1, objective=Joint(weighting="uniform", self_distillation=DISTILLED)),
        stage_2=None,
    ),
}


def marked_sets(num_rows: int, seed: int) -> LabelledSequences:
    """Each of three labels holds where its token is in the text."""
    texts = toy(num_rows, seed).tokens
    labels = torch.stack(
        [torch.tensor([m in texts.sequence(i).input_ids for m in MARKED]) for i in range(num_rows)]
    )
    generator = torch.Generator().manual_seed(seed)
    more = torch.rand(num_rows, 3, generator=generator) < 0.4
    rows = []
    for i in range(num_rows):
        extra = [m for m, wanted in zip(MARKED, more[i].tolist(), strict=True) if wanted]
        rows.append([*texts.sequence(i).input_ids.tolist()[:-1], *extra, 3])
    return LabelledSequences(tokens=PackedTokens.pack(rows), labels=(labels | more).float())


def numbers(num_rows: int, seed: int) -> LabelledSequences:
    """The label's place is the number: 0, 1 or 2."""
    data = toy(num_rows, seed)
    return LabelledSequences(tokens=data.tokens, labels=data.labels.float())


def half_noise(num_rows: int, seed: int) -> tuple[LabelledSequences, Tensor]:
    """The toy, and which texts hold `NOISE`: about half, whose labels say nothing."""
    data = toy(num_rows, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    noisy = torch.rand(num_rows, generator=generator) < 0.5
    rows = [
        [2, *([NOISE] * 3 if noisy[i] else []), *data.tokens.sequence(i).input_ids.tolist()[1:]]
        for i in range(num_rows)
    ]
    labels = torch.where(noisy, torch.randint(0, 3, (num_rows,), generator=generator), data.labels)
    return LabelledSequences(tokens=PackedTokens.pack(rows), labels=labels), noisy


def run(
    model: DeeBertForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    data: LabelledSequences,
    recipe: Recipe,
    work_dir: Path,
    **options: Any,
) -> None:
    train(model, tokenizer, data, recipe, work_dir, show_progress=False, **options)


def by_layer(work_dir: Path, stage: int) -> tuple[dict[str, float], dict[str, float]]:
    """Each classifier's first and last logged loss."""
    records = [r for r in read_log(work_dir / LOG_NAME) if r["stage"] == stage and "losses" in r]
    return records[0]["losses"], records[-1]["losses"]


class TestProblems:
    @pytest.mark.parametrize("name", RECIPES)
    def test_a_multi_label_model_learns(
        self, name: str, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, problem_type="multi_label_classification")

        run(model, tokenizer, marked_sets(400, seed=1), RECIPES[name], tmp_path)

        first, last = by_layer(tmp_path, 1)
        assert all(last[layer] < 0.6 * first[layer] for layer in last)
        held_out = marked_sets(200, seed=2)
        exact = off_ramp_scores(trace(PackedEncoder.of(model), held_out.tokens), held_out.labels)
        assert min(exact) > 0.5  # of 8 possible sets

    @pytest.mark.parametrize("name", RECIPES)
    def test_a_regression_learns(
        self, name: str, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, num_labels=1, problem_type="regression", learns_to_exit=True)

        run(model, tokenizer, numbers(300, seed=1), RECIPES[name], tmp_path)

        held_out = numbers(200, seed=2)
        traced = trace(PackedEncoder.of(model), held_out.tokens)
        errors = (traced.logits[..., 0] - held_out.labels).square().mean(1)
        assert (errors < 0.5 * held_out.labels.var()).all()

    @pytest.mark.parametrize("pieces", [1, 4])
    def test_a_multi_label_step_is_a_mean_over_samples(
        self, pieces: int, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, problem_type="multi_label_classification")
        stage = replace(QUICK_1, objective=Joint(), batch_size=32, epochs=1, accumulation_steps=pieces)

        run(model, tokenizer, marked_sets(32, seed=1), Recipe(stage_1=stage, stage_2=None), tmp_path)

        first = read_log(tmp_path / LOG_NAME)[0]
        weighted = [w * first["losses"][layer] for layer, w in (("1", 1 / 3), ("2", 2 / 3), ("3", 1.0))]
        assert first["loss"] == pytest.approx(sum(weighted), rel=1e-5)

    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_a_number_that_the_trainer_would_ignore_counts_like_any_other(
        self, share: float, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        data = numbers(40, seed=1)
        chosen = torch.rand(40, generator=torch.Generator().manual_seed(2)) < share
        labels = data.labels.masked_fill(chosen, -100.0)
        stage = replace(QUICK_1, objective=Joint(), accumulation_steps=2, epochs=2)
        losses = {}

        # The same problem with all numbers one higher: what the model says is one higher to begin with.
        for more in (0.0, 1.0):
            model = tiny_model(num_layers=3, num_labels=1, problem_type="regression", learns_to_exit=True)
            with torch.no_grad():
                for ramp in (*model.off_ramps, model.final_classifier):
                    ramp.classifier.bias += more
            rows, work_dir = replace(data, labels=labels + more), tmp_path / str(more)
            run(model, tokenizer, rows, Recipe(stage_1=stage, stage_2=None), work_dir)
            assert all(p.isfinite().all() for p in model.parameters())
            losses[more] = [r["loss"] for r in read_log(work_dir / LOG_NAME)]

        assert losses[0.0] == pytest.approx(losses[1.0], rel=1e-3)

    def test_a_teacher_of_another_problem_is_refused(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        tiny_model().save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        model = tiny_model(problem_type="multi_label_classification")
        recipe = Recipe(stage_1=replace(QUICK_1, teacher=Teacher(folder=str(tmp_path / "teacher"))))

        with pytest.raises(RecipeError, match="has other labels, another problem type or another vocabulary"):
            run(model, tokenizer, marked_sets(20, seed=1), recipe, tmp_path / "work")

    def test_labels_of_another_problem_are_refused(self) -> None:
        from deebert.problem import MULTI_LABEL

        with pytest.raises(DataError, match="does not say yes or no to each of the model's 3 labels"):
            check_labels(toy(10, seed=0), 3, MULTI_LABEL)


class TestLearningToExit:
    JOINT = replace(QUICK_1, epochs=8, exit_head_learning_rate=2e-2)
    RECIPES = {  # noqa: RUF012
        "fast": Recipe(stage_1=QUICK_1, stage_2=replace(QUICK_2, epochs=40, exit_head_learning_rate=1e-2)),
        "exact": Recipe(stage_1=QUICK_1, stage_2=replace(EXACT, epochs=6, exit_head_learning_rate=2e-2)),
        "joint": Recipe(stage_1=replace(JOINT, objective=Joint(weighting="uniform")), stage_2=None),
        "alternating": Recipe(
            stage_1=replace(JOINT, epochs=16, objective=Alternating(weighting="uniform")), stage_2=None
        ),
    }

    @pytest.mark.parametrize("name", RECIPES)
    def test_answers_that_are_mostly_wrong_are_less_certain(
        self, name: str, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3)
        model.learn_to_exit()
        data, _ = half_noise(400, seed=1)

        run(model, tokenizer, data, self.RECIPES[name], tmp_path)

        held_out, noisy = half_noise(200, seed=3)
        certainties = trace(PackedEncoder.of(model), held_out.tokens).certainties
        assert certainties is not None
        assert (certainties[:, ~noisy].mean(1) > certainties[:, noisy].mean(1) + 0.04).all()

    @pytest.mark.parametrize("recipe", ["joint", "exact", "fast"])
    def test_its_learning_rate_is_its_own(
        self, recipe: str, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, learns_to_exit=True)
        before = weights(model)
        once: dict[str, Any] = {"epochs": 1, "batch_size": 16, "exit_head_learning_rate": 1e-2}
        joint = BackboneStage(objective=Joint(off_ramp_learning_rate=1e-3), learning_rate=1e-5, **once)
        recipes = {
            "joint": Recipe(stage_1=joint, stage_2=None),
            "exact": Recipe(stage_1=None, stage_2=OffRampStage(mode="exact", learning_rate=1e-3, **once)),
            "fast": Recipe(stage_1=None, stage_2=OffRampStage(mode="fast", learning_rate=1e-3, **once)),
        }

        run(model, tokenizer, toy(16, seed=1), recipes[recipe], tmp_path)  # one batch, one step

        # Adam's first step is the learning rate, whatever the gradient.
        steps = {
            name: (value - before[name]).abs().max().item() for name, value in model.state_dict().items()
        }
        assert steps["exit_head.linear.weight"] == pytest.approx(1e-2, rel=1e-2)
        assert steps["off_ramps.0.dense.weight"] == pytest.approx(1e-3, rel=1e-2)

    def test_a_fast_stage_trains_off_ramps_to_the_bit_as_without_a_head(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        with_head, without = tiny_model(num_layers=3, learns_to_exit=True), tiny_model(num_layers=3)
        without.load_state_dict(with_head.state_dict(), strict=False)
        recipe = Recipe(stage_1=None, stage_2=replace(QUICK_2, self_distillation=DISTILLED))
        before = weights(with_head)

        for name, model in (("with", with_head), ("without", without)):
            run(model, tokenizer, toy(60, seed=1), recipe, tmp_path / name)

        assert all(torch.equal(value, with_head.state_dict()[n]) for n, value in without.state_dict().items())
        moved = changed(before, with_head)
        assert {n for n in moved if not n.startswith("off_ramps.")} == {
            "exit_head.linear.weight",
            "exit_head.linear.bias",
        }

    @pytest.mark.parametrize("mode", ["fast", "exact"])
    def test_of_large_numbers_it_learns_as_of_small_ones(
        self, mode: Any, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        data, certainties = numbers(48, seed=1), []
        once: dict[str, Any] = {"epochs": 20, "batch_size": 48, "learning_rate": 1e-30, "max_grad_norm": 1e9}
        recipe = Recipe(stage_1=None, stage_2=OffRampStage(mode=mode, exit_head_learning_rate=1e-2, **once))

        for unit in (1.0, 100.0):  # what the model says is as much larger
            model = tiny_model(num_layers=3, num_labels=1, problem_type="regression", learns_to_exit=True)
            with torch.no_grad():
                for ramp in (*model.off_ramps, model.final_classifier):
                    ramp.classifier.weight *= unit
                    ramp.classifier.bias *= unit
            rows = replace(data, labels=data.labels * unit)
            run(without_dropout(model), tokenizer, rows, recipe, tmp_path / str(unit))
            certainties.append(trace(PackedEncoder.of(model), data.tokens).certainties)

        torch.testing.assert_close(certainties[0], certainties[1], atol=2e-3, rtol=0)

    def test_stage_1_of_the_final_loss_alone_leaves_the_head(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, learns_to_exit=True)
        seen: dict[str, Tensor] = {}
        before = weights(model)
        recipe = Recipe(
            stage_1=QUICK_1,
            stage_2=replace(QUICK_2, epochs=0.01, learning_rate=1e-9, exit_head_learning_rate=1e-9),
        )

        run(model, tokenizer, toy(48, seed=1), recipe, tmp_path)

        seen = model.state_dict()
        for name in ("exit_head.linear.weight", "off_ramps.0.classifier.weight"):
            torch.testing.assert_close(seen[name], before[name], atol=1e-7, rtol=0)

    def test_its_loss_is_logged_and_falls(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, learns_to_exit=True)
        recipe = Recipe(stage_1=QUICK_1, stage_2=QUICK_2, early_stopping=EarlyStopping(held_out=0.2))

        run(model, tokenizer, toy(200, seed=1), recipe, tmp_path)

        records = [r for r in read_log(tmp_path / LOG_NAME) if "certainty_loss" in r]
        assert records[-1]["certainty_loss"] < 0.5 * records[0]["certainty_loss"]


class TestCachedExitHead:
    """Its optimizer's side of a fast stage, step by step, on states that stay the same."""

    POOLED = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    LOGITS = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(1))
    LABELS = torch.arange(8) % 3

    def moves(
        self, model: DeeBertForSequenceClassification, stage: OffRampStage, *shares: float
    ) -> list[float]:
        """How far each step moves the head, of as many as the stage has."""
        head = model.exit_head
        assert head is not None
        cached, found = CachedExitHead(head, SINGLE_LABEL, stage, len(shares)), []
        for share in shares:
            before = torch.cat([p.detach().flatten().clone() for p in head.parameters()])
            cached.step(self.POOLED, self.LOGITS, self.LABELS, share)
            after = torch.cat([p.detach().flatten() for p in head.parameters()])
            found.append((after - before).norm().item())
        return found

    def test_its_learning_rate_falls_to_zero_and_each_step_has_its_own_gradient(
        self, tiny_model: ModelFactory
    ) -> None:
        stage = OffRampStage(exit_head_learning_rate=1e-3, max_grad_norm=1e9)

        first, *others = self.moves(tiny_model(learns_to_exit=True), stage, 1.0, 1.0, 1.0, 1.0)

        # The gradient hardly changes, so that Adam's steps are the learning rate's.
        assert [step / first for step in others] == pytest.approx([0.75, 0.5, 0.25], rel=1e-2)

    def test_its_gradient_is_of_its_share_and_cut_to_the_stages_length(
        self, tiny_model: ModelFactory
    ) -> None:
        # So large an epsilon makes Adam's first step as long as the gradient.
        stage = OffRampStage(exit_head_learning_rate=1.0, adam_epsilon=100.0)

        whole, half, cut = (
            100 * self.moves(tiny_model(learns_to_exit=True), replace(stage, max_grad_norm=norm), share)[0]
            for share, norm in ((1.0, 1e9), (0.5, 1e9), (1.0, 1e-2))
        )

        assert half == pytest.approx(whole / 2, rel=1e-2)
        assert cut == pytest.approx(1e-2, rel=1e-2)
        assert whole > 2e-2

    def test_what_it_logs_is_the_mean_since_the_last_time(self, tiny_model: ModelFactory) -> None:
        head = tiny_model(learns_to_exit=True).exit_head
        assert head is not None
        cached = CachedExitHead(head, SINGLE_LABEL, OffRampStage(exit_head_learning_rate=1e-30), 9)

        logged = []
        for shares in ((1.0,), (1.0, 1.0, 0.5, 0.5), (1.0, 1.0)):
            for share in shares:
                cached.step(self.POOLED, self.LOGITS, self.LABELS, share)
            logged.append(cached.drain())

        right = (self.LOGITS.argmax(-1) == self.LABELS).float()
        with torch.no_grad():
            loss = (head(self.POOLED) - right).square().mean(-1).sum().item()
        assert logged == pytest.approx([loss, 0.75 * loss, loss])
