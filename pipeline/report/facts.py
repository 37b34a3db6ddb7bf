"""The words of the report: headline, account and tables, said once for the page and for the terminal.

Every number is given with what it rests on. Knows nothing of HTML, plots or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.records import RunRecord
from pipeline.report import quantities as q
from pipeline.report.accounting import Accounting, Basis, Cost
from pipeline.report.evidence import Evidence
from pipeline.report.ledger import Table, state_tables
from pipeline.report.outlook import Outlook, outlook_table, outlook_warnings

MEASURE_IT = "classify with --control 0.01, into a new output or with --overwrite, to measure it"
PRICE_IT = "give --price-per-hour to state it"
SMALL_BATCH_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the account."""

    name: str
    value: str
    basis: str
    """What the value rests on, or how to get it."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that the report says in words and numbers."""

    status: str
    warnings: tuple[str, ...]
    """Whatever a reader must know before believing a number."""
    headline: tuple[Fact, ...]
    account: tuple[Fact, ...]
    tables: tuple[Table, ...]


def state_facts(
    record: RunRecord, accounting: Accounting, evidence: Evidence, outlook: Outlook | None = None
) -> Facts:
    """The words for one run."""
    ahead = () if outlook is None else (outlook_table(outlook),)
    unlike = () if outlook is None else tuple(outlook_warnings(outlook))
    return Facts(
        status=record.status,
        warnings=(*_warnings(record, accounting, evidence), *unlike),
        headline=tuple(_headline(record, accounting)),
        account=tuple(_account(record, accounting)),
        tables=(*ahead, *state_tables(record, accounting, evidence)),
    )


def _warnings(record: RunRecord, accounting: Accounting, evidence: Evidence) -> Iterator[str]:
    if record.status != "succeeded":
        yield _unfinished(record)
    for finding in evidence.findings:
        yield (
            f"The parts disagree with the run record on {finding.quantity}: "
            f"recorded {finding.recorded}, recounted {finding.recounted}."
        )
    if accounting.seconds_saved is not None and accounting.seconds_saved < 0:
        yield "The exits cost more time than they saved: raise the threshold, or classify without exits."
    exits, control = accounting.exit_batch_samples, accounting.control_batch_samples
    if exits and control and control < SMALL_BATCH_SHARE * exits:
        yield (
            f"The control sample ran in smaller micro-batches ({control:.0f} samples) than the exit lane "
            f"({exits:.0f}), which makes full depth look slower than it is: "
            "a larger --control gives a fairer measurement."
        )


def _unfinished(record: RunRecord) -> str:
    last = record.attempts[-1].error if record.attempts else None
    running = record.status == "running"
    remedy = "Its counts may move while it runs." if running else "The same command finishes it."
    others = record.other_shards
    beside = f" beside {q.count(others)} of earlier inputs" if others else ""
    return (
        f"This run is not finished (status: {record.status}): {q.count(record.totals.shards - others)} of "
        f"{q.count(record.planned_shards)} planned shards are committed{beside}, and all numbers are about those. "
        + remedy
        + (f" Last error: {last}" if last else "")
    )


def _headline(record: RunRecord, accounting: Accounting) -> Iterator[Fact]:
    work_saved = q.percent(accounting.layer_work_saved)
    yield _time_saved(accounting)
    yield Fact(name="Rows classified", value=q.count(accounting.rows), basis=_rows_basis(record, accounting))
    yield Fact(
        name="Mean exit layer",
        value=q.decimal(accounting.mean_exit_layer),
        basis=f"of {record.model.num_layers} layers{_windows(accounting)}; {work_saved} of layer work saved",
    )
    yield _agreement(accounting)
    yield _cost(accounting)


def _windows(accounting: Accounting) -> str:
    """What the mean is over, where it is not over rows."""
    return "" if accounting.windows == accounting.rows else f", over {q.count(accounting.windows)} windows"


def _rows_basis(record: RunRecord, accounting: Accounting) -> str:
    bad = record.totals.bad_rows
    rows = f"{q.rate(accounting.rows_per_second)} rows/s; " if accounting.rows_per_second is not None else ""
    return f"{rows}{q.count(bad)} bad {'row' if bad == 1 else 'rows'} set aside"


def _time_saved(accounting: Accounting) -> Fact:
    if accounting.full_depth is None:
        return Fact(name="Compute time saved", value=q.NOT_MEASURED, basis=f"nothing ran yet; {MEASURE_IT}")
    rows = f"{q.count(accounting.full_depth.control_rows)} control rows at full depth"
    words: dict[Basis, str] = {
        "measured": f"measured on {rows}",
        "bounded": f"bounded by the FLOPs saved: {rows} say more, but ran in slower micro-batches",
        "expected": f"expected from FLOPs, not measured: {MEASURE_IT}",
    }
    basis = accounting.full_depth.basis
    mark = "" if basis == "measured" else f" ({basis})"
    return Fact(
        name=f"Compute time saved{mark}", value=q.percent(accounting.seconds_saved), basis=words[basis]
    )


def _agreement(accounting: Accounting) -> Fact:
    if accounting.difference is not None:
        return Fact(
            name="Difference from full depth",
            value=f"{accounting.difference:.4g}",
            basis="mean absolute difference of the control rows' numbers",
        )
    name, found = "Agreement with full depth", accounting.agreement
    if found is None:
        return Fact(name=name, value=q.NOT_MEASURED, basis=MEASURE_IT)
    return Fact(
        name=name,
        value=q.percent(found.share),
        basis=f"{q.count(found.agreeing_rows)} of {q.count(found.audited_rows)} control rows; "
        f"95 % interval {q.percent(found.low)} to {q.percent(found.high)}",
    )


def _cost(accounting: Accounting) -> Fact:
    name, cost = "Model compute per million documents", accounting.cost
    if cost is None:
        unknown = PRICE_IT if accounting.rows else "no row is committed yet"
        return Fact(name=name, value="not stated", basis=unknown)
    full, price = (q.money(amount, cost.currency) for amount in (cost.full_depth, cost.price_per_hour))
    return Fact(
        name=name,
        value=q.money(cost.with_exits, cost.currency),
        basis=f"{full} at full depth ({cost.basis}); at {price} per replica-hour; start-up and idle time not in it",
    )


def _account(record: RunRecord, accounting: Accounting) -> Iterator[Fact]:
    yield from _work_facts(record, accounting)
    yield from _time_facts(accounting)
    if accounting.cost is not None:
        yield from _cost_facts(accounting.cost)


def _work_facts(record: RunRecord, accounting: Accounting) -> Iterator[Fact]:
    layers = record.model.num_layers
    counted = "rows" if accounting.windows == accounting.rows else "windows"
    yield Fact(
        name="Layer work saved",
        value=q.percent(accounting.layer_work_saved),
        basis=f"1 {q.MINUS} mean exit layer / {layers} (DeeBERT, Eq. 2); counts {counted}, not their length",
    )
    yield Fact(
        name="FLOPs executed",
        value=q.flops(accounting.executed_flops),
        basis="matrix products of the layers and off-ramps that ran, at the true lengths of the rows",
    )
    yield Fact(
        name="FLOPs at full depth",
        value=q.flops(accounting.full_depth_flops),
        basis=f"the same rows through all {layers} layers and the final classifier",
    )
    yield Fact(
        name="FLOPs saved", value=q.percent(accounting.flops_saved), basis="the off-ramps' own FLOPs deducted"
    )


def _time_facts(accounting: Accounting) -> Iterator[Fact]:
    yield Fact(
        name="Compute time with exits",
        value=q.duration(accounting.compute_seconds),
        basis="measured; model only, summed over replicas, decision and regrouping included",
    )
    yield Fact(
        name="Compute time at full depth",
        value=q.duration(accounting.full_depth.seconds if accounting.full_depth else None),
        basis=_full_depth_basis(accounting),
    )
    yield _time_saved(accounting)
    if accounting.repeated_seconds > 0:
        yield Fact(
            name="Compute time done again",
            value=q.duration(accounting.repeated_seconds),
            basis="of rows that a replica had in hand when it died, or that are not committed yet; not part of the "
            "above",
        )
    if accounting.control_seconds > 0:
        yield Fact(
            name="Compute time of the control sample",
            value=q.duration(accounting.control_seconds),
            basis="what measuring cost; not part of the compute time with exits",
        )
    yield Fact(
        name="Wall time",
        value=q.duration(accounting.wall_seconds),
        basis="all attempts: planning, start-up, reading, tokenizing, writing and idle time included",
    )


def _full_depth_basis(accounting: Accounting) -> str:
    full_depth = accounting.full_depth
    if full_depth is None:
        return MEASURE_IT
    if full_depth.basis == "expected":
        return f"expected: the measured time with exits, scaled by FLOPs; {MEASURE_IT}"
    rows = q.count(full_depth.control_rows)
    measured = f"seconds per token of {rows} control rows without exits, times all tokens"
    if full_depth.basis == "bounded":
        slower = q.duration(full_depth.control_seconds)
        return (
            f"bounded: the exits' own seconds per FLOP, times all FLOPs; {measured} are {slower}, for in fewer and "
            "emptier micro-batches they took longer"
        )
    return f"measured: {measured}"


def _cost_facts(cost: Cost) -> Iterator[Fact]:
    price = q.money(cost.price_per_hour, cost.currency)
    scope = f"model compute at {price} per replica-hour; no start-up, idle time or storage"
    words: dict[Basis, str] = {
        "measured": "measured on the control rows",
        "bounded": "bounded: the exits' own seconds per FLOP, times all FLOPs; the control rows took longer",
        "expected": f"expected; {MEASURE_IT}",
    }
    million = "per million documents"
    yield Fact(name=f"Cost {million}, with exits", value=q.money(cost.with_exits, cost.currency), basis=scope)
    yield Fact(
        name=f"Cost {million}, full depth",
        value=q.money(cost.full_depth, cost.currency),
        basis=words[cost.basis],
    )
    yield Fact(
        name=f"Cost {million}, wall time",
        value=q.money(cost.wall, cost.currency),
        basis="all replicas over the whole of each attempt: planning, start-up, reading and idle time included",
    )
    yield Fact(
        name=f"Saved {million}",
        value=q.money(_shown_difference(cost.full_depth, cost.with_exits), cost.currency),
        basis="the difference of the two",
    )


def _shown_difference(full_depth: float, with_exits: float) -> float:
    """Of the amounts as shown: a reader who subtracts finds the same."""
    return round(full_depth, 2) - round(with_exits, 2) if with_exits >= 1 else full_depth - with_exits
