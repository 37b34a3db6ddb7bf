"""Files of lines, text and JSON lines, as raw rows: vectorised, and line by line only where that fails.

A line ends with a newline (a carriage return before it belongs to the ending); what follows the last
newline is a line if it is not empty. Rows are numbered by lines, blank ones included.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pa_json

from pipeline.inputs import first_line
from pipeline.opening import open_file, open_stream
from pipeline.raw_rows import BadRow, RawRows, Rows, excerpt
from pipeline.shard import Shard

BLOCK_BYTES = 1 << 20
_LINES_BY_HAND = 64  # a failing range of JSON lines is halved down to this, then parsed line by line
_LONGEST_INTEGER_DIGITS = 1000
_BOM = b"\xef\xbb\xbf"
_NEWLINE, _RETURN, _OPEN, _CLOSE = b"\n\r{}"
_SPACES = list(b" \t\r\v\f")

Bytes = npt.NDArray[np.uint8]


def read_text(shard: Shard, schema: Any) -> Iterator[RawRows]:
    """Every line is a document of the one column ``text``; an empty line is an empty document."""
    row = shard.first_row
    for block in line_blocks(shard):
        texts = _text_lines(block)
        rows = np.arange(row, row + len(texts), dtype=np.int64)
        yield RawRows(rows=rows, columns=pa.table([texts] * len(schema), names=schema.names), bad=())
        row += len(texts)


def read_jsonl(shard: Shard, schema: Any, text_columns: Collection[str]) -> Iterator[RawRows]:
    """Every line is a JSON object; fields that a line lacks are null; blank lines hold no row."""
    row = shard.first_row
    for block in line_blocks(shard):
        lines = _JsonLines(block, row, schema, text_columns)
        yield lines.parse()
        row += lines.num_lines


def line_blocks(shard: Shard) -> Iterator[bytes]:
    """The shard's bytes, in blocks of about `BLOCK_BYTES` that end where a line does."""
    carried: list[bytes] = []  # a line's beginning, in pieces: long lines are joined once
    for chunk in _chunks(shard):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield b"".join([*carried, chunk[:cut]])
            carried = []
        carried.append(chunk[cut:])
    if rest := b"".join(carried):
        yield rest


def _chunks(shard: Shard) -> Iterator[bytes]:
    """The shard's bytes as they are read, without a byte order mark."""
    if shard.byte_range is None:
        with open_stream(shard.source) as stream:
            yield stream.read(BLOCK_BYTES).removeprefix(_BOM)
            yield from iter(lambda: stream.read(BLOCK_BYTES), b"")
        return
    offset, end = shard.byte_range
    with open_file(shard.source) as stored:
        if offset:  # some servers give the beginning only
            stored.seek(offset)
        while offset < end:
            chunk = stored.read(min(BLOCK_BYTES, end - offset))
            if not chunk:
                raise EOFError(f"the file ends before byte {end}")
            yield chunk if offset else chunk.removeprefix(_BOM)
            offset += len(chunk)


def _line_bounds(content: Bytes) -> tuple[Rows, Rows]:
    """Where each line's content starts, and where it ends, without its line ending."""
    ends = np.flatnonzero(content == _NEWLINE)
    if len(content) and content[-1] != _NEWLINE:
        ends = np.append(ends, len(content))
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    has_return = (ends > starts) & (content[ends - 1] == _RETURN)
    return starts, ends - has_return


def _text_lines(block: bytes) -> Any:
    """The lines of a block as one string array: the block without line endings, and offsets into it."""
    content = np.frombuffer(block, dtype=np.uint8)
    starts, ends = _line_bounds(content)
    is_text = content != _NEWLINE
    is_text[ends[ends < len(content)]] = False  # newlines, and the returns before them
    wide = len(content) > np.iinfo(np.int32).max
    offsets = np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int64 if wide else np.int32)
    kind = pa.LargeStringArray if wide else pa.StringArray
    return kind.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(content[is_text]))


class _JsonLines:
    """One block of JSON lines."""

    def __init__(self, block: bytes, first_row: int, schema: Any, text_columns: Collection[str]) -> None:
        content = np.frombuffer(block, dtype=np.uint8)
        starts, ends = _line_bounds(content)
        filled = ends > starts
        # Lines that begin with white space are rare enough to look at one by one.
        for index in np.flatnonzero(np.isin(content[starts], _SPACES) & filled):
            filled[index] = bool(block[starts[index] : ends[index]].strip())
        self.num_lines = len(ends)
        self._block, self._schema, self._text_columns = block, schema, text_columns
        self._rows = first_row + np.flatnonzero(filled)
        self._starts, self._ends = starts[filled], ends[filled]
        self._is_object = (content[self._starts] == _OPEN) & (content[self._ends - 1] == _CLOSE)

    def parse(self) -> RawRows:
        """The lines as rows, those that cannot be parsed as bad rows."""
        pieces, bad = self._parse_range(0, len(self._rows)) if len(self._rows) else ([], [])
        good = ~np.isin(self._rows, [row.source_row for row in bad])
        columns = pa.Table.from_batches(pieces, schema=self._schema)
        return RawRows(rows=self._rows[good], columns=columns, bad=tuple(bad))

    def _parse_range(self, first: int, last: int) -> tuple[list[Any], list[BadRow]]:
        try:
            return self._parse_together(first, last), []
        except (pa.ArrowException, UnicodeDecodeError):
            if last - first <= _LINES_BY_HAND:
                return self._parse_each(first, last)
        middle = (first + last) // 2
        pieces, bad = self._parse_range(first, middle)
        more_pieces, more_bad = self._parse_range(middle, last)
        return pieces + more_pieces, bad + more_bad

    def _parse_together(self, first: int, last: int) -> list[Any]:
        # The parser takes values, not lines: `{} {}` is two rows and an object may span lines. If every
        # line begins with { and ends with }, no object spans two (none has } and { side by side), so
        # each line holds at least one; if there are as many rows as lines, each holds exactly one.
        if not self._is_object[first:last].all():
            raise pa.ArrowInvalid("a line is not an object")
        data = self._block[self._starts[first] : self._ends[last - 1]]
        data.decode("utf-8")  # the parser does not look at the encoding of what it skips
        table = _read_json(data, self._schema)
        if len(table) != last - first:
            raise pa.ArrowInvalid("a line holds more than one value")
        return list(table.to_batches())

    def _parse_each(self, first: int, last: int) -> tuple[list[Any], list[BadRow]]:
        """Python reads more than Arrow does (repeated names, say), and says what is wrong."""
        records: dict[int, bytes] = {}
        bad: list[BadRow] = []
        for index in range(first, last):
            try:
                records[index] = _record(self._line(index), self._schema, self._text_columns)
            except _BadLineError as error:
                bad.append(self._bad_row(index, str(error)))
        try:
            return _read_json(b"\n".join(records.values()), self._schema).to_batches(), bad
        except pa.ArrowException:
            pieces, more_bad = self._convert_each(records)
        return pieces, sorted(bad + more_bad, key=lambda row: row.source_row)

    def _convert_each(self, records: dict[int, bytes]) -> tuple[list[Any], list[BadRow]]:
        pieces, bad = [], []
        for index, record in records.items():
            try:
                pieces += _read_json(record, self._schema).to_batches()
            except pa.ArrowException as error:
                bad.append(self._bad_row(index, f"a value does not convert: {first_line(error)}"))
        return pieces, bad

    def _line(self, index: int) -> bytes:
        return self._block[self._starts[index] : self._ends[index]]

    def _bad_row(self, index: int, reason: str) -> BadRow:
        return BadRow(source_row=int(self._rows[index]), reason=reason, excerpt=excerpt(self._line(index)))


def _read_json(lines: bytes, schema: Any) -> Any:
    if not lines:
        return schema.empty_table()
    return pa_json.read_json(
        pa.BufferReader(lines),
        read_options=pa_json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
        parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


class _BadLineError(ValueError):
    """Says why a line is not a row."""


def _record(line: bytes, schema: Any, text_columns: Collection[str]) -> bytes:
    """The line again, in plain JSON and with the columns of the schema only."""
    try:
        record = json.loads(line.decode("utf-8"), parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise _BadLineError("the line is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"the line is not JSON: {first_line(error)}") from error
    if not isinstance(record, dict):
        raise _BadLineError(f"the line is {_kind(record)}, not a JSON object")
    values = {field.name: _value(record.get(field.name), field, text_columns) for field in schema}
    return json.dumps(values).encode()


def _value(value: Any, field: Any, text_columns: Collection[str]) -> Any:
    """A JSON value as it goes into the field; a kept string may be any value's JSON text."""
    if value is None or not pa.types.is_string(field.type):
        return _nested(value, field.type)
    if not isinstance(value, str):
        if field.name in text_columns:
            raise _BadLineError(f"column {field.name!r} is {_kind(value)}, not text")
        value = json.dumps(value, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadLineError(f"column {field.name!r} holds half a surrogate pair")
    return value


def _nested(value: Any, type_: Any) -> Any:
    """A JSON value as it goes into the type: where that has a string, any value's JSON text."""
    if pa.types.is_string(type_) and value is not None and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if pa.types.is_list(type_) and isinstance(value, list):
        return [_nested(item, type_.value_type) for item in value]
    if pa.types.is_struct(type_) and isinstance(value, dict):
        return {field.name: _nested(value.get(field.name), field.type) for field in type_.fields}
    return value


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < _LONGEST_INTEGER_DIGITS else float(digits)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")
