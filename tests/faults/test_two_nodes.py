"""A cluster of two nodes that loses one: the run goes on with what is left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.clusters import Head, Node
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
    run = Run(saved_model, corpus, tmp_path / "out", replicas=2)
    yield run
    run.kill_all()


@dataclass(frozen=True)
class TwoNodes:
    """A cluster of real `ray start` processes, and what a run on it says when nobody disturbs it."""

    head: Head
    other: Node
    answers: Answers
    wall_seconds: float


@pytest.fixture(scope="module")
def two_nodes(saved_model: Path, corpus: Path) -> Iterator[TwoNodes]:
    head = Head(cpus=1)
    try:
        other = head.add_node(cpus=1)
        try:
            run = Run(
                saved_model,
                corpus,
                corpus.parent / "undisturbed",
                replicas=2,
                extra=("--ray-address", head.address),
            )
            run.finish()
            assert len(run.replica_pids()) == 2
            yield TwoNodes(head, other, read_answers(run), run.record["attempts"][-1]["wall_seconds"])
        finally:
            other.stop()
    finally:
        head.stop()


def finish_without(kill: Callable[[], None], run: Run) -> None:
    """Run on both nodes and kill one of them under way."""
    process = run.start()
    wait_until(lambda: len(run.replica_pids()) == 2, process)
    kill()
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said


def test_a_killed_node_s_rows_are_done_by_the_other(run: Run, two_nodes: TwoNodes) -> None:
    run.extra = ("--ray-address", two_nodes.head.address)
    finish_without(two_nodes.other.kill, run)
    assert_complete(run, two_nodes.answers)
    taken = run.record["attempts"][-1]["wall_seconds"]
    print(json.dumps({"undisturbed_seconds": two_nodes.wall_seconds, "one_node_killed_seconds": taken}))


def test_a_cluster_that_loses_a_node_finishes(
    run: Run, two_nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20})
    try:
        other = cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        run.extra = ("--ray-address", cluster.address)
        finish_without(lambda: cluster.remove_node(other, allow_graceful=False), run)
    finally:
        cluster.shutdown()
    assert_complete(run, two_nodes.answers)
