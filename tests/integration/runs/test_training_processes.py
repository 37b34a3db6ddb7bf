"""Two processes train the model that one process trains: both stages, over gloo, and only the first one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from tests.conftest import REPOSITORY

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from deebert.errors import RecipeError
from deebert.training import *
from tests.conftest import make_model
from tests.training_toy import QUICK_1, QUICK_2, toy
from tests.training_toy import without_dropout
from transformers import AutoTokenizer

work, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
torch.set_num_threads(1)
distilled = Distillation(weight=0.5)
stage_2 = replace(QUICK_2, epochs=3, self_distillation=distilled)
recipes = {
    "two-stage": Recipe(stage_1=replace(QUICK_1, epochs=2), stage_2=stage_2),
    "joint": Recipe(stage_1=replace(QUICK_1, epochs=2, objective=Joint(weighting="equilibrium")), stage_2=None),
    "alternating": Recipe(
        stage_1=replace(QUICK_1, epochs=2, objective=Alternating(self_distillation=distilled), accumulation_steps=2),
        stage_2=replace(stage_2, mode="exact"),
        early_stopping=EarlyStopping(held_out=0.2, patience=9, every_steps=4),
    ),
}
for name, recipe in recipes.items():
    model = without_dropout(make_model(num_layers=3))
    # The last batch has one row, which only one of two processes gets; with 19 held out, 14 rows in pieces of 8 and 6.
    report = train(model, tokenizer, toy(97, seed=1), recipe, work / name, show_progress=False)
    rank = processes().process_index
    torch.save(model.state_dict(), work / f"{name}-{rank}.pt")
    (work / f"{name}-{rank}.txt").write_text(" ".join(f"{s.steps} {s.loss:.5f}" for s in report.stages))
uneven = Recipe(stage_1=replace(QUICK_1, epochs=1, batch_size=5, objective=Joint()), stage_2=None)
try:
    train(model, tokenizer, toy(10, seed=1), uneven, work / "uneven", show_progress=False)
except RecipeError as error:
    (work / f"refusal-{rank}.txt").write_text(str(error))
"""
RECIPES = ("two-stage", "joint", "alternating")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[int, Path]:
    """Work folders by the number of processes."""
    root = tmp_path_factory.mktemp("processes")
    tokenizer.save_pretrained(root / "tokenizer")
    (root / "script.py").write_text(SCRIPT)
    folders = {}
    for world in (1, 2):
        folders[world] = root / str(world)
        folders[world].mkdir()
        run(world, root / "script.py", folders[world], root / "tokenizer")
    return folders


def run(world: int, *words: Path | str) -> None:
    launcher = (
        [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    )
    ended = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_both_processes_end_with_the_same_weights(name: str, trained: dict[int, Path]) -> None:
    one, other = (torch.load(trained[2] / f"{name}-{rank}.pt") for rank in (0, 1))

    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", RECIPES)
def test_they_are_those_of_a_single_process(name: str, trained: dict[int, Path]) -> None:
    alone, together = (torch.load(trained[world] / f"{name}-0.pt") for world in (1, 2))

    for key, value in alone.items():
        # A key's bias has no effect: its gradient is rounding, which Adam makes a full step of.
        if "key.bias" not in key:
            torch.testing.assert_close(together[key], value, atol=5e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", RECIPES)
def test_they_report_the_same_steps_and_losses(name: str, trained: dict[int, Path]) -> None:
    alone = [float(x) for x in (trained[1] / f"{name}-0.txt").read_text().split()]
    for rank in (0, 1):
        together = [float(x) for x in (trained[2] / f"{name}-{rank}.txt").read_text().split()]
        assert together == pytest.approx(alone, abs=2e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_first_writes_the_log(name: str, trained: dict[int, Path]) -> None:
    alone, together = (
        [json.loads(line) for line in (trained[world] / name / "training_log.jsonl").read_text().splitlines()]
        for world in (1, 2)
    )

    assert [(r["stage"], r["step"]) for r in together] == [(r["stage"], r["step"]) for r in alone]
    for one, other in zip(alone, together, strict=True):
        for losses in ("losses", "held_out_losses"):
            assert other.get(losses, {}) == pytest.approx(one.get(losses, {}), abs=2e-3)
        assert other.get("held_out_loss") == pytest.approx(one.get("held_out_loss"), abs=2e-3)


def test_the_command_writes_one_model(trained: dict[int, Path], saved_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text(
        "text,label\n" + "the film is good,positive\nthe film is bad,negative\nit is,neutral\n" * 16
    )
    words = f"--from-model {saved_model} --data {data} --labels negative,neutral,positive --output {tmp_path}/model"
    flags = "--recipe joint --epochs 1 --stage-2 fast --precision float32"

    run(2, "-m", "jobs.train", *words.split(), *flags.split())

    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "model"]
    assert {"config.json", "training_log.jsonl", "training_log.svg"} <= {
        p.name for p in (tmp_path / "model").iterdir()
    }
    assert load_file(tmp_path / "model" / "model.safetensors")


def test_a_batch_that_does_not_divide_is_refused(trained: dict[int, Path]) -> None:
    refusal = "a batch of 5 samples in 1 pieces does not divide among 2 processes: choose a multiple of 2"

    assert [(trained[2] / f"refusal-{rank}.txt").read_text() for rank in (0, 1)] == [refusal, refusal]
    assert not (trained[1] / "refusal-0.txt").exists()
