"""The report as plain text, for the terminal. Lays out `Facts`; adds nothing to them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from pipeline.report import quantities as q
from pipeline.report.facts import Fact, Facts
from pipeline.report.ledger import Table

LINE_WIDTH = 110


def render_text(facts: Facts) -> str:
    """Warnings, headline, account and the number tables; the run's identity is left to the page."""
    blocks = [
        *(_warning(warning) for warning in facts.warnings),
        *(_facts(some) for some in (facts.headline, facts.account) if some),
        *(_table(table) for table in facts.tables if not table.is_text),
    ]
    return "\n\n".join(blocks) + "\n"


def _warning(text: str) -> str:
    return textwrap.fill(q.printable(text, " "), LINE_WIDTH, initial_indent="!! ", subsequent_indent="   ")


def _facts(facts: tuple[Fact, ...]) -> str:
    room = LINE_WIDTH - sum(max(len(text) for text in column) + 2 for column in _names_and_values(facts))
    rows = [row for fact in facts for row in _wrapped(fact, room)]
    return _align(rows, right=(1,))


def _names_and_values(facts: tuple[Fact, ...]) -> tuple[list[str], list[str]]:
    return [fact.name for fact in facts], [fact.value for fact in facts]


def _wrapped(fact: Fact, room: int) -> Iterator[tuple[str, ...]]:
    first, *rest = textwrap.wrap(fact.basis, max(room, 20)) or [""]
    yield (fact.name, fact.value, first)
    yield from (("", "", line) for line in rest)


def _table(table: Table) -> str:
    right = tuple(range(1, len(table.columns)))
    headings, *rows = (tuple(q.printable(cell, " ") for cell in row) for row in (table.columns, *table.rows))
    lines = _align([headings, *rows], right=right).split("\n")
    rule = "-" * max(len(line) for line in lines)
    notes = textwrap.wrap(table.note, LINE_WIDTH)
    return "\n".join([table.title, rule, lines[0], rule, *lines[1:], *notes])


def _align(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(_pad(row, widths, right)).rstrip() for row in rows)


def _pad(row: tuple[str, ...], widths: list[int], right: tuple[int, ...]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if i in right else cell.ljust(width)
