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
        self._device = device
        self._first: float | torch.cuda.Event = 0.0
        self._last: float | torch.cuda.Event = 0.0

    def __enter__(self) -> Self:
        self._first = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last = self._now()

    def seconds(self) -> float:
        """From first to last; waits until the device has come to the end of it."""
        first, last = self._first, self._last
        if isinstance(first, float):
            assert isinstance(last, float)
            return last - first
        assert not isinstance(last, float)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000

    def is_over(self) -> bool:
        """Whether the device has come to the end of it."""
        return isinstance(self._last, float) or self._last.query()

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        # Of its own device: by default it would be the current one's, which has nothing to do with the work.
        event.record(torch.cuda.current_stream(self._device))
        return event
