"""`deebert report`: what a run cost and saved, as a table here and an HTML page in its output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.flags import flag, parse_job

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """What `deebert report` takes, besides the output."""

    output: str = flag("output folder or URL of `classify`")
    price_per_hour: float | None = flag(
        "price of one replica for an hour, for the cost per million documents", default=None, parse=float
    )
    currency: str = flag("shown in front of amounts", default="$")


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, account and write."""
    # `deebert report OUT` reads better than `--output OUT`; both work.
    words = ["--output", *argv] if argv and not argv[0].startswith("-") else argv
    job = parse_job(ReportJob, words, prog=prog, description="Account for a run: `report OUT [flags]`.")
    from pipeline.report import write_report

    report = write_report(job.output, price_per_hour=job.price_per_hour, currency=job.currency)
    print(report.text)
    if report.problem is None:
        print(f"\n{report.path}")
    else:
        sys.stdout.flush()  # the table comes first, also in a file
        log.warning("no page beside the table: %s", report.problem)
    return 1 if report.evidence.findings else 0


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("report"))
