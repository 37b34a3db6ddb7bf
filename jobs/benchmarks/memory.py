"""How much memory a run on this machine's own Ray holds: its driver and its replicas, looked at while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

import psutil

_POLL_SECONDS = 0.2


class PeakMemory:
    """The most resident memory that a driver, and the largest replica below it, had in the block."""

    def __init__(self, driver: int) -> None:
        """Watch the process `driver`, which may end meanwhile."""
        self._pid = driver
        self.driver = 0
        """Bytes."""
        self.largest_replica = 0
        """Bytes."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            with suppress(psutil.Error):
                self.driver = max(self.driver, psutil.Process(self._pid).memory_info().rss)
            self.largest_replica = max(self.largest_replica, *replica_bytes(self._pid), 0)


def replica_bytes(driver: int) -> Iterator[int]:
    """Resident memory of each replica below the process `driver`; those that are just ending are left out."""
    with suppress(psutil.Error):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):
                if "MapBatches(Replica)" in " ".join(process.cmdline()):
                    yield process.memory_info().rss
