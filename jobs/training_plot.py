"""Draws a training log: the loss of every classifier over the steps of each stage.

Knows nothing of how the log came about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.report.svg import (
    FULL_WIDTH_INCHES,
    INK,
    LINE,
    MUTED,
    SMALL_TEXT_POINTS,
    strip,
)

Record = dict[str, Any]


def draw_training_log(path: Path) -> Path:
    """Write the drawing of a log beside it, as SVG.

    Args:
        path: a log that `deebert.training` wrote.

    Returns:
        The drawing's path.
    """
    from deebert.training import read_log

    records = read_log(path)
    stages = sorted({r["stage"] for r in records if "losses" in r})
    figure = Figure(figsize=(FULL_WIDTH_INCHES, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    if stages:
        panels = figure.subplots(1, len(stages), squeeze=False)[0]
        for axes, stage in zip(panels, stages, strict=True):
            _draw_stage(axes, stage, [r for r in records if r["stage"] == stage])
    drawing = path.with_suffix(".svg")
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    return drawing


def _draw_stage(axes: Axes, stage: int, records: list[Record]) -> None:
    strip(axes)
    curves = _curves(records, "losses")
    depth = max([1, *map(int, curves)])
    for layer, points in curves.items():
        colour = INK if int(layer) == depth and stage != 2 else colormaps["viridis"](0.9 * int(layer) / depth)
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=layer)
    for layer, points in _curves(records, "held_out_losses").items():
        colour = colormaps["viridis"](0.9 * int(layer) / depth)
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, linestyle=":")
    seconds = max((r["seconds"] for r in records if "seconds" in r), default=0.0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7, handlelength=1)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_xlabel(f"step of stage {stage} ({seconds:.0f} s)")
    axes.set_title("loss after each layer", size=SMALL_TEXT_POINTS, color=MUTED, loc="left")


def _curves(records: list[Record], key: str) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) by layer; a classifier that is not in a stage's loss has none."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for layer, loss in record.get(key, {}).items():
            if loss is not None:
                curves.setdefault(layer, []).append((record["step"], loss))
    return curves
