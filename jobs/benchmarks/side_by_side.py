"""Several workers at once, each on a thread of its own with its share of the cores: as `classify` places replicas.

Knows nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(workers: Sequence[Callable[[], T]], *, threads: int) -> list[T]:
    """Call all workers at the same time; returns what each returned.

    Args:
        workers: long calls that leave the interpreter's lock to each other.
        threads: of torch's, for each worker.
    """
    if len(workers) == 1:
        return [workers[0]()]
    with ThreadPoolExecutor(len(workers), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return [future.result() for future in [pool.submit(worker) for worker in workers]]
