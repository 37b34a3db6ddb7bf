"""The outlook's pictures: what each operating point keeps against what it saves, and what a corpus takes at each.

Knows nothing of how the numbers came about.
"""

from __future__ import annotations

from typing import Any

from pipeline.report import quantities as q
from pipeline.report.outlook import Outlook, Prospect
from pipeline.report.svg import (
    EXECUTED,
    FULL_DEPTH,
    FULL_WIDTH_INCHES,
    HALF_WIDTH_INCHES,
    INK,
    LINE,
    MARK,
    MUTED,
    SAVED,
    SMALL_TEXT_POINTS,
    TEXT_POINTS,
    new_axes,
    to_svg,
)

_COLOURS = {"full depth": FULL_DEPTH, "this run": EXECUTED, "other": SAVED}
_MIN_NAME_DISTANCE = 3.0
"""Of the percentage saved, between the names of neighbouring points."""


def quality_against_compute(outlook: Outlook) -> str | None:
    """The score on the trace over the compute saved; None without a trace."""
    if outlook.what_if is None:
        return None
    found = [
        (100 * outlook.saved(p), 100 * p.traced.score, p) for p in outlook.prospects if p.traced is not None
    ]
    found.sort(key=lambda point: point[0])
    figure, axes = new_axes(HALF_WIDTH_INCHES, 3.0)
    axes.plot([x for x, _, _ in found], [y for _, y, _ in found], color=LINE, linewidth=1.2, zorder=1)
    last = float("-inf")
    for x, y, prospect in found:
        own = prospect.kind == "this run"
        colour = MARK if own else FULL_DEPTH if prospect.kind == "full depth" else EXECUTED
        axes.plot(x, y, marker="o", markersize=8 if own else 5, color=colour, linestyle="none", zorder=2)
        if own or x - last >= _MIN_NAME_DISTANCE:
            style: dict[str, Any] = {
                "ha": "center",
                "size": SMALL_TEXT_POINTS,
                "color": INK if own else MUTED,
            }
            axes.annotate(prospect.mark, (x, y), (0, -14 if own else 7), textcoords="offset points", **style)
            last = x
    axes.spines["left"].set(visible=True, color=LINE)
    axes.grid(color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.margins(0.1, 0.2)
    axes.set_xlabel("compute saved, %")
    axes.set_ylabel(f"{outlook.what_if.metric} on the trace, %")
    return to_svg(figure, name="outlook", title="Quality against compute saved, at other operating points")


def corpus_hours(outlook: Outlook) -> str:
    """Replica-hours, and their cost where there is a price, at each operating point."""
    prospects = outlook.prospects
    width = HALF_WIDTH_INCHES if outlook.what_if else FULL_WIDTH_INCHES
    figure, axes = new_axes(width, max(0.5 + 0.26 * len(prospects), 1.15))
    hours = [outlook.replica_hours(prospect) for prospect in prospects]
    axes.barh(range(len(hours)), hours, height=0.72, color=[_COLOURS[p.kind] for p in prospects])
    for place, (prospect, value) in enumerate(zip(prospects, hours, strict=True)):
        style: dict[str, Any] = {"ha": "left", "va": "center", "size": TEXT_POINTS, "color": INK}
        text = _hours_and_cost(outlook, prospect)
        axes.annotate(text, (value, place), (5, 0), textcoords="offset points", parse_math=False, **style)
    axes.set_yticks(range(len(prospects)), [p.mark for p in prospects], parse_math=False)
    axes.set_xlim(0, 1.6 * max(hours))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set(visible=True, color=LINE)
    return to_svg(figure, name="corpus", title=f"Replica-hours for {q.count(outlook.documents)} documents")


def _hours_and_cost(outlook: Outlook, prospect: Prospect) -> str:
    cost = outlook.cost(prospect)
    hours = f"{q.hours(outlook.replica_hours(prospect))} h"
    return hours if cost is None else f"{hours}  ({q.money(cost, outlook.currency)})"
