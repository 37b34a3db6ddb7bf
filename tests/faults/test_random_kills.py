"""Kills drawn at random, at every point of a run: nothing lost, nothing doubled, nothing corrupt, nothing hung.

`make test-faults` runs 45 seeds, about 200 kills; `make test-runs` takes the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.harness import (
    Answers,
    Kill,
    Run,
    assert_complete,
    draw_kills,
    read_answers,
    try_to_break,
    write_corpus,
)

SEEDS = range(int(os.environ.get("DEEBERT_FAULT_SEEDS", "1")))
KILLS_PER_SEED = 5
FILES, ROWS_PER_FILE, NULL_EVERY = 3, 8_000, 997


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "in"
    write_corpus(folder, files=FILES, rows=ROWS_PER_FILE, null_every=NULL_EVERY)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, saved_model: Path) -> Answers:
    run = Run(saved_model, corpus, corpus.parent / "undisturbed")
    try:
        run.finish()
    finally:
        run.kill_all()
    answers = read_answers(run)
    assert len(answers.rows) + len(answers.dead) == FILES * ROWS_PER_FILE
    assert len(answers.dead) == FILES * -(-ROWS_PER_FILE // NULL_EVERY)
    return answers


@pytest.fixture
def run(saved_model: Path, corpus: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(saved_model, corpus, tmp_path / "out", replicas=2)
    yield run
    run.kill_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_killed_every_row_is_there_once(
    seed: int, run: Run, undisturbed: Answers, tmp_path: Path
) -> None:
    kills = draw_kills(seed, KILLS_PER_SEED)
    if _overwrites(kills):
        _leave_another_run(run)
        run.extra = ("--overwrite",)
    outcome = try_to_break(run, kills, tmp_path / "counts")
    assert_complete(run, undisturbed)
    if (report := os.environ.get("DEEBERT_FAULT_REPORT")) is not None:
        with Path(report).open("a") as file:
            file.write(json.dumps({"seed": seed, **asdict(outcome)}) + "\n")


def _overwrites(kills: list[Kill]) -> bool:
    return any(kill.target == "driver-set-aside" for kill in kills)


def _leave_another_run(run: Run) -> None:
    """A finished run of another identity in the output."""
    other = Run(run.model, run.source / "0.parquet", run.output, threshold=0.5)
    try:
        other.finish()
    finally:
        other.kill_all()
