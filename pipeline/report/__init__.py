"""The report: run records, parts and plots, in one self-contained page and a table for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.report.accounting import Accounting, account
from pipeline.report.evidence import Evidence, EvidenceError, Finding, gather_evidence, verify_parts
from pipeline.report.facts import state_facts
from pipeline.report.html import render_page
from pipeline.report.table import render_text
from pipeline.sink import META, Output

__all__ = [
    "Accounting",
    "Evidence",
    "EvidenceError",
    "Finding",
    "Report",
    "account",
    "gather_evidence",
    "verify_parts",
    "write_report",
]


PAGE = f"{META}/report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `write_report` made."""

    path: str
    """Path or URL of the page."""
    text: str
    """The same as a plain-text table."""
    accounting: Accounting
    evidence: Evidence
    """`evidence.findings` is empty when the parts hold what the run recorded."""


def write_report(output: str, *, price_per_hour: float | None, currency: str = "$") -> Report:
    """Accounts for the run in `output` and writes ``output/_deebert/report.html``.

    Args:
        output: Output folder of `classify`, a local path or a URL; the run need not be finished.
        price_per_hour: Price of one replica for an hour; None states no cost.
        currency: Shown in front of amounts.

    Raises:
        UsageError: `output` holds no run, the price makes no sense, or the page cannot be written.
        EvidenceError: A part cannot be read.
    """
    if price_per_hour is not None and not (math.isfinite(price_per_hour) and price_per_hour > 0):
        raise UsageError(f"the price per hour must be a positive number, not {price_per_hour}.")
    folder = Output(output)
    record = folder.read_run()
    if record is None:
        raise UsageError(f"{output!r} holds no run: give the folder that `deebert classify` wrote")
    accounting = account(record, price_per_hour=price_per_hour, currency=currency)
    evidence = gather_evidence([folder.path(name) for name in sorted(folder.parts())], record)
    facts = state_facts(record, accounting, evidence)
    page = render_page(output, record, accounting, evidence, facts)
    try:
        folder.write(PAGE, page.encode())
    except OSError as error:
        raise UsageError(
            f"the report {folder.path(PAGE)!r} cannot be written: {error.strerror or error}"
        ) from error
    return Report(path=folder.path(PAGE), text=render_text(facts), accounting=accounting, evidence=evidence)
