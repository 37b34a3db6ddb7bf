"""A cluster of two nodes that loses one: the run goes on with what is left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.clusters import Head
from tests.faults.harness import (
    DEADLINE_SECONDS,
    Answers,
    Run,
    assert_complete,
    read_answers,
    wait_until,
    write_corpus,
)

FILES, ROWS_PER_FILE = 3, 40_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes") / "in"
    write_corpus(folder, files=FILES, rows=ROWS_PER_FILE)
    return folder


@pytest.fixture
def run(saved_model: Path, corpus: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run(saved_model, corpus, tmp_path / "out")
    yield run
    run.kill_all()


@pytest.fixture(scope="module")
def undisturbed(saved_model: Path, corpus: Path) -> Answers:
    run = Run(saved_model, corpus, corpus.parent / "undisturbed")
    try:
        run.finish()
    finally:
        run.kill_all()
    return read_answers(run)


def finish_without(kill: Any, run: Run) -> float:
    """Run on both nodes, kill one of them under way; seconds from the kill to the end."""
    process = run.start()
    wait_until(lambda: len(run.replica_pids()) == 2, process)
    started = time.monotonic()
    kill()
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    return time.monotonic() - started


def test_a_killed_node_s_rows_are_done_by_the_other(run: Run, undisturbed: Answers) -> None:
    head = Head(cpus=1)
    try:
        other = head.add_node(cpus=1)
        run.extra = ("--ray-address", head.address)
        try:
            seconds = finish_without(other.kill, run)
        finally:
            other.stop()
    finally:
        head.stop()
    assert_complete(run, undisturbed)
    attempt = run.record["attempts"][-1]
    print(json.dumps({"seconds_after_the_kill": round(seconds, 1), "wall_seconds": attempt["wall_seconds"]}))


def test_a_cluster_that_loses_a_node_finishes(
    run: Run, undisturbed: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
    try:
        other = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        run.extra = ("--ray-address", cluster.address)
        finish_without(lambda: cluster.remove_node(other, allow_graceful=False), run)
    finally:
        cluster.shutdown()
    assert_complete(run, undisturbed)
