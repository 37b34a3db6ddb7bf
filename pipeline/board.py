"""What the replicas of a run tell each other and the driver: a Ray actor of its own, so that it outlives them.

Progress is for display and counts retries twice. Histories are how a row that kills its replica is found: the
replica that dies cannot say so, but it said what it began. Knows nothing of files or models.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

Span = tuple[int, int]
"""Rows of a source file, first and last."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What became of a shard so far in this run."""

    deaths: int
    """Replicas that died while they had the shard in hand."""
    deadly: tuple[Span, ...]
    """Rows that were being tried, by themselves, each time a replica died; a span may be there twice."""
    has_ended: bool
    """Whether a replica has come to an end with the shard: then only its answer was lost on the way."""


@dataclass(kw_only=True)
class _Case:
    deaths: int = 0
    deadly: list[Span] = field(default_factory=list)
    is_open: bool = False
    trying: Span | None = None
    has_ended: bool = False


class Board:
    """The actor's class."""

    def __init__(self) -> None:
        self._rows = 0
        self._exit_layers = 0
        self._cases: defaultdict[str, _Case] = defaultdict(_Case)

    def add(self, rows: int, exit_layers: int) -> None:
        """`rows` more have their answers; `exit_layers` is the sum of their exit layers."""
        self._rows += rows
        self._exit_layers += exit_layers

    def total(self) -> tuple[int, int]:
        """Rows and Σ exit layers so far."""
        return self._rows, self._exit_layers

    def history(self, part: str) -> History:
        """Asked by a replica that was handed the shard of `part`: whoever had it before has died."""
        case = self._cases[part]
        if case.is_open:
            case.deaths += 1
            if case.trying is not None:
                case.deadly.append(case.trying)
            case.is_open, case.trying = False, None
        return History(deaths=case.deaths, deadly=tuple(case.deadly), has_ended=case.has_ended)

    def deaths(self) -> int:
        """How often a replica died with a shard in hand, as far as its successor has asked."""
        return sum(case.deaths for case in self._cases.values())

    def begin(self, part: str) -> None:
        """A replica begins to work on the shard of `part`."""
        self._cases[part].is_open = True

    def trying(self, part: str, span: Span | None) -> None:
        """A replica has these rows of the shard in hand, and nothing else; None: no rows any more."""
        self._cases[part].trying = span

    def end(self, part: str) -> None:
        """A replica has come to an end with the shard of `part`, good or bad."""
        case = self._cases[part]
        case.is_open, case.trying, case.has_ended = False, None, True
