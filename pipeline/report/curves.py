"""The paper's figures of one evaluated set, each a function from numbers to a matplotlib figure.

Quality against time and saving, expected against measured saving, quality per off-ramp, and samples per exit
layer (Xin et al., 2020, figures 2 to 5). Knows nothing of files or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.evaluated import EvaluatedPoint, EvaluatedSet, Measured, file_stem
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
    new_axes,
    strip,
)

MAX_HISTOGRAMS = 4
MIN_NAME_DISTANCE = 0.04
"""Of the saved share, between the names of neighbouring thresholds."""
_CURVE_HEIGHT_INCHES = 3.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure and what is said of it."""

    stem: str
    """Of its files; unique in the evaluation."""
    title: str
    figure: Figure


def draw(found: EvaluatedSet) -> tuple[Picture, ...]:
    """The figures of one set; expected against measured only where time was measured."""
    pictures = [quality_against_saving(found), *expected_against_measured(found)]
    return (*pictures, quality_per_off_ramp(found), samples_per_exit_layer(found))


def quality_against_saving(found: EvaluatedSet) -> Picture:
    """The score over the share saved: of layer work, and of time where it was measured."""
    curve = _by_saving(found.full, *(found.thresholds or found.certainties))
    timed = [(point, point.alone.saving) for point in curve if point.alone]
    # Beside it stand two half-width figures where time was measured, else one.
    figure, axes = new_axes(FULL_WIDTH_INCHES if timed else HALF_WIDTH_INCHES, _CURVE_HEIGHT_INCHES)
    if timed:
        _line(axes, [x for _, x in timed], [p for p, _ in timed], FULL_DEPTH, "s", "time, measured alone")
    _line(axes, [p.saving for p in curve], curve, EXECUTED, "o", "layer work, expected")
    if found.thresholds and found.certainties:
        learned = _by_saving(found.full, *found.certainties)
        _line(axes, [p.saving for p in learned], learned, MARK, "^", "layer work, learned exits")
    _static_marks(axes, [100 * point.saving for point in found.statics], found.statics)
    _name_thresholds(axes, found.thresholds or found.certainties)
    _graph(axes, "saved, %", f"{found.metrics[0]}, %")
    return Picture(stem=file_stem(found, "quality_saving"), title="Quality against saving", figure=figure)


def expected_against_measured(found: EvaluatedSet) -> tuple[Picture, ...]:
    """Time saved over the saving that Eq. 2 expects of the same samples; none where nothing was measured."""
    curves = {"": (found.full, *(found.thresholds or found.certainties))}
    if found.thresholds and found.certainties:
        curves[", learned exits"] = (found.full, *found.certainties)
    timed = {
        which: [(p.alone, p.engine) for p in curve if p.alone and p.engine] for which, curve in curves.items()
    }
    expected = [100 * m.expected_saving for pairs in timed.values() for pair in pairs for m in pair]
    if not expected:
        return ()
    figure, axes = new_axes(HALF_WIDTH_INCHES, _CURVE_HEIGHT_INCHES)
    # Of what was expected alone: time that exits cost must not stretch the axis.
    ends = [min(expected), max(expected)]
    axes.plot(ends, ends, color=LINE, linewidth=1)
    for which, pairs in timed.items():
        one, many = ("^:", "v:") if which else ("o-", "s-")
        _measured_line(axes, [alone for alone, _ in pairs], EXECUTED, one, f"one sample at a time{which}")
        _measured_line(axes, [engine for _, engine in pairs], MARK, many, f"through the engine{which}")
    _graph(axes, "expected saving of layer work, %", "time saved, %")
    picture = Picture(
        stem=file_stem(found, "expected_measured"),
        title="Expected against measured saving",
        figure=figure,
    )
    return (picture,)


def quality_per_off_ramp(found: EvaluatedSet) -> Picture:
    """The score of each off-ramp when it alone answers."""
    figure, axes = new_axes(HALF_WIDTH_INCHES, _CURVE_HEIGHT_INCHES)
    layers = [layer for layer, _ in found.off_ramps]
    scores = [100 * scores[0] for _, scores in found.off_ramps]
    axes.axhline(scores[-1], color=FULL_DEPTH, linewidth=1, linestyle=(0, (4, 3)), label="full depth")
    axes.plot(layers, scores, marker="o", markersize=5, color=EXECUTED, label="off-ramp")
    for layer, score in zip(layers, scores, strict=True):
        _label(axes, (layer, score), f"{score:.1f}")
    _static_marks(axes, [point.mean_exit_layer for point in found.statics], found.statics)
    axes.set_xticks(range(min(1, layers[0]), layers[-1] + 1))
    _graph(axes, "layer", f"{found.metrics[0]}, %")
    return Picture(stem=file_stem(found, "off_ramps"), title="Quality per off-ramp", figure=figure)


def samples_per_exit_layer(found: EvaluatedSet) -> Picture:
    """Share of samples that leave after each layer, for a few thresholds side by side."""
    chosen = _spread(found.thresholds or found.certainties, MAX_HISTOGRAMS) or [found.full]
    figure, first = new_axes(FULL_WIDTH_INCHES, 2.6)
    first.remove()
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, point in zip(panels, chosen, strict=True):
        strip(axes)
        _exit_bars(axes, point, first=min(1, found.off_ramps[0][0]))
    most = max(max(point.exit_histogram) / sum(point.exit_histogram) for point in chosen)
    panels[0].set_ylim(0, 115 * most)
    panels[0].set_ylabel("% of samples", size=SMALL_TEXT_POINTS)
    return Picture(stem=file_stem(found, "exit_layers"), title="Samples per exit layer", figure=figure)


def _exit_bars(axes: Axes, point: EvaluatedPoint, first: int) -> None:
    """From layer `first` on: 0, the embeddings, where they have an off-ramp."""
    total = sum(point.exit_histogram)
    layers = range(first, len(point.exit_histogram))
    shares = [100 * point.exit_histogram[layer] / total for layer in layers]
    colours = [*[EXECUTED] * (len(shares) - 1), SAVED]
    axes.bar(layers, shares, width=0.75, color=colours)
    axes.plot(
        point.mean_exit_layer,
        0.97,
        marker="v",
        markersize=6,
        color=MARK,
        transform=axes.get_xaxis_transform(),
    )
    axes.set_title(
        f"{point.name}: {100 * point.scores[0]:.1f} %, mean {point.mean_exit_layer:.2f}",
        size=SMALL_TEXT_POINTS,
        color=INK,
    )
    axes.set_xticks(layers[:: 1 if len(layers) <= 12 else 2])
    axes.tick_params(labelsize=7)
    axes.set_xlabel("exit layer", size=SMALL_TEXT_POINTS)


def _spread(points: Sequence[EvaluatedPoint], most: int) -> list[EvaluatedPoint]:
    """At most `most` of them, evenly spread, first and last included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _line(
    axes: Axes,
    savings: Sequence[float],
    points: Sequence[EvaluatedPoint],
    colour: str,
    marker: str,
    label: str,
) -> None:
    scores = [100 * point.scores[0] for point in points]
    axes.plot([100 * s for s in savings], scores, marker=marker, markersize=5, color=colour, label=label)


def _measured_line(axes: Axes, measured: Sequence[Measured], colour: str, style: str, label: str) -> None:
    marks = sorted(((100 * m.expected_saving, 100 * m.saving) for m in measured), key=lambda mark: mark[0])
    axes.plot(*zip(*marks, strict=True), style, markersize=5, color=colour, label=label)


def _by_saving(*points: EvaluatedPoint) -> list[EvaluatedPoint]:
    """Certainty thresholds rise as savings fall: in their own order, a line from full depth would loop back."""
    return sorted(points, key=lambda point: point.saving)


def _static_marks(axes: Axes, xs: Sequence[float], statics: Sequence[EvaluatedPoint]) -> None:
    """Diamonds, each with its depth beside it, and whether its layers are others than the first."""
    if not statics:
        return
    ys = [100 * point.scores[0] for point in statics]
    axes.scatter(xs, ys, marker="D", s=36, color=MARK, zorder=3, label="static, fewer layers")
    for x, y, point in zip(xs, ys, statics, strict=True):
        which = ", every other" if "every-other" in point.name else ""
        style: dict[str, Any] = {"ha": "left", "va": "center", "size": SMALL_TEXT_POINTS, "color": MUTED}
        text = f"{point.mean_exit_layer:.0f} layers{which}"
        axes.annotate(text, (x, y), (7, 0), textcoords="offset points", **style)


def _name_thresholds(axes: Axes, points: Sequence[EvaluatedPoint]) -> None:
    """Each threshold above its mark, unless its name would cover the one before."""
    last = -1.0
    for point in sorted(points, key=lambda point: point.saving):
        if point.saving - last >= MIN_NAME_DISTANCE:
            _label(axes, (100 * point.saving, 100 * point.scores[0]), point.name)
            last = point.saving


def _label(axes: Axes, xy: tuple[float, float], text: str) -> None:
    style: dict[str, Any] = {"ha": "center", "size": SMALL_TEXT_POINTS, "color": MUTED}
    axes.annotate(text, xy, (0, 6), textcoords="offset points", **style)


def _graph(axes: Axes, x: str, y: str) -> None:
    axes.spines["left"].set(visible=True, color=LINE)
    axes.grid(color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.margins(0.08, 0.14)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=SMALL_TEXT_POINTS, labelcolor=MUTED, loc="best")
