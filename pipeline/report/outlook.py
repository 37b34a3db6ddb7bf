"""What other operating points would have cost on a run's rows, and what each of them costs on a larger corpus.

Rests on the run's own seconds and, for other operating points, on a trace of its model. Arithmetic and words;
knows nothing of trace files, pages or plots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.report import quantities as q
from pipeline.report.accounting import DOCUMENTS_PER_PRICE, SECONDS_PER_HOUR, Accounting, FullDepth
from pipeline.report.ledger import Table

LARGEST_DRIFT = 0.05
"""Of the FLOPs saved, between trace and run: beyond it their texts are not alike."""
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
    accounting: Accounting,
    *,
    policy: str,
    num_layers: int,
    documents: int | None,
    what_if: WhatIf | None,
    price_per_hour: float | None,
    currency: str,
) -> Outlook | None:
    """The outlook of a run; None where neither documents nor a trace ask for one, or nothing ran yet.

    Args:
        accounting: of the run.
        policy: the run's operating point, in words.
        num_layers: of its model.
        documents: to project to; a million where only a trace is given.
        what_if: the trace of other operating points.
        price_per_hour: of one replica.
        currency: shown in front of amounts.
    """
    full_depth, mean_exit_layer = accounting.full_depth, accounting.mean_exit_layer
    nothing_asked = documents is None and what_if is None
    if nothing_asked or full_depth is None or mean_exit_layer is None or accounting.compute_seconds <= 0:
        return None
    full = Prospect(
        name="full depth",
        mark="full depth",
        kind="full depth",
        mean_exit_layer=float(num_layers),
        seconds=full_depth.seconds,
        traced=what_if.full if what_if else None,
    )
    own = Prospect(
        name=f"this run ({policy})",
        mark="this run",
        kind="this run",
        mean_exit_layer=mean_exit_layer,
        seconds=accounting.compute_seconds,
        traced=what_if.own if what_if else None,
    )
    others = tuple(
        Prospect(
            name=point.name,
            mark=point.mark,
            kind="other",
            mean_exit_layer=point.mean_exit_layer,
            seconds=_seconds(accounting, full_depth, (1.0 - point.flops_saved) * accounting.full_depth_flops),
            traced=point,
        )
        for point in (what_if.others if what_if else ())
    )
    return Outlook(
        documents=DOCUMENTS_PER_PRICE if documents is None else documents,
        rows=accounting.rows,
        prospects=(full, *sorted((own, *others), key=lambda prospect: -prospect.seconds)),
        price_per_hour=price_per_hour,
        currency=currency,
        what_if=what_if,
        drift=what_if.own.flops_saved - (accounting.flops_saved or 0.0) if what_if else 0.0,
    )


def _seconds(accounting: Accounting, full_depth: FullDepth, flops: float) -> float:
    """On the line through the two points that are known: the run's, and full depth.

    What does not shrink with the FLOPs (steps, embeddings, emptier micro-batches) shows in the line's height at none.
    Where exits brought no time, or nobody left, seconds are taken in proportion.
    """
    spent, executed = accounting.compute_seconds, accounting.executed_flops
    fewer = accounting.full_depth_flops - executed
    slope = (full_depth.seconds - spent) / fewer if fewer > 0 else 0.0
    proportional = spent / executed
    # A steeper line than the proportional one would promise more than all of the time.
    slope = min(slope, proportional) if slope > 0 else proportional
    return spent + (flops - executed) * slope


def outlook_warnings(outlook: Outlook | None) -> Iterator[str]:
    """What a reader must know before believing the other operating points."""
    if outlook is None or outlook.what_if is None or abs(outlook.drift) <= LARGEST_DRIFT:
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
            "and full depth's, at the FLOPs that they execute there."
        )
