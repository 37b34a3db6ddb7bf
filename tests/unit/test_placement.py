"""How many replicas and threads, where the caller leaves it open."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import ray.data
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cluster, pool
from pipeline.cluster import Placement, RaySession, Resources, place
from pipeline.config import Replicas
from pipeline.errors import UsageError

GIB = 1 << 30


def placed(
    *,
    cores: int = 8,
    nodes: int = 1,
    gpus: int = 0,
    memory_gib: int = 64,
    replicas: Replicas | None = None,
    threads: int | None = None,
    on_gpus: bool | None = None,
    weight_bytes: int = GIB // 2,
    shards: int | None = None,
) -> Placement:
    there_is = Resources(
        cores=cores, cores_of_largest_node=cores // nodes, gpus=gpus, memory_bytes=memory_gib * GIB
    )
    return place(
        there_is,
        on_gpus=gpus > 0 if on_gpus is None else on_gpus,
        replicas=replicas,
        threads=threads,
        weight_bytes=weight_bytes,
        shards=shards,
    )


def test_a_replica_of_one_thread_per_core() -> None:
    assert placed() == Placement(replicas=Replicas(8, 8), device="cpu", threads=1, num_cpus=1)


def test_fewer_replicas_of_more_threads_where_memory_is_short() -> None:
    # Half of 16 GiB, at 1 GiB a process and twice the weights.
    assert placed(memory_gib=16) == Placement(replicas=Replicas(4, 4), device="cpu", threads=2, num_cpus=2)


def test_at_least_one() -> None:
    assert placed(memory_gib=1).replicas == Replicas(1, 1)


def test_a_replica_per_gpu() -> None:
    expected = Placement(replicas=Replicas(2, 2), device="cuda", threads=4, num_cpus=1)
    assert placed(gpus=2) == expected
    assert expected.num_gpus == 1


def test_threads_share_the_cores_of_the_most_replicas() -> None:
    assert placed(replicas=Replicas(1, 4)).threads == 2


@pytest.mark.parametrize(
    ("shards", "replicas", "expected"),
    [
        (1, None, (Replicas(1, 1), 8)),
        (3, None, (Replicas(3, 3), 2)),
        (9, None, (Replicas(8, 8), 1)),
        (2, Replicas(4, 4), (Replicas(2, 2), 4)),
        (2, Replicas(1, 4), (Replicas(1, 2), 4)),
        (0, None, (Replicas(1, 1), 8)),
    ],
)
def test_no_more_replicas_than_shards_and_the_cores_are_theirs(
    shards: int, replicas: Replicas | None, expected: tuple[Replicas, int]
) -> None:
    placement = placed(shards=shards, replicas=replicas)
    assert (placement.replicas, placement.threads) == expected
    assert placement.num_cpus == placed(replicas=replicas).num_cpus, (
        "cores that others hold are not waited for"
    )


@pytest.mark.parametrize(("replicas", "threads"), [(16, None), (8, 4), (2, 8)])
def test_more_than_there_is_still_fits_the_cores(replicas: int, threads: int | None) -> None:
    wished = placed(replicas=Replicas(replicas, replicas), threads=threads)
    assert wished.num_cpus * replicas <= 8


@pytest.mark.parametrize(
    ("replicas", "threads", "expected"),
    [
        (1, None, (4, 4)),
        (2, None, (4, 4)),
        (4, None, (2, 2)),
        (8, None, (1, 1)),
        (1, 8, (8, 4)),
        (1, 6, (6, 4)),
    ],
)
def test_a_replica_fits_one_node(replicas: int, threads: int | None, expected: tuple[int, float]) -> None:
    """Two nodes of 4 cores have 8, of which no replica can have more than 4: Ray would wait for ever."""
    wished = placed(nodes=2, replicas=Replicas(replicas, replicas), threads=threads)
    assert (wished.threads, wished.num_cpus) == expected


def test_memory_for_one_replica_does_not_make_it_wider_than_a_node() -> None:
    assert placed(memory_gib=1, nodes=4).num_cpus == 2


@pytest.mark.parametrize(("gpus", "said"), [(0, ["the cluster has no GPU yet: waiting for one"]), (1, [])])
def test_a_cluster_that_has_yet_to_get_its_gpu(
    gpus: int, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.cluster")
    assert placed(gpus=gpus, on_gpus=True).num_gpus == 1
    assert caplog.messages == said


def test_what_a_range_may_grow_to_needs_cores_of_its_own() -> None:
    """A cluster that can grow does so only for replicas that do not fit."""
    assert placed(cores=4, replicas=Replicas(1, 16)).num_cpus == 1
    assert placed(cores=4, replicas=Replicas(8, 16)).num_cpus == 0.5


def test_a_cluster_without_cores_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    wished = placed(cores=0, replicas=Replicas(1, 4), threads=4)
    assert (wished.num_cpus, wished.threads, wished.replicas.least) == (4, 4, 1)
    assert placed(cores=0).num_cpus == 1
    assert caplog.messages == ["the cluster has no core yet: waiting for one"] * 2


def test_a_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(
        UsageError, match="'ray://head:10001' is of a Ray Client, which cannot run this: submit"
    ):
        RaySession("ray://head:10001").__enter__()


def test_other_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatch(**options: object) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.10.1\n"
            "This process on node 10.0.0.2 was started with:\n    Ray: 2.60.0\n    Python: 3.11.2\n"
        )

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_init", mismatch)
    with pytest.raises(
        UsageError, match=r"other versions \(.* Ray: 2.9.0 .* Ray: 2.60.0 .*\): use its Ray and Python"
    ):
        RaySession("auto").__enter__()


class FakeCluster:
    """What Ray says of nodes of 2 and 3 cores; one of 16 has died."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_there: bool = True) -> None:
        nodes: list[dict[str, Any]] = [
            {"Alive": True, "Resources": {"CPU": 2.0}},
            {"Alive": True, "Resources": {"CPU": 3.0}},
            {"Alive": False, "Resources": {"CPU": 16.0}},
            {"Alive": True, "Resources": {}},
        ]
        monkeypatch.setattr(ray, "is_initialized", lambda: is_there)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 5.0, "memory": 1e9})
        monkeypatch.setattr(ray, "nodes", lambda: nodes)


def test_the_largest_node_is_one_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch)
    assert RaySession().resources() == Resources(
        cores=5, cores_of_largest_node=3, gpus=0, memory_bytes=1_000_000_000
    )


def test_this_machine_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, is_there=False)
    here = RaySession().resources()
    assert here.cores_of_largest_node == here.cores


def test_cuda_is_an_order_to_a_cluster_and_a_mistake_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    FakeCluster(monkeypatch)
    assert RaySession().uses_gpus("cuda")
    FakeCluster(monkeypatch, is_there=False)
    assert not RaySession().uses_gpus("auto")
    with pytest.raises(UsageError, match="--device cuda, but this machine has no GPU: leave --device out"):
        RaySession().uses_gpus("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert RaySession().uses_gpus("cuda")


@pytest.mark.parametrize("mine", [None, "token"])
def test_the_callers_environment_is_as_it_was(mine: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if mine is not None:
            monkeypatch.setenv(name, mine)
    at_start: list[str | None] = []

    def start(**options: object) -> None:
        at_start.extend(map(os.environ.get, names))

    monkeypatch.setattr(cluster, "_init_patiently", start)
    with RaySession() as session:
        session.start()
    assert at_start == [mine or "disabled", "0"]
    assert [os.environ.get(name) for name in names] == [mine, mine]


def test_the_callers_ray_data_is_as_it_was() -> None:
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, log.level
    with pool._quiet_ray_data():
        assert (context.enable_progress_bars, log.level) == (False, logging.ERROR)
    assert (context.enable_progress_bars, log.level) == before


@given(replicas=st.integers(1, 64), shards=st.integers(1, 10_000))
def test_whoever_is_ready_first_leaves_shards_for_the_others(replicas: int, shards: int) -> None:
    placement = placed(cores=64, memory_gib=1024, replicas=Replicas(replicas, replicas), shards=shards)
    workers, in_hand = placement.replicas.least, pool.most_in_hand(placement, shards)
    assert (workers - 1) * in_hand < shards
    assert in_hand == placement.shards_in_flight or workers * (in_hand + 1) > shards


def test_replicas_of_a_growing_pool_have_more_than_they_can_work_on() -> None:
    placement = placed(replicas=Replicas(1, 4), shards=100)
    assert pool.most_in_hand(placement, 100) > 1.75 * placement.shards_in_flight  # from which Ray adds one
