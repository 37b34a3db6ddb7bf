"""Shows how far a run is: a bar on a terminal, a log line now and then elsewhere.

The display only: it is told the counts and the time, and knows nothing of Ray, shards or files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

REDRAW_SECONDS = 0.2
BAR_FORMAT = "{percentage:3.0f}% |{bar}| {desc}"


@dataclass(frozen=True, kw_only=True)
class ProgressSample:
    """How far the run is now."""

    rows_done: int
    """Rows of the planned shards that are done, `resumed_rows` included."""
    exit_layer_sum: int
    """Σ of the exit layers of `rows_done`."""
    num_layers: int
    resumed_rows: int
    """Rows that were already committed before this attempt: done, but not by its speed."""

    @property
    def mean_exit_layer(self) -> float:
        """Of the rows that are done, of which there must be some."""
        return self.exit_layer_sum / self.rows_done

    @property
    def saving(self) -> float:
        """Share of the layers that nobody had to run (DeeBERT, Eq. 2)."""
        return 1 - self.mean_exit_layer / self.num_layers


class Progress:
    """The display of one attempt; a context manager.

    Args:
        total_rows: Rows that the run will have, as far as the planner can tell; None if it cannot.
        stream: Where the bar goes.
        is_terminal: A bar on `stream` if true, else lines through `logging`.
        interval_seconds: Seconds between log lines.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        *,
        total_rows: int | None,
        stream: TextIO,
        is_terminal: bool,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_rows = total_rows
        self._interval_seconds = REDRAW_SECONDS if is_terminal else interval_seconds
        self._clock = clock
        self._started_at = clock()
        self._shown_at = -float("inf") if is_terminal else self._started_at
        self._latest: ProgressSample | None = None
        self._latest_is_shown = True
        self._bar = _bar(total_rows, stream) if is_terminal else None

    def update(self, sample: ProgressSample) -> None:
        """Takes note of `sample`, and shows it if it is time."""
        self._latest, self._latest_is_shown = sample, False
        if self._clock() - self._shown_at >= self._interval_seconds:
            self._show(sample)

    def close(self) -> None:
        """Shows the last sample, and leaves the terminal in order."""
        if self._latest is not None and not self._latest_is_shown:
            self._show(self._latest)
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, sample: ProgressSample) -> None:
        now = self._clock()
        self._shown_at, self._latest_is_shown = now, True
        facts = _facts(sample, self._total_rows, now - self._started_at)
        if self._bar is None:
            logger.info("%s", facts)
            return
        if self._bar.total is not None:
            self._bar.total = max(self._bar.total, sample.rows_done)  # the total is an estimate
        self._bar.n = sample.rows_done
        self._bar.set_description_str(facts)


def _bar(total_rows: int | None, stream: TextIO) -> tqdm[Any]:
    bar_format = BAR_FORMAT if total_rows else "{desc}"
    return tqdm(
        total=total_rows or None, file=stream, bar_format=bar_format, dynamic_ncols=True, desc="starting"
    )


def _facts(sample: ProgressSample, total_rows: int | None, elapsed_seconds: float) -> str:
    """A narrow terminal cuts the end, so the least comes last; ``saved`` is layer work (DeeBERT, Eq. 2)."""
    facts = [_rows(sample, total_rows)]
    new_rows = sample.rows_done - sample.resumed_rows
    if new_rows > 0 and elapsed_seconds > 0:
        rows_per_second = new_rows / elapsed_seconds
        facts.append(_rate(rows_per_second))
        facts += _time_left(sample, total_rows, rows_per_second)
    if sample.rows_done > 0:
        facts.append(f"{100 * sample.saving:.1f} % saved")
        facts.append(f"mean exit layer {sample.mean_exit_layer:.2f}/{sample.num_layers}")
    return ", ".join(facts)


def _rows(sample: ProgressSample, total_rows: int | None) -> str:
    if not total_rows:
        return f"{sample.rows_done:,} rows"
    return f"{sample.rows_done:,} of ~{total_rows:,} rows"


def _rate(rows_per_second: float) -> str:
    return f"{rows_per_second:,.0f} rows/s" if rows_per_second >= 10 else f"{rows_per_second:.2g} rows/s"


def _time_left(sample: ProgressSample, total_rows: int | None, rows_per_second: float) -> list[str]:
    """Nothing once the estimated total is passed: what is left is unknown then."""
    if not total_rows or sample.rows_done >= total_rows:
        return []
    seconds_left = (total_rows - sample.rows_done) / rows_per_second
    return [f"{tqdm.format_interval(seconds_left)} left"]
