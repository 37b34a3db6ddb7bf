"""The pool of replicas: shards go in, their outcomes come out. All that the product asks of Ray Data.

Knows what a replica costs (`Placement`), not what it does with a shard, nor what becomes of the outcome.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray.data

from pipeline.cluster import Placement
from pipeline.records import ShardRecord
from pipeline.replica import Replica, ReplicaSpec, ShardFailure
from pipeline.shard import Shard


def outcomes(
    spec: ReplicaSpec, placement: Placement, shards: Sequence[Shard]
) -> Iterator[ShardRecord | ShardFailure]:
    """Run shards on a pool of replicas; yields each one's outcome as it is committed.

    Raises:
        RayError: the cluster came to its end, or no replica can start; `cause` says why in a sentence.
    """
    with _quiet_ray_data():
        yield from _outcomes(spec, placement, shards)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data without progress bars and warnings, as long as it is ours: the calling program may use it too."""
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    has_bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = has_bars
        log.setLevel(level)


def _outcomes(
    spec: ReplicaSpec, placement: Placement, shards: Sequence[Shard]
) -> Iterator[ShardRecord | ShardFailure]:
    items = [{"shard": pickle.dumps(shard)} for shard in shards]
    pool = ray.data.ActorPoolStrategy(
        min_size=placement.replicas.least,
        max_size=placement.replicas.most,
        max_concurrent_calls_per_actor=placement.shards_in_flight,
        max_tasks_in_flight_per_actor=most_in_hand(placement, len(shards)),
        enable_true_multi_threading=True,
    )
    # Ray retries the shards of a replica that died for ever: the replicas themselves know when to stop.
    outcomes = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Replica,
        batch_size=1,
        compute=pool,
        fn_constructor_kwargs={"spec": spec},
        num_cpus=placement.num_cpus,
        num_gpus=placement.num_gpus or None,
    )
    for row in outcomes.iter_rows():
        yield pickle.loads(row["outcome"])


def most_in_hand(placement: Placement, shards: int) -> int:
    """Shards that a replica may be given at a time, those that wait for a thread of it among them.

    What one was given no other takes over while it lives. The first to be ready must leave the others enough to begin
    with, and nobody should have shards waiting at the end while others are done.
    """
    replicas = placement.replicas
    if replicas.least < replicas.most:
        # A pool grows only when replicas have more than they can work on.
        return 2 * placement.shards_in_flight
    return max(1, min(placement.shards_in_flight, shards // replicas.least))


def cause(error: BaseException) -> str:
    """What Ray says of the end of a cluster, or of an actor that cannot start: the last line, its hints aside."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("To change retry")), repr(error))
