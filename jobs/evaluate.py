"""`deebert evaluate`: every off-ramp's score on a labelled set, and what each threshold keeps and saves."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.flags import flag, parse_job
from jobs.terminal import quiet_libraries
from pipeline.config import comma_list, positive


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in comma_list(text))


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What `deebert evaluate` takes."""

    model: str = flag("folder or hub id of a DeeBERT model")
    data: str = flag(
        "labelled texts: CSV, TSV, JSONL or Parquet, a saved data set, or hub-id[:configuration]"
    )
    text_column: str = flag("column of the text", default="text")
    text_pair_column: str | None = flag("column of the second segment", default=None)
    label_column: str = flag("column of the label: ids or names", default="label")
    thresholds: tuple[float, ...] = flag(
        "entropy thresholds to try, nats", default=(0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5), parse=_numbers
    )
    split: str = flag("of a hub data set", default="validation")
    max_length: int | None = flag(
        "tokens a text is cut to; left out, what the model was trained with", default=None, parse=positive
    )
    precision: str = flag(
        "auto is bfloat16 where the hardware multiplies it natively, else float32",
        default="float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    output: str | None = flag("folder for off_ramps.csv and thresholds.csv", default=None)


Table = list[tuple[str, ...]]


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, trace, print and write."""
    job = parse_job(
        EvaluateJob, argv, prog=prog, description="Score every off-ramp and sweep entropy thresholds."
    )
    for name, table in evaluate(job).items():
        print(_markdown(table), end="\n\n")
        if job.output is not None:
            folder = Path(job.output)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{name}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(table)
    return 0


def evaluate(job: EvaluateJob) -> dict[str, Table]:
    """The tables, by name; the first row of each is its header."""
    from deebert.checkpoint import load_checkpoint
    from deebert.encoder import PackedEncoder
    from deebert.evaluation import off_ramp_accuracy, sweep, trace
    from deebert.precision import DTYPES, resolve_precision
    from jobs.labelled import load_labelled
    from pipeline.tokenization import TextTokenizer

    quiet_libraries()
    checkpoint = load_checkpoint(job.model)
    texts = load_labelled(
        job.data,
        text_column=job.text_column,
        text_pair_column=job.text_pair_column,
        label_column=job.label_column,
        names=checkpoint.labels,
        split=job.split,
    )
    tokenizer = TextTokenizer(
        checkpoint.tokenizer, max_length=job.max_length or checkpoint.default_max_length
    )
    data = texts.tokenized(tokenizer)
    encoder = PackedEncoder(checkpoint.model, dtype=DTYPES[resolve_precision(job.precision)])
    traced = trace(encoder, data.tokens)
    ramps = zip(traced.layers, off_ramp_accuracy(traced, data.labels), strict=True)
    full, *points = sweep(traced, data.labels, (None, *job.thresholds))
    rows = [
        (
            "full depth" if threshold is None else f"{threshold:g}",
            f"{100 * point.accuracy:.2f}",
            f"{100 * point.accuracy / full.accuracy:.2f}",
            f"{point.mean_exit_layer:.2f}",
            f"{point.speed_up:.2f}",
            f"{100 * point.saving:.1f}",
        )
        for threshold, point in zip((None, *job.thresholds), (full, *points), strict=True)
    ]
    header = ("threshold", "accuracy %", "of full %", "mean exit layer", "layer speed-up", "saved %")
    return {
        "off_ramps": [("layer", "accuracy %"), *((str(i), f"{100 * a:.2f}") for i, a in ramps)],
        "thresholds": [header, *rows],
    }


def _markdown(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in table]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]])


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("evaluate"))
