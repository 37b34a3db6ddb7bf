"""Parquet files as raw rows: whole row groups, or a piece of a large one.

A row group can only be decoded from its first row on. Shards that are pieces of one would each decode it again up
to where they begin; so a reader stays open where a shard ends, for one that begins further on. Knows nothing of
which rows are good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.inputs import InputFile
from pipeline.opening import open_parquet
from pipeline.raw_rows import RawRows
from pipeline.shard import Shard

MAX_BATCH_BYTES = 64 << 20


class ParquetReaders:
    """Readers that shards left in the middle of a row group, for other shards of this process.

    Several threads may ask: who takes a reader has it alone.

    Args:
        most_kept: One for each thread that reads lets each decode a row group once; each holds some MB.
    """

    def __init__(self, *, most_kept: int = 1) -> None:
        self._most_kept = most_kept
        self._kept: list[_Reader] = []
        self._guard = threading.Lock()

    def take(self, shard: Shard, columns: Sequence[str]) -> _Reader | None:
        """The one that stands nearest before the shard's first row, in the same row groups."""
        with self._guard:
            fitting = [reader for reader in self._kept if reader.leads_to(shard, columns)]
            nearest = max(fitting, key=lambda reader: reader.row, default=None)
            if nearest is not None:
                self._kept.remove(nearest)
            return nearest

    def keep(self, reader: _Reader) -> None:
        """Keep a reader that has rows left; the one that was kept longest goes when there are too many."""
        with self._guard:
            self._kept.append(reader)
            too_many = self._kept[: -self._most_kept]
            self._kept = self._kept[-self._most_kept :]
        for dropped in too_many:
            dropped.close()


def read_parquet(
    shard: Shard, columns: Sequence[str], batch_rows: int, readers: ParquetReaders
) -> Iterator[RawRows]:
    """The shard's rows, in order, in batches of at most `batch_rows`."""
    reader = readers.take(shard, columns) or _Reader(shard, columns, batch_rows)
    try:
        yield from reader.rows(shard)
    except BaseException:
        reader.close()
        raise
    if reader.has_rows:
        readers.keep(reader)
    else:
        reader.close()


class _Reader:
    """The row groups that hold a shard, from front to back."""

    def __init__(self, shard: Shard, columns: Sequence[str], batch_rows: int) -> None:
        self._file: InputFile = shard.source
        self._columns = tuple(columns)
        self._parquet = open_parquet(shard.source)
        groups, self.row, self._end, row_bytes = _covering_row_groups(self._parquet.metadata, shard)
        self._batches = self._parquet.iter_batches(
            batch_size=max(1, min(batch_rows, MAX_BATCH_BYTES // row_bytes)),
            row_groups=groups,
            columns=list(columns),
            use_threads=False,
        )
        self._rest: Any = None  # of a batch that reaches into the next shard

    @property
    def has_rows(self) -> bool:
        """Whether rows are left in its row groups."""
        return self.row < self._end

    def leads_to(self, shard: Shard, columns: Sequence[str]) -> bool:
        """Whether the shard lies ahead."""
        return (
            (self._file, self._columns) == (shard.source, tuple(columns))
            and self.row <= shard.first_row
            and _last_row(shard) <= self._end
        )

    def rows(self, shard: Shard) -> Iterator[RawRows]:
        """Go on to the shard's first row, and to its end."""
        last = _last_row(shard)
        while self.row < last:
            batch = next(self._batches, None) if self._rest is None else self._rest
            if batch is None:
                raise EOFError(f"the file ends before row {self.row}, which its footer counts")
            count = min(batch.num_rows, last - self.row)
            self._rest = batch.slice(count) if count < batch.num_rows else None
            first, self.row = self.row, self.row + count
            skipped = min(max(0, shard.first_row - first), count)
            if skipped < count:
                yield RawRows(
                    rows=np.arange(first + skipped, self.row, dtype=np.int64),
                    columns=pa.table(batch.slice(skipped, count - skipped).select(list(self._columns))),
                    bad=(),
                )

    def close(self) -> None:
        """Let go of the file."""
        self._parquet.close(force=True)


def _last_row(shard: Shard) -> int:
    """The first row behind the shard."""
    return shard.first_row + (shard.num_rows or 0)


def _covering_row_groups(footer: Any, shard: Shard) -> tuple[list[int], int, int, int]:
    """The row groups that hold the shard's rows, the numbers of their first row and of the one behind them, and
    bytes per row."""
    sizes = np.array([footer.row_group(index).num_rows for index in range(footer.num_row_groups)])
    ends = np.cumsum(sizes)
    covering = np.flatnonzero((ends > shard.first_row) & (ends - sizes < _last_row(shard)))
    num_bytes = sum(footer.row_group(int(index)).total_byte_size for index in covering)
    row_bytes = max(1, num_bytes // int(sizes[covering].sum()))
    return covering.tolist(), int((ends - sizes)[covering[0]]), int(ends[covering[-1]]), row_bytes
