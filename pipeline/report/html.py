"""The report as one self-contained page: no scripts, nothing fetched, all user text escaped."""

from __future__ import annotations

from markupsafe import Markup

from pipeline.records import RunRecord
from pipeline.report import plots
from pipeline.report import quantities as q
from pipeline.report.accounting import Accounting
from pipeline.report.evidence import Evidence
from pipeline.report.facts import Facts
from pipeline.report.outlook import Outlook
from pipeline.report.outlook_plots import corpus_hours, quality_against_compute
from pipeline.report.templates import render


def render_page(
    output: str,
    record: RunRecord,
    accounting: Accounting,
    evidence: Evidence,
    facts: Facts,
    outlook: Outlook | None = None,
) -> str:
    """The page for one run; `output` is named in its head."""
    return render(
        "page.html",
        output=output,
        record=record,
        facts=facts,
        plots=_plots(record, accounting, evidence, outlook),
        corpus=None if outlook is None else q.count(outlook.documents),
        has_control=accounting.control_seconds > 0,
        wide_layers=not plots.fits_half_width(record.model.num_layers),
    )


def _plots(
    record: RunRecord, accounting: Accounting, evidence: Evidence, outlook: Outlook | None
) -> dict[str, Markup | None]:
    """SVG by name: ours, with user text already escaped by the SVG writer; None is left out."""
    if accounting.rows == 0:
        return {}
    drawn = {
        "seconds_comparison": plots.seconds_comparison(accounting),
        "flops_comparison": plots.flops_comparison(accounting),
        "cost_comparison": plots.cost_comparison(accounting.cost),
        "exit_histogram": plots.exit_histogram(accounting),
        "layer_work": plots.layer_work(accounting),
        "seconds_per_layer": plots.seconds_per_layer(accounting),
        "labels": plots.label_distribution(
            record.model.labels,
            evidence.label_rows,
            of=evidence.rows,
            one_each=record.model.problem_type != "multi_label_classification",
        )
        if any(evidence.label_rows)
        else None,
        "scores": plots.score_ranges(evidence.score_ranges, record.model.num_layers)
        if evidence.score_ranges
        else None,
        "outlook": None if outlook is None else quality_against_compute(outlook),
        "corpus": None if outlook is None else corpus_hours(outlook),
    }
    return {name: None if svg is None else Markup(svg) for name, svg in drawn.items()}
