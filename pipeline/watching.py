"""The progress of a run on Ray: what its board counts, shown and measured while it works.

Knows nothing of shards or of how a line or a bar looks (`pipeline.progress`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.gauges import Gauges
from pipeline.planning import RunPlan
from pipeline.progress import Progress, ProgressSample
from pipeline.records import Totals

_POLL_SECONDS = 0.5
# A board that cannot be reached keeps nobody: neither the end of a run nor Ctrl-C.
_ANSWER_SECONDS = 5.0


@contextmanager
def showing_progress(board: Any, run: RunPlan, before: Totals) -> Iterator[None]:
    """Show the board's numbers, and set the cluster's metrics by them, until the block ends."""
    layers_before = sum(layer * rows for layer, rows in enumerate(before.exit_rows))
    ended = threading.Event()
    gauges = Gauges(output=run.config.output, total_rows=run.estimated_rows)

    def sample() -> ProgressSample:
        rows, exit_layers = ray.get(board.total.remote(), timeout=_ANSWER_SECONDS)
        return ProgressSample(
            rows_done=before.rows + rows,
            exit_layer_sum=layers_before + exit_layers,
            num_layers=run.model.num_layers,
            resumed_rows=before.rows,
        )

    def update(progress: Progress) -> None:
        now = sample()
        progress.update(now)
        gauges.set(now)

    def poll(progress: Progress) -> None:
        while not ended.wait(_POLL_SECONDS):
            try:
                update(progress)
            except RayError:
                continue  # the board is late or restarts, or the cluster goes down: the main thread says so

    is_terminal = sys.stderr.isatty()
    with Progress(total_rows=run.estimated_rows, stream=sys.stderr, is_terminal=is_terminal) as progress:
        poller = threading.Thread(target=poll, args=(progress,), daemon=True)
        poller.start()
        try:
            yield
        finally:
            ended.set()
            poller.join(_ANSWER_SECONDS)
        if not poller.is_alive():
            with suppress(RayError):
                update(progress)
