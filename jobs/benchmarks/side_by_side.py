"""Several workers at once, each on a thread of its own with its share of the cores: as `classify` places replicas.

Knows nothing of what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

T = TypeVar("T")


class SideBySide:
    """Threads that stay, as replicas do: what a call has freed is there for the next one to use.

    A thread that has just begun pays for each page of its memory once more, which a short call feels.
    """

    def __init__(self, replicas: int, *, threads: int) -> None:
        """
        Args:
            replicas: how many workers run at the same time.
            threads: of torch's, for each.
        """
        self.replicas = replicas
        self._pool: ThreadPoolExecutor | None = None
        if replicas > 1:
            self._pool = ThreadPoolExecutor(replicas, initializer=torch.set_num_threads, initargs=(threads,))

    def __call__(self, workers: Sequence[Callable[[], T]]) -> list[T]:
        """Call all workers at the same time; returns what each returned.

        Args:
            workers: as many as there are replicas; long calls that leave the interpreter's lock to each other.
        """
        if self._pool is None:
            return [worker() for worker in workers]
        return [future.result() for future in [self._pool.submit(worker) for worker in workers]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
