"""CSV and TSV files as raw rows, streamed through Arrow's parser.

Values are strings as they stand; rows with a wrong number of columns are bad rows, and so numbered that
every record of the file but the header has its number (empty lines are no records).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.input_schema import csv_delimiter
from pipeline.inputs import InputFile
from pipeline.opening import open_stream
from pipeline.raw_rows import BadRow, RawRows, excerpt

FIRST_BLOCK_BYTES = 1 << 20
LARGEST_BLOCK_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"


def read_csv(file: InputFile, schema: Any) -> Iterator[RawRows]:
    """All rows of the file.

    Arrow stops at a record that is larger than its block, and when bytes that are not UTF-8 stand in a
    row with a wrong number of columns. Both are rare: then the file is read again, in another way, and
    what has been handed out is skipped.
    """
    block_bytes, as_latin1, next_row = FIRST_BLOCK_BYTES, False, 0
    while True:
        try:
            for part in _CsvPass(file, schema, block_bytes, as_latin1).parts():
                if fresh := _from_row(part, next_row):
                    yield fresh
                    next_row = _end(fresh)
            return
        except UnicodeDecodeError:
            as_latin1 = True
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error):
                raise
            if block_bytes >= LARGEST_BLOCK_BYTES:
                size = f"{LARGEST_BLOCK_BYTES >> 20} MiB"
                raise pa.ArrowInvalid(f"a record is larger than {size}, or a quote is not closed") from error
            block_bytes *= 4


class _CsvPass:
    """One attempt to read a file, with one block size and one view of its bytes."""

    def __init__(self, file: InputFile, schema: Any, block_bytes: int, as_latin1: bool) -> None:
        self._file = file
        self._schema = schema
        self._block_bytes = block_bytes
        self._as_latin1 = as_latin1
        self._refused: list[BadRow] = []  # parsed, but not yet handed out

    def parts(self) -> Iterator[RawRows]:
        """The rows, block by block, from the first."""
        next_row = 0
        with open_stream(self._file) as stream:
            for batch in self._batches(stream):
                if batch.num_rows:
                    part = self._number(batch, next_row)
                    next_row = _end(part)
                    yield part
        if self._refused:
            nothing = pa.Table.from_pylist([], schema=self._schema)
            yield RawRows(rows=np.empty(0, np.int64), columns=nothing, bad=tuple(self._refused))

    def _batches(self, stream: Any) -> Iterator[Any]:
        view = _Latin1View(stream) if self._as_latin1 else _Utf8View(stream)
        names = [_as_latin1(name) if self._as_latin1 else name for name in self._schema.names]
        try:
            # Without threads, refused rows come with their numbers.
            yield from pa_csv.open_csv(
                pa.PythonFile(view, mode="r"),
                read_options=pa_csv.ReadOptions(use_threads=False, block_size=self._block_bytes),
                parse_options=pa_csv.ParseOptions(
                    delimiter=csv_delimiter(self._file),
                    newlines_in_values=True,
                    invalid_row_handler=self._refuse,
                ),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=names, column_types=dict.fromkeys(names, pa.string()), check_utf8=False
                ),
            )
        except pa.ArrowInvalid as error:
            if "Empty CSV" not in str(error):  # nothing, or a header without even a newline
                raise

    def _refuse(self, row: Any) -> str:
        raw = row.text.encode("latin-1") if self._as_latin1 else row.text
        reason = f"the row has {row.actual_columns} columns, not {row.expected_columns}"
        # Arrow counts records from 1 and the header as one.
        self._refused.append(BadRow(source_row=row.number - 2, reason=reason, excerpt=excerpt(raw)))
        return "skip"

    def _number(self, batch: Any, next_row: int) -> RawRows:
        """Give the batch the first free row numbers: those that no refused row has."""
        candidates = np.arange(next_row, next_row + batch.num_rows + len(self._refused), dtype=np.int64)
        taken = np.isin(candidates, [row.source_row for row in self._refused])
        rows = candidates[~taken][: batch.num_rows]
        before = [row for row in self._refused if row.source_row < rows[-1]]
        self._refused = [row for row in self._refused if row.source_row > rows[-1]]
        arrays = [_from_latin1(column) if self._as_latin1 else column for column in batch.columns]
        return RawRows(rows=rows, columns=pa.table(arrays, names=self._schema.names), bad=tuple(before))


class _Utf8View:
    """A stream that raises UnicodeDecodeError where it is not UTF-8."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read(self, num_bytes: int) -> bytes:
        chunk: bytes = self._stream.read(num_bytes)
        self._decoder.decode(chunk, final=not chunk)
        return chunk


class _Latin1View:
    """A stream of any bytes as UTF-8, each byte as the character of that number: it can be undone."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_start = True

    def read(self, num_bytes: int) -> bytes:
        chunk: bytes = self._stream.read(max(3, num_bytes // 2))  # a byte becomes two at most
        if self._is_start:
            chunk, self._is_start = chunk.removeprefix(_BOM), False
        return chunk.decode("latin-1").encode("utf-8")


def _as_latin1(name: str) -> str:
    return name.encode("utf-8").decode("latin-1")


def _from_latin1(column: Any) -> Any:
    raw = [value.encode("latin-1") for value in column.to_pylist()]
    return pa.array(raw, pa.binary()).view(pa.string())


def _end(part: RawRows) -> int:
    """The number after the last row of a part."""
    last_bad = part.bad[-1].source_row if part.bad else -1
    return 1 + max(last_bad, int(part.rows[-1]) if len(part.rows) else -1)


def _from_row(part: RawRows, first: int) -> RawRows | None:
    """What a part holds from row `first` on, if anything."""
    if first <= (part.rows[0] if len(part.rows) else 0):
        return part
    fresh = part.rows >= first
    bad = tuple(row for row in part.bad if row.source_row >= first)
    if not (fresh.any() or bad):
        return None
    return RawRows(rows=part.rows[fresh], columns=part.columns.filter(pa.array(fresh)), bad=bad)
