"""The report's plots, each a function from numbers to an SVG string.

Numbers stand at their marks, one colour means one thing throughout: blue is work executed, pale what exits
saved, grey full depth. Knows nothing of records or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from pipeline.report import quantities as q
from pipeline.report.accounting import Accounting, Cost
from pipeline.report.evidence import ScoreRange
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
    THIRD_WIDTH_INCHES,
    new_axes,
    to_svg,
)

BAR_SHARE = 0.72
MAX_LABELS = 12
MAX_HALF_WIDTH_LAYERS = 12
MAX_NAME_CHARS = 24


def fits_half_width(num_layers: int) -> bool:
    """Whether the numbers over so many bars stand side by side in half the page's width."""
    return num_layers <= MAX_HALF_WIDTH_LAYERS


def exit_histogram(accounting: Accounting) -> str:
    """Share of the rows, or of their windows, that left after each layer, and the mean."""
    figure, axes = new_axes(FULL_WIDTH_INCHES, 2.5)
    shares = [100 * layer.exit_windows / max(accounting.windows, 1) for layer in accounting.layers]
    what = "rows" if accounting.windows == accounting.rows else "windows"
    first = accounting.layers[0].layer
    _layer_bars(axes, shares, EXECUTED, first=first)
    for layer, share in enumerate(shares, start=first):
        _above(axes, layer, share, _share_label(share))
    if accounting.mean_exit_layer is not None:
        _mean_mark(axes, accounting.mean_exit_layer)
    _layer_axis(axes, accounting.layers[-1].layer, 1.1 * max(shares, default=0.0), first=first)
    axes.set_xlabel(f"exit layer (bars: % of {what})")
    return to_svg(figure, name="exits", title=f"Share of {what} per exit layer")


def layer_work(accounting: Accounting) -> str:
    """Tokens that ran through each layer, and those that exits spared it, in percent of full depth."""
    layers = [layer for layer in accounting.layers if layer.layer > 0]  # no exit spares the embeddings
    figure, axes = new_axes(_layer_width(len(layers)), 2.7)
    total = max(accounting.tokens, 1)
    executed = [100 * layer.tokens / total for layer in layers]
    saved = [100 * layer.saved_tokens / total for layer in layers]
    _layer_bars(axes, executed, EXECUTED)
    _layer_bars(axes, saved, SAVED, bottom=executed)
    for i, share in enumerate(executed):
        _above(axes, i + 1, 100.0, f"{share:.0f}")
    _layer_axis(axes, len(executed), 100.0)
    axes.set_xlabel("layer (numbers: % of tokens executed)")
    return to_svg(figure, name="work", title="Layer work executed and saved, per layer")


def seconds_per_layer(accounting: Accounting) -> str:
    """Seconds spent in each layer, and where the control sample puts full depth."""
    figure, axes = new_axes(_layer_width(len(accounting.layers)), 2.7)
    seconds = [layer.seconds for layer in accounting.layers]
    full_depth = [layer.full_depth_seconds for layer in accounting.layers]
    first = accounting.layers[0].layer
    _layer_bars(axes, seconds, EXECUTED, first=first)
    top = max([*seconds, *(full or 0.0 for full in full_depth)], default=0.0)
    for layer, (spent, full) in enumerate(zip(seconds, full_depth, strict=True), start=first):
        crosses = full is not None and 0 <= full - spent < 0.1 * top
        _above(axes, layer, full if full is not None and crosses else spent, f"{spent:.3g}", points=7.5)
        if full is not None:
            axes.hlines(full, layer - BAR_SHARE / 2, layer + BAR_SHARE / 2, colors=MARK, linewidth=1.6)
    _layer_axis(axes, accounting.layers[-1].layer, top, first=first)
    axes.set_xlabel("layer (numbers: seconds with exits)")
    return to_svg(figure, name="seconds", title="Seconds per layer")


def flops_comparison(accounting: Accounting) -> str:
    """FLOPs at full depth and with exits."""
    values = (accounting.full_depth_flops, accounting.executed_flops)
    labels = (q.flops(values[0]), q.flops(values[1]))
    return _comparison("flops", "FLOPs at full depth and with exits", values, labels, "counted")


def seconds_comparison(accounting: Accounting) -> str | None:
    """Compute seconds at full depth and with exits; None if full depth is not known."""
    if accounting.full_depth is None:
        return None
    values = (accounting.full_depth.seconds, accounting.compute_seconds)
    labels, basis = (q.duration(values[0]), q.duration(values[1])), accounting.full_depth.basis
    return _comparison("compute", "Compute time at full depth and with exits", values, labels, basis)


def cost_comparison(cost: Cost | None) -> str | None:
    """Cost per million documents at full depth and with exits; None without a price."""
    if cost is None:
        return None
    values = (cost.full_depth, cost.with_exits)
    labels = (q.money(values[0], cost.currency), q.money(values[1], cost.currency))
    title = "Model compute per million documents at full depth and with exits"
    return _comparison("cost", title, values, labels, cost.basis)


def label_distribution(labels: Sequence[str], rows: Sequence[int], *, of: int, one_each: bool = True) -> str:
    """Rows per predicted label, the most frequent first; the tail is summed.

    Args:
        labels: names.
        rows: of each label.
        of: all rows, which the shares are of.
        one_each: whether a row has one label.
    """
    names, counts = _head_and_tail(labels, rows)
    figure, axes = new_axes(HALF_WIDTH_INCHES, 0.55 + 0.28 * len(names))
    texts, places = [f"{q.count(n)}  ({q.percent(n / max(of, 1))})" for n in counts], range(len(names))
    if len(labels) > MAX_LABELS and not one_each:
        texts[-1] = q.count(counts[-1])  # a row that has two of these labels is in it twice: no share of rows
    axes.barh(places, counts, height=BAR_SHARE, color=EXECUTED)
    for place, (n, text) in enumerate(zip(counts, texts, strict=True)):
        _beside(axes, n, place, text)
    axes.set_yticks(places, [q.shortened(name, MAX_NAME_CHARS) for name in names], parse_math=False)
    _lying_axis(axes, max(counts, default=0), room=1.6)
    return to_svg(figure, name="labels", title="Rows per predicted label")


def score_ranges(ranges: Sequence[ScoreRange], num_layers: int) -> str:
    """Median and 10th to 90th percentile of the score of the rows that left after each layer."""
    figure, axes = new_axes(_layer_width(num_layers), 2.7)
    for part in ranges:
        axes.vlines(part.layer, part.low, part.high, colors=SAVED, linewidth=7)
        axes.plot(part.layer, part.median, marker="o", markersize=5, color=EXECUTED)
        _above(axes, part.layer, part.high, f"{part.median:.2f}", points=7.5)
    _layer_axis(axes, num_layers, 1.0, first=min([1, *(part.layer for part in ranges)]))
    axes.set_ylim(min([0.5, *(part.low for part in ranges)]) - 0.05, 1.06)
    axes.set_yticks([tick for tick in (0.0, 0.25, 0.5, 0.75, 1.0) if tick >= axes.get_ylim()[0]])
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("exit layer (numbers: median score)")
    return to_svg(figure, name="scores", title="Score per exit layer")


def _comparison(
    name: str, title: str, values: tuple[float, float], labels: tuple[str, str], basis: str
) -> str:
    figure, axes = new_axes(THIRD_WIDTH_INCHES, 1.15)
    axes.barh((0, 1), values, height=BAR_SHARE, color=(FULL_DEPTH, EXECUTED))
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        _beside(axes, value, place, label)
    axes.set_yticks((0, 1), (f"full depth\n({basis})", "with exits"))
    _lying_axis(axes, max(values), room=1.8)
    return to_svg(figure, name=name, title=title)


def _layer_width(num_layers: int) -> float:
    return HALF_WIDTH_INCHES if fits_half_width(num_layers) else FULL_WIDTH_INCHES


def _layer_bars(
    axes: Axes, heights: Sequence[float], colour: str, bottom: Sequence[float] | None = None, first: int = 1
) -> None:
    axes.bar(range(first, first + len(heights)), heights, width=BAR_SHARE, color=colour, bottom=bottom)


def _layer_axis(axes: Axes, num_layers: int, top: float, first: int = 1) -> None:
    axes.set_xlim(first - 0.6, num_layers + 0.6)
    axes.set_ylim(0, 1.16 * top if top > 0 else 1.0)
    axes.set_xticks(range(first, num_layers + 1))
    axes.set_yticks([])


def _lying_axis(axes: Axes, top: float, room: float) -> None:
    """Largest value on top, and room at the right for the numbers."""
    axes.set_xlim(0, room * top if top > 0 else 1.0)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set(visible=True, color=LINE)


def _above(axes: Axes, x: float, y: float, text: str, points: float = SMALL_TEXT_POINTS) -> None:
    _number(axes, (x, y), text, offset=(0, 3), points=points, ha="center", va="baseline")


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    _number(axes, (x, y), text, offset=(5, 0), points=TEXT_POINTS, ha="left", va="center")


def _number(
    axes: Axes,
    xy: tuple[float, float],
    text: str,
    *,
    offset: tuple[float, float],
    points: float,
    **align: str,
) -> None:
    # A dollar sign is money here, not the start of a formula.
    style: dict[str, Any] = {"size": points, "color": INK, "parse_math": False, **align}
    axes.annotate(text, xy, offset, textcoords="offset points", **style)


def _mean_mark(axes: Axes, mean: float) -> None:
    """At the top, above all bars: a line through them would cross their numbers."""
    axes.plot(mean, 0.95, marker="v", markersize=6, color=MARK, transform=axes.get_xaxis_transform())
    axes.annotate(
        f"mean {mean:.2f}",
        (mean, 0.95),
        (6, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="center",
        size=SMALL_TEXT_POINTS,
        color=MUTED,
    )


def _share_label(share_percent: float) -> str:
    return f"{share_percent:.1f}" if share_percent >= 0.05 or share_percent == 0 else "<0.1"


def _head_and_tail(labels: Sequence[str], rows: Sequence[int]) -> tuple[list[str], list[int]]:
    ordered = sorted(zip(labels, rows, strict=True), key=lambda pair: -pair[1])
    head = ordered if len(ordered) <= MAX_LABELS else ordered[: MAX_LABELS - 1]
    tail = ordered[len(head) :]
    names, counts = [name for name, _ in head], [n for _, n in head]
    if tail:
        names, counts = [*names, f"{len(tail)} others"], [*counts, sum(n for _, n in tail)]
    return names, counts
