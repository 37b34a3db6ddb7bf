"""Many runs side by side and summed: what all of them cost and saved. One page and one table for the terminal.

Arithmetic over what `write_report` found of each run. Knows nothing of parts or records' files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline.report import quantities as q
from pipeline.report.accounting import SECONDS_PER_HOUR, Accounting, Basis
from pipeline.report.facts import Fact, Facts
from pipeline.report.ledger import Table, brief_policy
from pipeline.report.svg import EXECUTED, FULL_WIDTH_INCHES, INK, LINE, SAVED, TEXT_POINTS, new_axes, to_svg
from pipeline.report.table import render_text
from pipeline.report.templates import render

if TYPE_CHECKING:
    from pipeline.report import Report

MAX_NAME_CHARS = 40


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What many runs come to. Runs of which nothing ran yet are in no sum but that of the rows."""

    text: str
    page: str


@dataclass(frozen=True, kw_only=True)
class _Sum:
    runs: int
    rows: int
    spent: float
    full_depth: float
    bases: Counter[Basis]
    """Of how many runs full depth is known in which way."""

    @property
    def saved(self) -> float | None:
        """Share of full depth's seconds."""
        return 1.0 - self.spent / self.full_depth if self.full_depth > 0 else None


def summarise(reports: Sequence[Report], *, price_per_hour: float | None, currency: str) -> Summary:
    """The runs of `reports`, in their order.

    Args:
        reports: of one run each.
        price_per_hour: of one replica, whichever run; None states no cost.
        currency: shown in front of amounts.
    """
    total = _total([report.accounting for report in reports])
    facts = Facts(
        status=_status(reports),
        warnings=tuple(f"{report.output}: {text}" for report in reports for text in report.facts.warnings),
        headline=tuple(_headline(total, price_per_hour, currency)),
        account=(),
        tables=(_table(reports, total, price_per_hour, currency),),
    )
    plot = _plot(reports) if total.full_depth > 0 else None
    page = render("summary.html", facts=facts, plot=None if plot is None else Markup(plot), runs=len(reports))
    return Summary(text=render_text(facts), page=page)


def _total(accounts: Sequence[Accounting]) -> _Sum:
    known = [(a.compute_seconds, a.full_depth) for a in accounts if a.full_depth is not None]
    return _Sum(
        runs=len(accounts),
        rows=sum(a.rows for a in accounts),
        spent=sum(spent for spent, _ in known),
        full_depth=sum(full.seconds for _, full in known),
        bases=Counter(full.basis for _, full in known),
    )


def _status(reports: Sequence[Report]) -> str:
    statuses = {report.record.status for report in reports}
    return statuses.pop() if len(statuses) == 1 else "not all finished"


def _headline(total: _Sum, price_per_hour: float | None, currency: str) -> Iterator[Fact]:
    yield Fact(name="Compute time saved", value=q.percent(total.saved), basis=_basis(total))
    yield Fact(name="Rows classified", value=q.count(total.rows), basis=f"in {q.count(total.runs)} runs")
    if total.saved is None:
        return
    yield Fact(
        name="Compute time",
        value=q.duration(total.spent),
        basis=f"{q.duration(total.full_depth)} at full depth; the model's, summed over replicas",
    )
    if price_per_hour is not None:
        with_exits, full = (_cost(s, price_per_hour) for s in (total.spent, total.full_depth))
        price = q.money(price_per_hour, currency)
        yield Fact(
            name="Model compute",
            value=q.money(with_exits, currency),
            basis=f"{q.money(full, currency)} at full depth; at {price} per replica-hour, without start-up and idle "
            "time",
        )


def _basis(total: _Sum) -> str:
    if total.saved is None:
        return "nothing ran yet"
    words: dict[Basis, str] = {
        "measured": "measured on control rows at full depth",
        "bounded": "bounded by the FLOPs saved, since the control rows ran in slower micro-batches",
        "expected": "expected from FLOPs, not measured",
    }
    found = {basis: total.bases[basis] for basis in words if total.bases[basis]}
    if len(found) == 1:
        return words[next(iter(found))]
    return "; ".join(f"of {runs} of {total.runs} runs {words[basis]}" for basis, runs in found.items())


def _cost(seconds: float, price_per_hour: float) -> float:
    return seconds / SECONDS_PER_HOUR * price_per_hour


def _table(reports: Sequence[Report], total: _Sum, price_per_hour: float | None, currency: str) -> Table:
    return Table(
        title="Run by run",
        columns=(
            "Output",
            "Status",
            "Operating point",
            "Rows",
            "Mean exit layer",
            "Compute",
            "At full depth",
            "Saved",
            "Agreement",
            *(("Cost", "Cost saved") if price_per_hour is not None else ()),
        ),
        rows=(
            *(_row(report, price_per_hour, currency) for report in reports),
            (
                "all",
                "",
                "",
                q.count(total.rows),
                "",
                q.duration(total.spent),
                q.duration(total.full_depth),
                q.percent(total.saved),
                "",
                *_cost_cells(total.spent, total.full_depth, price_per_hour, currency),
            ),
        ),
        note="Compute: of the model, summed over replicas. At full depth: measured on the control rows, (b) "
        "bounded by the FLOPs saved, where those took longer, or (e) expected from FLOPs. Agreement: of control rows "
        "with full depth. Seconds of unlike machines are summed as "
        "they are.",
    )


def _row(report: Report, price_per_hour: float | None, currency: str) -> tuple[str, ...]:
    accounting, record = report.accounting, report.record
    full, agreement = accounting.full_depth, accounting.agreement
    marks: dict[Basis, str] = {"measured": "", "bounded": " (b)", "expected": " (e)"}
    return (
        report.output,
        record.status,
        brief_policy(record.identity.exit_policy),
        q.count(accounting.rows),
        "–" if accounting.mean_exit_layer is None else f"{accounting.mean_exit_layer:.2f}",
        q.duration(accounting.compute_seconds),
        "–" if full is None else f"{q.duration(full.seconds)}{marks[full.basis]}",
        "–" if full is None else q.percent(accounting.seconds_saved),
        "–" if agreement is None else q.percent(agreement.share),
        *_cost_cells(accounting.compute_seconds, full.seconds if full else None, price_per_hour, currency),
    )


def _cost_cells(
    spent: float, full: float | None, price_per_hour: float | None, currency: str
) -> tuple[str, ...]:
    if price_per_hour is None:
        return ()
    if full is None:
        return ("–", "–")
    amounts = _cost(spent, price_per_hour), _cost(full - spent, price_per_hour)
    return tuple(q.money(amount, currency) for amount in amounts)


def _plot(reports: Sequence[Report]) -> str:
    """Compute time of each run, and what full depth would have added."""
    known = [(r, r.accounting.full_depth) for r in reports if r.accounting.full_depth is not None]
    figure, axes = new_axes(FULL_WIDTH_INCHES, 0.5 + 0.3 * len(known))
    places = range(len(known))
    # The end of a path tells runs apart.
    names = [q.shortened(report.output, MAX_NAME_CHARS, keeps_end=True) for report, _ in known]
    spent = [report.accounting.compute_seconds for report, _ in known]
    full = [found.seconds for _, found in known]
    axes.barh(places, spent, height=0.72, color=EXECUTED)
    spared = [max(0.0, f - s) for f, s in zip(full, spent, strict=True)]
    axes.barh(places, spared, left=spent, height=0.72, color=SAVED)
    style: dict[str, Any] = {
        "ha": "left",
        "va": "center",
        "size": TEXT_POINTS,
        "color": INK,
        "parse_math": False,
    }
    for place, (report, _) in enumerate(known):
        text = f"{q.duration(spent[place])}  ({q.percent(report.accounting.seconds_saved)} saved)"
        end = max(full[place], spent[place])
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", **style)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xlim(0, 1.35 * max([*full, *spent]))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set(visible=True, color=LINE)
    return to_svg(figure, name="runs", title="Compute time of each run, and what exits spared")
