"""Labelled CSV and TSV files, read as the pipeline reads them: quotes count, and values are texts as they stand.

GLUE's own files, which have no quoting, are for `jobs.tsv`. Knows nothing of labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pyarrow as pa

from deebert.errors import DataError
from pipeline.errors import ReadError
from pipeline.input_schema import InputSchema, csv_columns
from pipeline.inputs import InputFile, discover
from pipeline.shard import Shard
from pipeline.source import read_shard

SUFFIXES = (".csv", ".tsv")
_BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class DelimitedRow:
    """One record."""

    row: int
    """From 0, without the header, as in `source_row` of dead letters."""
    cells: tuple[str, ...] | None
    """The columns asked for, None where the record cannot be read."""
    flaw: str = ""
    """Why it cannot."""


def read_delimited_header(path: Path) -> tuple[str, ...]:
    """The column names.

    Raises:
        DataError: the file is empty.
        InputError: it cannot be read, or has two columns of one name.
    """
    columns = csv_columns(_file(path))
    if columns is None:
        raise DataError(f"{str(path)!r} is empty: give a file with a header line")
    return tuple(columns)


def read_delimited(path: Path, columns: tuple[str, ...]) -> Iterator[DelimitedRow]:
    """Every record after the header; empty lines are none.

    Args:
        path: the file.
        columns: names from the header.

    Raises:
        DataError: the file cannot be read to its end.
    """
    whole = Shard(source=_file(path), first_row=0, num_rows=None, byte_range=None, estimated_rows=0)
    schema = InputSchema(text_columns=columns, kept=pa.schema([]))
    try:
        for batch in read_shard(
            whole, text_columns=columns, other_columns=(), schema=schema, batch_rows=_BATCH_ROWS
        ):
            cells = zip(*(column.to_pylist() for column in batch.texts), strict=True)
            good = [
                DelimitedRow(row=row, cells=row_cells)
                for row, row_cells in zip(batch.rows.tolist(), cells, strict=True)
            ]
            bad = [DelimitedRow(row=row.source_row, cells=None, flaw=row.reason) for row in batch.bad]
            yield from sorted((*good, *bad), key=attrgetter("row"))
    except ReadError as error:
        raise DataError(str(error)) from error


def _file(path: Path) -> InputFile:
    return discover([str(path)])[0]
