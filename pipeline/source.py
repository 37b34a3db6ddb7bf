"""A shard -> batches of good rows, and the bad ones: every input row is in one of the two, once.

Streams in bounded memory. Reading and checking are vectorised; only where a block fails is it looked at
more closely. Knows nothing of tokens, models or output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ReadError
from pipeline.input_schema import InputSchema, plain_type, without_views
from pipeline.inputs import current_fingerprint, first_line
from pipeline.opening import arrow_batch_rows, arrow_batches, is_read_failure
from pipeline.raw_rows import BadRow, RawRows, Rows, excerpt
from pipeline.shard import Shard
from pipeline.source_csv import read_csv
from pipeline.source_lines import read_jsonl, read_text
from pipeline.source_parquet import ParquetReaders, read_parquet

__all__ = ["BadRow", "ParquetReaders", "SourceBatch", "read_shard"]


@dataclass(frozen=True, kw_only=True)
class SourceBatch:
    """Consecutive rows of a shard, checked."""

    rows: Rows
    """Row number in the file of each good row, int64, ascending."""
    texts: tuple[Any, ...]
    """One string or large string array per text column: valid UTF-8, without nulls."""
    kept: pa.Table
    """Id and kept columns of the good rows, in the types of the `InputSchema`."""
    bad: tuple[BadRow, ...]
    """The rows that are not among the good ones, in order."""

    def slice(self, start: int, stop: int) -> SourceBatch:
        """The good rows `start`..`stop` (exclusive)."""
        count = stop - start
        return SourceBatch(
            rows=self.rows[start:stop],
            texts=tuple(column.slice(start, count) for column in self.texts),
            kept=self.kept.slice(start, count),
            bad=(),
        )

    def pieces(self, max_bytes: int) -> Iterator[SourceBatch]:
        """The good rows, cut so that each piece holds at most `max_bytes` of text, or a single row."""
        ends = np.cumsum(np.sum([_byte_lengths(column) for column in self.texts], axis=0))
        start, rows = 0, len(self.rows)
        while start < rows:
            before = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
            yield self.slice(start, stop)
            start = stop


class Readers:
    """What the shards of one file leave each other in one process; several threads may read.

    Args:
        most_kept: see `ParquetReaders`.
    """

    def __init__(self, *, most_kept: int = 1) -> None:
        self.parquet = ParquetReaders(most_kept=most_kept)
        self.batch_rows = lru_cache(maxsize=64)(arrow_batch_rows)


def read_shard(
    shard: Shard,
    *,
    text_columns: Sequence[str],
    other_columns: Sequence[str],
    schema: InputSchema,
    batch_rows: int,
    readers: Readers | None = None,
) -> Iterator[SourceBatch]:
    """Read a shard in batches of at most `batch_rows` good rows, in the order of the file.

    `readers`, where given, spare the shards of one file from decoding or counting what lies before them again.

    Raises ReadError when the file cannot be read, or is no longer the one that was planned.
    """
    kept = pa.schema([schema.kept.field(name) for name in dict.fromkeys(other_columns)])
    texts = [pa.field(name, pa.string()) for name in dict.fromkeys(text_columns)]
    needed = pa.schema([*texts, *(field for field in kept if field.name not in text_columns)])
    raws = _read(shard, needed, text_columns, batch_rows, readers or Readers())
    yield from _reading(
        shard,
        (
            _checked(_slice(raw, start, batch_rows), text_columns, kept)
            for raw in raws
            for start in range(0, max(1, len(raw.rows)), batch_rows)
        ),
    )


def _reading(shard: Shard, parts: Iterator[SourceBatch]) -> Iterator[SourceBatch]:
    path = shard.source.path
    if shard.flaw is not None:
        raise ReadError(shard.flaw)
    try:
        if current_fingerprint(shard.source) != shard.source.fingerprint:
            raise ReadError(f"{path} has changed since the run was planned; run again to plan it anew")
        yield from parts
    except Exception as error:
        if not is_read_failure(shard.source, error):
            raise
        raise ReadError(f"{path} could not be read as {shard.source.format}: {first_line(error)}") from error


def _read(
    shard: Shard, needed: Any, text_columns: Sequence[str], batch_rows: int, readers: Readers
) -> Iterator[RawRows]:
    match shard.source.format:
        case "parquet":
            return read_parquet(shard, needed.names, batch_rows, readers.parquet)
        case "arrow":
            return _read_arrow(shard, needed.names, readers)
        case "csv":
            return read_csv(shard.source, needed)
        case "jsonl":
            return read_jsonl(shard, needed, text_columns)
        case "text":
            return read_text(shard, needed)


def _read_arrow(shard: Shard, names: list[str], readers: Readers) -> Iterator[RawRows]:
    """From the record batch on that holds the shard's first row, which takes no counting where that is row 0."""
    starts = np.cumsum([0, *readers.batch_rows(shard.source)]) if shard.first_row else np.zeros(1, np.int64)
    first = int(np.searchsorted(starts, shard.first_row, side="right")) - 1
    yield from _number(
        shard, arrow_batches(shard.source, columns=names, first=first), int(starts[first]), names
    )


def _number(shard: Shard, batches: Iterator[Any], row: int, names: list[str]) -> Iterator[RawRows]:
    """The shard's part of record batches that begin with row number `row` of the file."""
    end = None if shard.num_rows is None else shard.first_row + shard.num_rows
    for batch in batches:
        first = max(row, shard.first_row)
        last = row + batch.num_rows if end is None else min(row + batch.num_rows, end)
        if first < last:
            columns = pa.table(batch.slice(first - row, last - first).select(names))
            yield RawRows(rows=np.arange(first, last, dtype=np.int64), columns=columns, bad=())
        row += batch.num_rows
        if end is not None and row >= end:
            return


def _slice(raw: RawRows, start: int, count: int) -> RawRows:
    """`count` rows from `start`, with the bad ones between them."""
    rows = raw.rows[start : start + count]
    after = np.inf if start + count >= len(raw.rows) else raw.rows[start + count]
    before = -1 if start == 0 else rows[0]
    bad = tuple(row for row in raw.bad if before < row.source_row < after)
    return RawRows(rows=rows, columns=_without_views(raw.columns.slice(start, count)), bad=bad)


def _without_views(columns: Any) -> Any:
    import pyarrow.compute as pc

    arrays = [
        column
        if (type_ := without_views(column.type)) == column.type
        # Whether it is UTF-8 is checked later, row by row.
        else pc.cast(column, options=pc.CastOptions(target_type=type_, allow_invalid_utf8=True))
        for column in columns.columns
    ]
    return pa.table(arrays, names=columns.column_names)


def _checked(raw: RawRows, text_columns: Sequence[str], kept: Any) -> SourceBatch:
    reasons: dict[int, BadRow] = {}
    for name in dict.fromkeys(text_columns):
        for index, reason in _text_faults(name, _column(raw.columns, name)):
            reasons.setdefault(index, _bad_row(raw, index, name, reason))
    for field in kept:
        for index in _failing(_column(raw.columns, field.name), field.type):
            reason = f"column {field.name!r} does not convert to {field.type}"
            reasons.setdefault(index, _bad_row(raw, index, field.name, reason))
    rows, columns = raw.rows, raw.columns
    if reasons:
        good = np.ones(len(rows), dtype=bool)
        good[list(reasons)] = False
        rows, columns = rows[good], columns.filter(pa.array(good))
    return SourceBatch(
        rows=rows,
        texts=tuple(_converted(_column(columns, name), None) for name in text_columns),
        kept=_kept_table(rows, columns, kept),
        bad=tuple(sorted([*raw.bad, *reasons.values()], key=lambda row: row.source_row)),
    )


def _byte_lengths(texts: Any) -> Rows:
    """(N,) int64 of a string or large string array without nulls."""
    import pyarrow.compute as pc

    return np.asarray(pc.binary_length(texts).cast(pa.int64()))


def _kept_table(rows: Rows, columns: Any, kept: Any) -> Any:
    arrays = [_converted(_column(columns, field.name), field.type) for field in kept]
    # Without a column at first, a table of none would forget how many rows it has.
    return pa.table([pa.array(rows), *arrays], names=["", *kept.names]).select(range(1, 1 + len(kept)))


def _text_faults(name: str, column: Any) -> Iterator[tuple[int, str]]:
    nulls = _converted(column, None).is_null()
    for index in np.flatnonzero(nulls.to_numpy(zero_copy_only=False)).tolist():
        yield index, f"column {name!r} is null"
    for index in _failing(column, None):
        yield index, f"column {name!r} is not valid UTF-8"


def _column(columns: Any, name: str) -> Any:
    chunks = columns.column(name)
    return chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()


def _converted(column: Any, type_: Any) -> Any:
    """The column without dictionary, view or extension, as `type_` (None: string or large string)."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if type_ is None:
        type_ = column.type if pa.types.is_large_string(column.type) else plain_type(column.type)
        type_ = pa.string() if pa.types.is_null(type_) else type_
    return column if column.type == type_ else column.cast(type_)


def _failing(column: Any, type_: Any, first: int = 0) -> list[int]:
    """Indices of the values that do not convert to valid ones: found by halving, so few cost little."""
    try:
        _converted(column, type_).validate(full=True)
        return []
    except (pa.ArrowException, UnicodeError):
        if len(column) == 1:
            return [first]
    # `take` and not `slice`: the check of a slice of nested values looks at all of them.
    half = len(column) // 2
    left, right = (column.take(pa.array(range(*span))) for span in ((0, half), (half, len(column))))
    return _failing(left, type_, first) + _failing(right, type_, first + half)


def _bad_row(raw: RawRows, index: int, name: str, reason: str) -> BadRow:
    return BadRow(source_row=int(raw.rows[index]), reason=reason, excerpt=_shown(raw.columns, name, index))


def _shown(columns: Any, name: str, index: int) -> str:
    value = _converted(_column(columns.slice(index, 1), name), None)[0]
    if not value.is_valid:
        return ""
    if hasattr(value, "as_buffer"):
        return excerpt(value.as_buffer().to_pybytes())
    try:
        return excerpt(repr(value.as_py()))
    except UnicodeDecodeError:  # somewhere inside a nested value
        return f"({value.type})"
