"""Training that is cut short, stopped early or watched: what is kept, what is done again, what is shown."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deebert.errors import DataError, RecipeError
from deebert.evaluation import LabelledSequences
from deebert.modeling import DeeBertForSequenceClassification
from deebert.training import (
    LOG_NAME,
    Alternating,
    EarlyStopping,
    Interpolation,
    Joint,
    Recipe,
    read_log,
    train,
    unfinished,
)
from deebert.training import recipes as recipes_module
from deebert.training.cached_stage import OffRampStack
from deebert.training.data import hold_out
from deebert.training.trainer import last_checkpoint, step_of
from tests.conftest import ModelFactory
from tests.training_toy import (
    EXACT,
    JOINT,
    JOINT_DISTILLED,
    OFF_RAMPS,
    QUICK_1,
    QUICK_2,
    RECIPES,
    THREE_STAGES,
    TWO_STAGE,
    CutAt,
    PowerCutError,
    Run,
    add_to_every_trainer,
    changed,
    padded,
    toy,
    weights,
)

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
    "stage 3, part of it": replace(
        THREE_STAGES,
        stage_1=None,
        stage_3=replace(QUICK_1, objective=Joint(), interpolation=Interpolation(first=1.0, last=0.25)),
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
            ("stage 3, part of it", 9),
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
            add_to_every_trainer(patch, CutAt(cut))
            with pytest.raises(PowerCutError):
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
            add_to_every_trainer(patch, CutAt(undisturbed.stages[0].steps - 1))
            with pytest.raises(PowerCutError):
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
            raise PowerCutError

        run(whole := tiny_model(num_layers=2), recipe, None, tmp_path / "whole")
        with monkeypatch.context() as patch:
            patch.setattr(recipes_module, "_save", cut)
            with pytest.raises(PowerCutError):
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
            add_to_every_trainer(patch, CutAt(6))
            with pytest.raises(PowerCutError):
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

    def test_other_label_names_are_refused(self, tiny_model: ModelFactory, run: Run, tmp_path: Path) -> None:
        """The ids in the data are the same: every answer would mean another label."""
        run(tiny_model(num_layers=2), JOINT)
        other = tiny_model(num_layers=2)
        other.config.id2label = {0: "positive", 1: "neutral", 2: "negative"}

        with pytest.raises(RecipeError, match="had another labels "):
            run(other, JOINT, resume=True)

        plan = tmp_path / "training.json"
        begun = json.loads(plan.read_text())
        del begun["labels"]  # as an earlier version wrote it
        plan.write_text(json.dumps(begun))
        assert run(tiny_model(num_layers=2), JOINT, resume=True).stages[0].number == 1


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
                    add_to_every_trainer(patch, CutAt(cut))
                with contextlib.suppress(PowerCutError):
                    self.shown(recipe, tiny_model(num_layers=2), tokenizer, tmp_path, resume=True)
            bars.append([text for text in terminal.getvalue().split("\r") if "stage 1" in text])

        (cut_short, resumed), last = bars, read_log(tmp_path / LOG_NAME)[-2]
        assert "| 0/12 [" in cut_short[0]
        assert "| 4/12 [" in resumed[0]
        assert "| 12/12 [" in resumed[-1]
        assert f"loss={last['loss']:.3f}]" in resumed[-1]
