"""`deebert report`: what runs cost and saved, as a table here and an HTML page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import fsspec

from jobs.evaluate import CERTAINTY_THRESHOLDS, ENTROPY_THRESHOLDS
from jobs.flags import flag, parse_job
from jobs.terminal import showing
from pipeline.errors import UsageError
from pipeline.fields import each, number, positive_number

if TYPE_CHECKING:
    from pipeline.records import RunRecord
    from pipeline.report import Report, WhatIf

log = logging.getLogger(__name__)

MOST_DOCUMENTS = 1e15
SUMMARY_PAGE = "deebert-report.html"


def _documents(text: str) -> int:
    """``250000000``, ``250_000_000`` or ``2.5e8``."""
    value = number(text)
    if not (1 <= value <= MOST_DOCUMENTS and value.is_integer()):
        raise ValueError(f"{text!r} is not a number of documents")
    return int(value)


def _currency(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} cannot be printed")
    return text


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    """What `deebert report` takes."""

    output: tuple[str, ...] = flag(
        "output folders or URLs of `classify`; several are also summed", several=True, metavar="OUT"
    )
    price_per_hour: float | None = flag(
        "price of one replica for an hour, for the cost per million documents",
        default=None,
        parse=positive_number,
    )
    currency: str = flag("shown in front of amounts", default="$", parse=_currency)
    project: int | None = flag(
        "documents of a corpus, e.g. 2.5e8: what it would take at the run's rates",
        default=None,
        parse=_documents,
        metavar="N",
    )
    what_if: str | None = flag(
        "trace of the run's model, of `deebert evaluate --trace`: what other operating points would have cost",
        default=None,
        metavar="T.parquet",
    )
    thresholds: tuple[float, ...] = flag(
        "of --what-if: entropy thresholds, nats", default=ENTROPY_THRESHOLDS, parse=each(number)
    )
    certainty_thresholds: tuple[float, ...] = flag(
        "of --what-if, where the model learns to exit: certainty thresholds",
        default=CERTAINTY_THRESHOLDS,
        parse=each(number),
    )
    page: str | None = flag(
        f"of several outputs: the page that sums them (left out: {SUMMARY_PAGE}); that of one is in its folder",
        default=None,
        metavar="FILE.html",
    )


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, account and write."""
    # `deebert report OUT` reads better than `--output OUT`; both work.
    words = ["--output", *argv] if argv and not argv[0].startswith("-") else argv
    job = parse_job(
        ReportJob, words, prog=prog, description="Account for runs: `report OUT [OUT ...] [flags]`."
    )
    _check(job)
    from pipeline.report import read_record, write_report

    _check_each_is_another(job.output)
    for output in job.output:  # before the parts of any are read
        read_record(output)
    reports = [
        write_report(
            output,
            price_per_hour=job.price_per_hour,
            currency=job.currency,
            documents=job.project,
            what_if=_what_if(job),
            watch=partial(showing, f"reading {output}", unit="parts"),
        )
        for output in job.output
    ]
    if len(reports) == 1:
        _print_one(reports[0])
    else:
        _print_many(job, reports)
    return 1 if any(report.evidence.findings for report in reports) else 0


def _check(job: ReportJob) -> None:
    if len(job.output) == 1 and job.page is not None:
        raise UsageError("--page is of several outputs: the page of one is in its folder")
    if len(job.output) > 1 and (job.project is not None or job.what_if is not None):
        raise UsageError("--project and --what-if rest on one run's figures: give one output")


def _check_each_is_another(outputs: Sequence[str]) -> None:
    from pipeline.inputs import real_path
    from pipeline.sink import Output

    places: dict[str, str] = {}
    for output in outputs:
        place = real_path(Output(output).path("")).rstrip("/")
        if place in places:
            raise UsageError(
                f"{output!r} is {places[place]!r} given twice, and would be summed twice: give each once"
            )
        places[place] = output


def _what_if(job: ReportJob) -> Callable[[RunRecord], WhatIf] | None:
    if job.what_if is None:
        return None
    from jobs.what_if import read_what_if  # costs an import of torch

    return partial(
        read_what_if,
        job.what_if,
        thresholds=job.thresholds,
        certainty_thresholds=job.certainty_thresholds,
    )


def _print_one(report: Report) -> None:
    print(report.text)
    if report.problem is None:
        print(f"\n{report.path}")
    _warn_of_missing_pages([report])


def _warn_of_missing_pages(reports: Sequence[Report]) -> None:
    sys.stdout.flush()  # the table comes first, also in a file
    for report in reports:
        if report.problem is not None:
            log.warning("no page beside the table: %s", report.problem)


def _print_many(job: ReportJob, reports: Sequence[Report]) -> None:
    from pipeline.report import summarise

    summary = summarise(reports, price_per_hour=job.price_per_hour, currency=job.currency)
    print(summary.text)
    _warn_of_missing_pages(reports)
    page = job.page or SUMMARY_PAGE
    try:
        filesystem, path = fsspec.core.url_to_fs(page)
        filesystem.pipe_file(path, summary.page.encode())
    except Exception as error:  # not only OSError: each store has errors of its own
        raise UsageError(f"cannot write the page {page!r}: {error}; name another with --page") from error
    print(f"\n{page}")


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("report"))
