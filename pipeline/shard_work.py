"""A shard under way in a replica: its rows in the lanes, its bad rows, and the seconds that it took so far.

Knows nothing of how rows are read, or of where the part goes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deebert.packing import IntArray
from pipeline.lanes import Submission
from pipeline.schema import Answers
from pipeline.shard import Shard
from pipeline.source import BadRow


@dataclass(frozen=True, kw_only=True, eq=False)
class RowsInLanes:
    """Rows of a shard in the lanes, and what the part will say of them; their texts are let go."""

    source_rows: npt.NDArray[np.int64]
    tokens: IntArray
    """Of all windows of a row; without windows, a row is one."""
    squared_tokens: int
    """Σ over rows, or their windows."""
    windows: IntArray
    truncated: npt.NDArray[np.bool_]
    kept: pa.Table
    submission: Submission

    def answers(self) -> Answers:
        """Once all of them are answered."""
        done = self.submission
        return Answers(
            source_rows=self.source_rows,
            num_tokens=self.tokens.astype(np.int32),
            num_windows=self.windows.astype(np.int32),
            truncated=self.truncated,
            prediction=done.prediction,
            exit_layer=done.exit_layer,
            entropy=done.entropy,
            certainty=done.certainty,
            probabilities=done.probabilities,
            audited=done.audited,
            audit_prediction=done.audit_prediction,
        )


@dataclass(kw_only=True)
class ShardWork:
    """A shard under way."""

    shard: Shard
    rows: list[RowsInLanes] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    read_seconds: float = 0.0
    tokenize_seconds: float = 0.0

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add what the block takes to the seconds called `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)
