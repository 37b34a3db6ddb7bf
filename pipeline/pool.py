"""The pool of replicas: shards go in, their outcomes come out. All that the product asks of Ray Data.

Knows what a replica costs (`Placement`), not what it does with a shard, nor what becomes of the outcome.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence

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
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"shard": pickle.dumps(shard)} for shard in shards]
    pool = ray.data.ActorPoolStrategy(
        min_size=placement.replicas.least,
        max_size=placement.replicas.most,
        max_concurrent_calls_per_actor=placement.shards_in_flight,
        # Twice what runs: the pool grows only when replicas have more than they can work on.
        max_tasks_in_flight_per_actor=2 * placement.shards_in_flight,
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


def cause(error: BaseException) -> str:
    """What Ray says of the end of a cluster, or of an actor that cannot start: the last line, its hints aside."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("To change retry")), repr(error))
