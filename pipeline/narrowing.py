"""Which rows of a shard are tried together once the shard has killed its replica twice.

A row that ends its process (a bug in native code, a document that no memory holds) cannot be caught, only
told apart: the shard runs again in small pieces, each announced before it is tried. The piece that kills is
then tried row by row, and a row that has killed twice on its own is left out. Two deaths for the shard, one
for the piece and two for the row: not one more however long the shard is. Knows nothing of files or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deebert.packing import IntArray
from pipeline.board import History, Span

PIECE_ROWS = 32
"""About the root of what is read at a time: as many pieces to try as rows in the one that kills."""
PROOF = 2
"""Times that a row must have killed, on its own, to be left out: once may be chance."""
_MOST_BLIND_DEATHS = 4
_MOST_DEADLY = 64


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows to try by themselves, or one row to leave out."""

    start: int
    stop: int
    """Positions among the rows that were read together, exclusive."""
    is_deadly: bool
    """Whether the (one) row is proven to kill."""


def pieces(rows: IntArray, deadly: Sequence[Span]) -> Iterator[Piece]:
    """Cut rows that were read together.

    Args:
        rows: (N,) row numbers in the source file, ascending.
        deadly: spans that were being tried when a replica died.
    """
    proven = {first for (first, last), times in Counter(deadly).items() if first == last and times >= PROOF}
    suspect = np.zeros(len(rows), np.bool_)
    for first, last in deadly:
        suspect |= (first <= rows) & (rows <= last)
    for start in range(0, len(rows), PIECE_ROWS):
        stop = min(start + PIECE_ROWS, len(rows))
        if suspect[start:stop].any():
            for i in range(start, stop):
                yield Piece(start=i, stop=i + 1, is_deadly=int(rows[i]) in proven)
        else:
            yield Piece(start=start, stop=stop, is_deadly=False)


def why_hopeless(history: History) -> str | None:
    """Why a shard is not to be tried again; None while trying makes sense."""
    blind = history.deaths - len(history.deadly)
    if blind >= _MOST_BLIND_DEATHS:
        return f"quarantined: its replica died in each of {history.deaths} attempts, and no row can be blamed"
    if len(history.deadly) >= _MOST_DEADLY:
        return f"quarantined: its replica died in each of {history.deaths} attempts, too many rows to blame"
    return None
