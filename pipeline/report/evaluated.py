"""What an evaluation found, in numbers, and the same as tables.

Plain values, so that figures, page and terminal show one thing. Knows nothing of models or how the numbers
came about.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from pipeline.report.ledger import Table

FULL_DEPTH_NAME = "full depth"
_UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point's time on some samples, against full depth's on the same in the same rounds."""

    samples: int
    rounds: int
    seconds: float
    saving: float
    """Share of full depth's time saved."""
    expected_saving: float
    """Eq. 2 on these very samples."""
    in_earlier_rounds: bool = False
    """Than those of the other points: so was the full depth that `saving` is against."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedPoint:
    """Full depth, a threshold or a static baseline on one set."""

    name: str
    scores: tuple[float, ...]
    """By each metric, the task's score first; 0 to 1."""
    mean_exit_layer: float
    speed_up: float
    saving: float
    """Expected, Eq. 2."""
    flop_saving: float
    exit_histogram: tuple[int, ...]
    """Entry i is exit layer i, entry 0 the embeddings. Empty for a static baseline, where nobody exits."""
    alone: Measured | None = None
    """One sample at a time: the paper's measure. None where nothing was measured."""
    engine: Measured | None = None
    """Through the engine."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedSet:
    """Everything found on one labelled set."""

    name: str
    """"", or which of a task's sets."""
    samples: int
    metrics: tuple[str, ...]
    """Names, the task's score first."""
    off_ramps: tuple[tuple[int, tuple[float, ...]], ...]
    """(layer, score by each metric), the final classifier last."""
    full: EvaluatedPoint
    thresholds: tuple[EvaluatedPoint, ...]
    """Of the entropy; empty where answers have none."""
    statics: tuple[EvaluatedPoint, ...]
    certainties: tuple[EvaluatedPoint, ...] = ()
    """Thresholds of the certainty; empty where the model does not learn to exit."""

    @property
    def points(self) -> tuple[EvaluatedPoint, ...]:
        """All of them, full depth first."""
        return (self.full, *self.thresholds, *self.certainties, *self.statics)


def file_stem(found: EvaluatedSet, what: str) -> str:
    """``thresholds``, or ``matched_thresholds`` where a task has several sets: none overwrites another."""
    return f"{found.name}_{what}" if found.name else what


def state_evaluation(found: EvaluatedSet) -> dict[str, Table]:
    """The tables of one set by file stem."""
    tables = {"off_ramps": _off_ramp_table(found), "thresholds": _threshold_table(found)}
    if any(point.alone for point in found.points):
        tables["timings"] = _timing_table(found)
    return {file_stem(found, what): table for what, table in tables.items()}


def to_csv(table: Table) -> str:
    """With the header first."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows((table.columns, *table.rows))
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """Columns padded, so that it reads as plain text too; no newline at the end."""
    lines = (table.columns, *table.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = (
        "| " + " | ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in lines
    )
    return "\n".join([head, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *body])


def _title(found: EvaluatedSet, what: str) -> str:
    return f"{what} ({found.name})" if found.name else what


def _off_ramp_table(found: EvaluatedSet) -> Table:
    return Table(
        title=_title(found, "Each off-ramp alone"),
        columns=("layer", *(f"{metric} %" for metric in found.metrics)),
        rows=tuple((str(layer), *map(_percent2, scores)) for layer, scores in found.off_ramps),
        note=f"{found.samples:,} samples, all answered by the one off-ramp; the last is the final classifier.",
    )


def _threshold_table(found: EvaluatedSet) -> Table:
    return Table(
        title=_title(found, "What each threshold keeps and saves"),
        columns=(
            "threshold",
            *(f"{metric} %" for metric in found.metrics),
            "of full %",
            "mean exit layer",
            "layer speed-up",
            "saved %",
            "FLOPs saved %",
            "time saved, alone %",
            "time saved, engine %",
        ),
        rows=tuple(_threshold_row(point, found.full) for point in found.points),
        note="Saved: of layer work, expected (DeeBERT, Eq. 2). FLOPs: each sample by its length, with the "
        "off-ramps that it passes. Time: measured against full depth, one sample at a time and through the engine.",
    )


def _threshold_row(point: EvaluatedPoint, full: EvaluatedPoint) -> tuple[str, ...]:
    return (
        point.name,
        *map(_percent2, point.scores),
        _percent2(point.scores[0] / full.scores[0]) if full.scores[0] else _UNKNOWN,
        f"{point.mean_exit_layer:.2f}",
        f"{point.speed_up:.2f}",
        _percent1(point.saving),
        _percent1(point.flop_saving),
        _UNKNOWN if point.alone is None else _percent1(point.alone.saving),
        _UNKNOWN if point.engine is None else _percent1(point.engine.saving),
    )


def _timing_table(found: EvaluatedSet) -> Table:
    timed = [(p.name, p.alone, p.engine) for p in found.points if p.alone and p.engine]
    _, alone, engine = timed[0]  # full depth
    earlier = "".join(
        f" {name}: {a.samples:,} alone and {e.samples:,} in the engine, the median of {a.rounds} earlier rounds, "
        "against full depth's time in those."
        for name, a, e in timed
        if a.in_earlier_rounds
    )
    ways = ("expected saving, {} %", "ms a sample, {}", "time saved, {} %")
    return Table(
        title=_title(found, "Measured time"),
        columns=("threshold", *(way.format(which) for which in ("alone", "engine") for way in ways)),
        rows=tuple(
            (f"{name}, earlier" if a.in_earlier_rounds else name, *_time_cells(a), *_time_cells(e))
            for name, a, e in timed
        ),
        note=f"Alone: {alone.samples:,} samples, one at a time, as in the paper. Engine: {engine.samples:,} samples "
        f"handed over at once. The median of {alone.rounds} rounds in which all took their turn. Expected: Eq. 2 on "
        f"the samples timed.{earlier}",
    )


def _time_cells(measured: Measured) -> tuple[str, ...]:
    milliseconds = 1000 * measured.seconds / measured.samples
    return _percent1(measured.expected_saving), f"{milliseconds:.3f}", _percent1(measured.saving)


def _percent2(value: float) -> str:
    return f"{100 * value:.2f}"


def _percent1(value: float) -> str:
    return f"{100 * value:.1f}"
