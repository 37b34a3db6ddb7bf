"""The report: run records, parts and plots, in one self-contained page and a table for the terminal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeline.errors import OutputError, UsageError
from pipeline.records import RunRecord, Totals
from pipeline.report.accounting import DOCUMENTS_PER_PRICE, Accounting, account
from pipeline.report.evidence import (
    Evidence,
    EvidenceError,
    Finding,
    Watch,
    gather_evidence,
    unwatched,
    verify_parts,
)
from pipeline.report.facts import Facts, state_facts
from pipeline.report.html import render_page
from pipeline.report.outlook import WhatIf, look_ahead
from pipeline.report.summary import Summary, summarise
from pipeline.report.table import render_text
from pipeline.shard_records import read_shard_records
from pipeline.sink import META, Output

__all__ = [
    "Accounting",
    "Evidence",
    "EvidenceError",
    "Finding",
    "Report",
    "Summary",
    "WhatIf",
    "account",
    "gather_evidence",
    "read_record",
    "summarise",
    "verify_parts",
    "write_report",
]


log = logging.getLogger(__name__)

PAGE = f"{META}/report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `write_report` made."""

    output: str
    record: RunRecord
    path: str
    """Path or URL of the page."""
    problem: str | None
    """Why the page could not be written."""
    facts: Facts
    text: str
    """The same as a plain-text table."""
    accounting: Accounting
    evidence: Evidence
    """`evidence.findings` is empty when the parts hold what the run recorded."""


def write_report(
    output: str,
    *,
    price_per_hour: float | None,
    currency: str = "$",
    documents: int | None = None,
    what_if: Callable[[RunRecord], WhatIf] | None = None,
    watch: Watch = unwatched,
) -> Report:
    """Accounts for the run in `output` and writes ``output/_deebert/report.html``, if that can be written.

    Args:
        output: Output folder of `classify`, a local path or a URL; the run need not be finished.
        price_per_hour: Price of one replica for an hour; None states no cost.
        currency: Shown in front of amounts.
        documents: Size of a corpus to project to; None projects to none.
        what_if: Reads a trace of the run's model, to show other operating points.
        watch: Shows how far the reading of the parts is.

    Raises:
        UsageError: `output` holds no run, or a part that is not its own, or the price makes no sense.
        EvidenceError: A part cannot be read.
    """
    if price_per_hour is not None and not (math.isfinite(price_per_hour) and price_per_hour > 0):
        raise UsageError(f"the price per hour must be a positive number, not {price_per_hour}.")
    folder = Output(output)
    record = read_record(output)
    traced = None if what_if is None else what_if(record)  # refused before all parts are read
    parts = folder.parts()
    if record.status != "succeeded":
        record = _up_to_date(record, folder, parts)
    accounting = account(record, price_per_hour=price_per_hour, currency=currency)
    evidence = gather_evidence([folder.path(name) for name in sorted(parts)], record, watch=watch)
    outlook = None
    if documents is not None or traced is not None:
        outlook = look_ahead(
            record,
            accounting,
            documents=DOCUMENTS_PER_PRICE if documents is None else documents,
            what_if=traced,
            price_per_hour=price_per_hour,
            currency=currency,
        )
        if outlook is None:
            log.warning("nothing ran yet in %r: there is nothing to project", output)
    facts = state_facts(record, accounting, evidence, outlook)
    page = render_page(output, record, accounting, evidence, facts, outlook)
    return Report(
        output=output,
        record=record,
        path=folder.path(PAGE),
        problem=_write_page(folder, page),
        facts=facts,
        text=render_text(facts),
        accounting=accounting,
        evidence=evidence,
    )


def _write_page(folder: Output, page: str) -> str | None:
    """Why it could not be written."""
    try:
        folder.write(PAGE, page.encode())
    except OutputError as error:
        return str(error)
    return None


def read_record(output: str) -> RunRecord:
    """The record of the run in `output`.

    Raises:
        UsageError: there is none.
    """
    record = Output(output).read_run()
    if record is None:
        raise UsageError(f"{output!r} holds no run: give the folder that `deebert classify` wrote")
    return record


def _up_to_date(record: RunRecord, folder: Output, parts: set[str]) -> RunRecord:
    """The record of a run that goes on, or was killed, with the totals of `parts`: its own are older."""
    shards = read_shard_records(folder, parts).values()
    totals = Totals.zero(record.model.num_layers).plus(shard.totals for shard in shards)
    return replace(record, totals=totals)
