"""Rows that end or hang the process that runs them: found, left out, and nothing else is lost with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Run, read_answers
from tests.integration.conftest import sentences, write_parquet

ROWS, SHARD_ROWS = 1_200, 400


@pytest.fixture
def run(saved_model: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(saved_model, tmp_path / "in", tmp_path / "out", shard_rows=SHARD_ROWS)
    yield run
    run.kill_all()


def corpus(run: Run, special: dict[int, str]) -> None:
    texts = sentences(ROWS)
    for row, text in special.items():
        texts[row] = text
    write_parquet(run.source / "a.parquet", texts, row_group_size=SHARD_ROWS)


def test_rows_that_kill_are_dead_letters_and_the_rest_commits(run: Run) -> None:
    corpus(run, {500: "poison", 503: "poison", 790: "poison"})

    said = run.finish(DEEBERT_TEST_POISON="poison")

    letters = run.dead_letters()
    assert [letter["source_row"] for letter in letters] == [500, 503, 790]
    assert all("ended its replica's process, 2 times by itself" in letter["reason"] for letter in letters)
    assert {letter["excerpt"] for letter in letters} == {"poison"}
    answers = read_answers(run)
    assert answers.rows.keys() == {("a.parquet", row) for row in range(ROWS) if row not in (500, 503, 790)}
    assert "3 bad rows" in said
    assert run.record["totals"]["bad_rows"] == 3


def test_a_row_that_hangs_is_found_by_the_deadline_among_rows_in_windows(run: Run) -> None:
    corpus(run, {17: "endless"})
    run.extra = ("--hang-seconds", "3", "--max-length", "16", "--window-stride", "4")

    run.finish(DEEBERT_TEST_HANG="endless")

    assert [letter["source_row"] for letter in run.dead_letters()] == [17]
    assert len(read_answers(run).rows) == ROWS - 1
    assert sum(run.record["totals"]["exit_windows"]) > 1.5 * ROWS
