"""What planning found in each input file, kept with the output: the next run on it looks only into what is new.

Without it a scheduled run over a growing folder would open every file again each time, and read every byte of
JSON lines and text to count the lines. It spares time and nothing else: what it lacks is looked up in the file.
Knows nothing of how that is done (`pipeline.input_schema`, `pipeline.shards`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from pipeline.errors import OutputError
from pipeline.inputs import InputFile, first_line
from pipeline.shard import Shard
from pipeline.sink import CATALOG, Output

log = logging.getLogger(__name__)

Columns = Mapping[str, Any]
"""Column name -> Arrow type; the null type where no value was seen."""

_VERSION = 1
_EXTENT = pa.struct(
    [(name, pa.int64()) for name in ("first_row", "num_rows", "start", "end", "estimated_rows")]
)
_SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "fingerprint": pa.string(),
        "block_bytes": pa.int64(),
        "columns": pa.binary(),
        "shards": pa.list_(_EXTENT),
    }
)


@dataclass(kw_only=True)
class _Entry:
    """Of one file, as far as it has been looked into."""

    block_bytes: int = 0
    """The columns are those that so many bytes show."""
    columns: Columns | None = None
    shards: list[Shard] | None = None


class Catalog:
    """What is known of input files in one state each; planning asks it instead of the files.

    Several threads may ask, each about a file of its own.
    """

    def __init__(self, *, shard_rows: int) -> None:
        self._shard_rows = shard_rows
        self._kept: dict[tuple[str, str], dict[str, Any]] = {}
        self._entries: dict[InputFile, _Entry] = {}
        self._has_news = False

    @classmethod
    def of(cls, output: Output, *, shard_rows: int) -> Self:
        """What an earlier run on `output` left; nothing where it cut files into shards of another size."""
        catalog = cls(shard_rows=shard_rows)
        content = output.read(CATALOG)
        if content is not None:
            try:
                table = pa.ipc.open_file(content).read_all()
                if table.schema.metadata == catalog._metadata():
                    rows = table.select(_SCHEMA.names).to_pylist()
                    catalog._kept = {(row["path"], row["fingerprint"]): row for row in rows}
            except (pa.ArrowException, KeyError, OSError) as error:
                log.warning(
                    "%s cannot be read (%s): looking into all files", output.path(CATALOG), first_line(error)
                )
        return catalog

    def columns(
        self, file: InputFile, block_bytes: int, look: Callable[[], Columns | None]
    ) -> Columns | None:
        """The columns of a file, None where it has no rows to tell them from.

        Args:
            file: The file.
            block_bytes: How much of it is to be looked at, where columns are not declared.
            look: Looks at so much of it.
        """
        entry = self._entry(file)
        if entry.block_bytes < block_bytes:
            entry.columns, entry.block_bytes = look(), block_bytes
            self._has_news = True
        return entry.columns

    def shards(self, file: InputFile, cut: Callable[[], list[Shard]]) -> list[Shard]:
        """The shards of a file; `cut` cuts it."""
        entry = self._entry(file)
        if entry.shards is None:
            entry.shards = cut()
            self._has_news = True
        return entry.shards

    def save(self, output: Output) -> None:
        """Keep with `output` what is known of the files that were asked about."""
        if not self._has_news:
            return
        rows = [
            _to_row(file, entry)
            for file, entry in self._entries.items()
            if entry.block_bytes and entry.shards is not None and file.size_bytes is not None
        ]
        table = pa.Table.from_pylist(rows, _SCHEMA).replace_schema_metadata(self._metadata())
        stream = pa.BufferOutputStream()
        with pa.ipc.new_file(
            stream, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
        ) as file:
            file.write_table(table)
        with suppress(OutputError):  # what keeps a run from being faster is no reason to end it
            output.write(CATALOG, stream.getvalue())

    def _entry(self, file: InputFile) -> _Entry:
        if file not in self._entries:
            row = self._kept.get((file.path, file.fingerprint))
            self._entries[file] = _Entry() if row is None else _from_row(file, row)
        return self._entries[file]

    def _metadata(self) -> dict[bytes, bytes]:
        return {b"version": b"%d" % _VERSION, b"shard_rows": b"%d" % self._shard_rows}


def _to_row(file: InputFile, entry: _Entry) -> dict[str, Any]:
    columns = (
        None if entry.columns is None else pa.schema(list(entry.columns.items())).serialize().to_pybytes()
    )
    return {
        "path": file.path,
        "fingerprint": file.fingerprint,
        "block_bytes": entry.block_bytes,
        "columns": columns,
        "shards": [_extent(shard) for shard in entry.shards or ()],
    }


def _extent(shard: Shard) -> dict[str, int | None]:
    start, end = shard.byte_range or (None, None)
    return {
        "first_row": shard.first_row,
        "num_rows": shard.num_rows,
        "start": start,
        "end": end,
        "estimated_rows": shard.estimated_rows,
    }


def _from_row(file: InputFile, row: dict[str, Any]) -> _Entry:
    packed = row["columns"]
    schema = None if packed is None else pa.ipc.read_schema(pa.py_buffer(packed))
    return _Entry(
        block_bytes=row["block_bytes"],
        columns=None if schema is None else dict(zip(schema.names, schema.types, strict=True)),
        shards=[
            Shard(
                source=file,
                first_row=extent["first_row"],
                num_rows=extent["num_rows"],
                byte_range=None if extent["start"] is None else (extent["start"], extent["end"]),
                estimated_rows=extent["estimated_rows"],
            )
            for extent in row["shards"]
        ],
    )
