"""How many replicas and threads, where the caller leaves it open."""

from __future__ import annotations

import pytest

from pipeline.cluster import Placement, Resources, place
from pipeline.config import Replicas

GIB = 1 << 30


def placed(
    *,
    cores: int = 8,
    gpus: int = 0,
    memory_gib: int = 64,
    replicas: Replicas | None = None,
    threads: int | None = None,
    weight_bytes: int = GIB // 2,
) -> Placement:
    there_is = Resources(cores=cores, gpus=gpus, memory_bytes=memory_gib * GIB)
    return place(there_is, on_gpus=gpus > 0, replicas=replicas, threads=threads, weight_bytes=weight_bytes)


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


@pytest.mark.parametrize(("replicas", "threads"), [(16, None), (8, 4), (2, 8)])
def test_more_than_there_is_still_fits_the_cores(replicas: int, threads: int | None) -> None:
    wished = placed(replicas=Replicas(replicas, replicas), threads=threads)
    assert wished.num_cpus * replicas <= 8
