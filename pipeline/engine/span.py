"""How long a stretch of work took, by the clock of the device that does it.

A GPU is only told what to do; its own events say when it did it. Knows nothing of the work.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import torch


class Span:
    """Times what is asked of a device between entering and leaving it."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._times: list[float] = []

    def __enter__(self) -> Self:
        self._mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mark()

    def seconds(self) -> float:
        """From first to last; waits until the device has come to the end of it."""
        if not self._events:
            return self._times[1] - self._times[0]
        first, last = self._events
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000

    def _mark(self) -> None:
        if self._events:
            self._events[len(self._times)].record()
        self._times.append(time.perf_counter())
