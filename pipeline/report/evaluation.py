"""The evaluation as one self-contained page: pictures first, then the tables they are drawn from.

No scripts, nothing fetched, all user text escaped. Knows nothing of models or traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from deebert.version import __version__
from pipeline.report.curves import Picture, draw
from pipeline.report.evaluated import EvaluatedSet, state_evaluation, to_csv, to_markdown
from pipeline.report.ledger import Table
from pipeline.report.svg import FULL_WIDTH_INCHES, to_png, to_svg
from pipeline.report.templates import render


@dataclass(frozen=True, kw_only=True)
class _Shown:
    title: str
    svg: Markup
    is_wide: bool


@dataclass(frozen=True, kw_only=True)
class _Section:
    heading: str
    pictures: tuple[_Shown, ...]
    tables: tuple[Table, ...]


def evaluation_files(
    sets: Sequence[EvaluatedSet], *, model: str, task: str | None, origin: str
) -> dict[str, bytes]:
    """All files of an evaluation by name: ``report.html``, and each table and picture in two forms.

    Args:
        sets: names differ.
        model: its folder or hub id.
        task: a GLUE task, or None.
        origin: one line on precision and length.
    """
    files: dict[str, bytes] = {}
    sections = []
    for found in sets:
        tables = state_evaluation(found)
        for stem, table in tables.items():
            files[f"{stem}.csv"] = to_csv(table).encode()
            files[f"{stem}.md"] = f"{to_markdown(table)}\n".encode()
        shown = []
        for picture in draw(found):
            svg = to_svg(picture.figure, name=picture.stem, title=picture.title)
            files[f"{picture.stem}.svg"] = svg.encode()
            files[f"{picture.stem}.png"] = to_png(picture.figure)
            shown.append(_shown(picture, svg))
        heading = f"{found.name or 'Labelled set'}: {found.samples:,} samples"
        sections.append(_Section(heading=heading, pictures=tuple(shown), tables=tuple(tables.values())))
    page = render(
        "evaluation.html", sets=sections, model=model, task=task, origin=origin, version=__version__
    )
    return {**files, "report.html": page.encode()}


def _shown(picture: Picture, svg: str) -> _Shown:
    return _Shown(
        title=picture.title,
        svg=Markup(svg),
        is_wide=picture.figure.get_size_inches()[0] == FULL_WIDTH_INCHES,
    )
