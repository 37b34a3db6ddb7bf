"""What other operating points would have cost on a run's rows, and what each of them costs on a larger corpus.

Rests on the run's own seconds and, for other operating points, on a trace of its model. Arithmetic and words;
knows nothing of trace files, pages or plots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.records import RunRecord
from pipeline.report import quantities as q
from pipeline.report.accounting import SECONDS_PER_HOUR, Accounting, FullDepth
from pipeline.report.ledger import Table, brief_policy

LARGEST_DRIFT = 0.05
"""Of the FLOPs saved, between trace and run: beyond it their texts are not alike."""
WELL_KNOWN_SAVING = 0.2
"""Of the FLOPs: from a run that saved so many on, its seconds beside full depth's tell what others would take."""
_UNKNOWN = "–"

Kind = Literal["full depth", "this run", "other"]


@dataclass(frozen=True, kw_only=True)
class TracedPoint:
    """What an operating point does on the texts of a trace. Shares are between 0 and 1."""

    name: str
    mark: str
    """The same where there is little room."""
    score: float
    other_answers: float | None
    """Share of the texts whose answer is not full depth's; None of a regression."""
    mean_exit_layer: float
    flops_saved: float
    """Off-ramps deducted."""


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A trace of the run's model, read at several operating points."""

    texts: int
    precision: str
    """That the texts were traced in."""
    metric: str
    """Of the scores."""
    full: TracedPoint
    own: TracedPoint
    """The run's operating point."""
    others: tuple[TracedPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """One operating point on the run's rows."""

    name: str
    mark: str
    """The same where there is little room."""
    kind: Kind
    mean_exit_layer: float
    seconds: float
    """Of compute, for the rows of the run."""
    traced: TracedPoint | None
    """None without a trace."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Operating points side by side, at `documents` documents like those of the run."""

    documents: int
    rows: int
    """Of the run."""
    prospects: tuple[Prospect, ...]
    """Full depth first, then from the slowest to the fastest."""
    price_per_hour: float | None
    currency: str
    precision: str
    """Of the run."""
    what_if: WhatIf | None
    drift: float
    """FLOPs saved by the run's operating point: on the trace, less those on the run's rows."""

    def replica_hours(self, prospect: Prospect) -> float:
        """Of compute, for `documents`."""
        return prospect.seconds / SECONDS_PER_HOUR * self.documents / self.rows

    def cost(self, prospect: Prospect) -> float | None:
        """Of those hours; None without a price."""
        return None if self.price_per_hour is None else self.replica_hours(prospect) * self.price_per_hour

    def saved(self, prospect: Prospect) -> float:
        """Share of full depth's seconds."""
        return 1.0 - prospect.seconds / self.prospects[0].seconds


def look_ahead(
    record: RunRecord,
    accounting: Accounting,
    *,
    documents: int,
    what_if: WhatIf | None,
    price_per_hour: float | None,
    currency: str,
) -> Outlook | None:
    """The outlook of a run; None where nothing ran yet.

    Args:
        record: of the run.
        accounting: of the same.
        documents: to project to.
        what_if: the trace of other operating points.
        price_per_hour: of one replica.
        currency: shown in front of amounts.
    """
    full_depth, mean_exit_layer = accounting.full_depth, accounting.mean_exit_layer
    if full_depth is None or mean_exit_layer is None or accounting.compute_seconds <= 0:
        return None
    full = Prospect(
        name="full depth",
        mark="full depth",
        kind="full depth",
        mean_exit_layer=float(record.model.num_layers),
        seconds=full_depth.seconds,
        traced=what_if.full if what_if else None,
    )
    own = Prospect(
        name=f"this run ({brief_policy(record.identity.exit_policy)})",
        mark="this run",
        kind="this run",
        mean_exit_layer=mean_exit_layer,
        seconds=accounting.compute_seconds,
        traced=what_if.own if what_if else None,
    )
    others = () if what_if is None else (_foretold(point, accounting, full_depth) for point in what_if.others)
    return Outlook(
        documents=documents,
        rows=accounting.rows,
        prospects=(full, *sorted((own, *others), key=lambda prospect: -prospect.seconds)),
        price_per_hour=price_per_hour,
        currency=currency,
        precision=record.identity.precision,
        what_if=what_if,
        drift=what_if.own.flops_saved - (accounting.flops_saved or 0.0) if what_if else 0.0,
    )


def _foretold(point: TracedPoint, accounting: Accounting, full_depth: FullDepth) -> Prospect:
    return Prospect(
        name=point.name,
        mark=point.mark,
        kind="other",
        mean_exit_layer=point.mean_exit_layer,
        seconds=_seconds(accounting, full_depth, (1.0 - point.flops_saved) * accounting.full_depth_flops),
        traced=point,
    )


def _seconds(accounting: Accounting, full_depth: FullDepth, flops: float) -> float:
    """Between the run and full depth on the line through both; beyond the run on that line, or nearer to proportion.

    What does not shrink with the FLOPs (steps, embeddings, emptier micro-batches) shows in the line's height at none.
    But of a run that hardly saved FLOPs the line's slope is the difference of two all but equal measurements: the less
    it saved, the more the slope is that of proportion.
    """
    spent, executed, full = accounting.compute_seconds, accounting.executed_flops, accounting.full_depth_flops
    if flops >= full:  # off-ramps that nobody left at
        return full_depth.seconds * flops / full
    fewer = full - executed
    line = (full_depth.seconds - spent) / fewer if fewer > 0 else 0.0
    if flops >= executed:
        return spent + (flops - executed) * line
    # The line is never steeper than proportion (`FullDepth.seconds`); exits that cost time do not earn it back.
    weight = min(1.0, max(0.0, fewer / full) / WELL_KNOWN_SAVING)
    slope = weight * max(0.0, line) + (1.0 - weight) * spent / executed
    return spent + (flops - executed) * slope


def outlook_warnings(outlook: Outlook) -> Iterator[str]:
    """What a reader must know before believing the other operating points."""
    if outlook.what_if is None or abs(outlook.drift) <= LARGEST_DRIFT:
        return
    traced = outlook.what_if.own.flops_saved
    yield (
        f"The texts of the trace are unlike the run's: at the run's operating point {q.percent(traced)} of the FLOPs "
        f"are saved on them, {q.percent(traced - outlook.drift)} on the rows of the run. Trace texts of this corpus "
        "to compare other operating points."
    )


def outlook_table(outlook: Outlook) -> Table:
    """Operating points side by side."""
    what_if, has_price = outlook.what_if, outlook.price_per_hour is not None
    on_trace = () if what_if is None else (f"{what_if.metric} %", "Other answers")
    return Table(
        title=f"What {q.count(outlook.documents)} documents would take",
        columns=(
            "Operating point",
            *on_trace,
            "Mean exit layer",
            "Compute saved",
            "Replica-hours",
            *(("Cost",) if has_price else ()),
        ),
        rows=tuple(_row(outlook, prospect) for prospect in outlook.prospects),
        note=" ".join(_note(outlook)),
    )


def _row(outlook: Outlook, prospect: Prospect) -> tuple[str, ...]:
    traced, cost = prospect.traced, outlook.cost(prospect)
    on_trace = () if traced is None else (f"{100 * traced.score:.2f}", _share(traced.other_answers))
    return (
        prospect.name,
        *on_trace,
        f"{prospect.mean_exit_layer:.2f}",
        q.percent(outlook.saved(prospect)),
        q.hours(outlook.replica_hours(prospect)),
        *(() if cost is None else (q.money(cost, outlook.currency),)),
    )


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else q.percent(value, digits=2)


def _note(outlook: Outlook) -> Iterator[str]:
    yield (
        f"Model compute for documents like the {q.count(outlook.rows)} of this run, on machines like its own; no "
        "start-up, idle time or storage."
    )
    if outlook.what_if is not None:
        yield (
            f"Scores, other answers (than full depth's) and the mean exit layers of other operating points are of the "
            f"{q.count(outlook.what_if.texts)} texts of the trace; their seconds lie on the line through this run's "
            "and full depth's, at the FLOPs that they execute there; of a run that saved less than a fifth of them, "
            "nearer to proportion."
        )
        if outlook.what_if.precision != outlook.precision:
            yield f"The trace is in {outlook.what_if.precision}, the run was in {outlook.precision}."
