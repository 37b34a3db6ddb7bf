"""Tab-separated files as GLUE writes them: no quoting, a byte order mark perhaps, broken lines.

A lone quote is a character like any other (``csv.QUOTE_NONE``), and only a line feed ends a line: texts hold
stray carriage returns and Unicode line separators. Knows nothing of tasks or labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deebert.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TsvRow:
    """One line."""

    line: int
    """1-based, the header being line 1."""
    cells: tuple[str, ...] | None
    """The columns asked for, None where the line does not have the header's number of columns."""


def read_tsv_header(path: Path) -> tuple[str, ...]:
    """The column names.

    Raises:
        DataError: the file is empty or not UTF-8.
    """
    header = next(_lines(path), None)
    if not header:
        raise DataError(f"{str(path)!r} is empty: give a tab-separated file with a header line")
    return tuple(header.split("\t"))


def read_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[TsvRow]:
    """Every line after the header; empty lines are none.

    Args:
        path: the file.
        columns: names from the header.

    Raises:
        DataError: the file is not UTF-8.
    """
    header = read_tsv_header(path)
    places = [header.index(column) for column in columns]
    for number, line in enumerate(_lines(path), start=1):
        if number == 1 or not line:
            continue
        cells = line.split("\t")
        whole = len(cells) == len(header)
        yield TsvRow(line=number, cells=tuple(cells[i] for i in places) if whole else None)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 ({error.reason}): convert it") from error
