"""Rows as a format's reader hands them over, and the rows that it, or the checks after it, refuse.

The common ground of the readers (`pipeline.source_lines`, `pipeline.source_csv`) and `pipeline.source`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

EXCERPT_CHARACTERS = 200

Rows = npt.NDArray[np.int64]
"""Row numbers in a file."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be classified; it goes to the dead letters."""

    source_row: int
    """Row number in the file, from 0; in JSON lines and text, the line number."""
    reason: str
    """What is wrong with it."""
    excerpt: str
    """Beginning of the raw value; bytes that are not UTF-8 as backslash escapes."""


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """Consecutive rows of a file, decoded but unchecked."""

    rows: Rows
    """Row number of each row of `columns`, int64, ascending."""
    columns: pa.Table
    """The columns that were asked for, each once."""
    bad: tuple[BadRow, ...]
    """Rows among or after these that could not be decoded at all."""


def excerpt(raw: bytes | str) -> str:
    """The beginning of a raw value, as text that can be printed and stored."""
    if isinstance(raw, str):
        raw = raw[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace")
    # A UTF-8 character has at most 4 bytes: cutting here splits none that is shown.
    return raw[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")[:EXCERPT_CHARACTERS]
