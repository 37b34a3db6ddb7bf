"""`make replicate`: the paper's experiments on the data at hand, in one command.

For each task and each pooling: two-stage training, the sweep, measured time, the paper's figures, and with the first
pooling a static baseline of the same budget, which has no off-ramps to read; then one table over all. Models and
traces stay in a work folder and are not made twice, and a killed training goes on; tables and figures go to the
results. A model that was trained with other settings is refused, not used.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from deebert.config import POOLINGS
from jobs.benchmarks import machine
from jobs.evaluate import EvaluateJob, evaluate, show
from jobs.flags import comma_list, flag, parse_job
from jobs.recipes import check_study, training_seconds
from jobs.terminal import quiet_libraries
from jobs.train import TrainJob, train
from pipeline.errors import UsageError
from pipeline.fields import positive, whole
from pipeline.report.evaluated import EvaluatedPoint, EvaluatedSet, to_csv, to_markdown
from pipeline.report.ledger import Table

log = logging.getLogger(__name__)

KEPT_SHARES = (0.995, 0.99, 0.97)
"""Of full depth's score: the operating points of the table over all."""
_SEED = 42
_CHECKPOINT_STEPS = 100
"""A few minutes of two CPU cores."""
_AG_NEWS_HELD_OUT = 2_000
_AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
_BINARY_THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
_FOUR_THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One task: where its data are, and the recipe."""

    name: str
    data: dict[str, Any]
    """Fields of `TrainJob` and `EvaluateJob` alike."""
    train_data: str | None
    held_out: str | None
    """Files, where the task has no GLUE folder."""
    labels: tuple[str, ...] | None
    epochs: float
    batch_size: int
    learning_rate: float
    thresholds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ReplicateJob:
    """What `python -m jobs.replicate` takes."""

    assets: str = flag("folder with e5-small/, glue/SST-2/, glue/MRPC/ and ag_news/train.csv")
    backbone: str | None = flag("encoder to train; left out, e5-small of the assets", default=None)
    tasks: tuple[str, ...] = flag("which", default=("sst-2", "mrpc", "ag-news"), parse=comma_list)
    poolings: tuple[str, ...] = flag("what off-ramps read", default=("mean", "cls"), parse=comma_list)
    static_depths: tuple[int, ...] = flag(
        "layers of the static baselines",
        default=(6,),
        parse=lambda text: tuple(positive(part) for part in comma_list(text)),
    )
    static_style: str = flag(
        "which layers they keep: the first, or evenly spread ones, as DistilBERT starts",
        default="first",
        choices=("first", "every-other"),
    )
    rows: int | None = flag("train on a random sample of this many rows", default=None, parse=positive)
    timing_rows: int = flag(
        "samples to measure time on, one at a time; 0 measures nothing", default=100, parse=whole
    )
    engine_rows: int = flag("and through the engine", default=1000, parse=positive)
    work: str = flag("folder for models and traces, used again where they are there", default=".replicate")
    output: str = flag("folder for the results", default="jobs/bench_results")


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Train and evaluate what is not there yet; write every result."""
    job = parse_job(ReplicateJob, argv, prog=prog, description="Replicate the paper's experiments.")
    quiet_libraries()
    unknown = [name for name in job.tasks if name not in _EXPERIMENTS]
    if unknown:
        raise UsageError(f"unknown task {unknown[0]!r}: choose among {', '.join(_EXPERIMENTS)}")
    if wrong := [name for name in job.poolings if name not in POOLINGS]:
        raise UsageError(f"unknown pooling {wrong[0]!r}: choose among {', '.join(POOLINGS)}")
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    rows = []
    for name in job.tasks:
        experiment = _EXPERIMENTS[name](job)
        for pooling in job.poolings:
            # Half of what a pooling costs, and the same baseline but for what its one classifier reads.
            depths = job.static_depths if pooling == job.poolings[0] else ()
            asked = replace(job, static_depths=depths)
            output = Path(job.output) / f"{day}-{name}-{pooling}"
            found = _replicate(asked, experiment, pooling, output, _command(argv, job))
            rows += [_summary(name, pooling, one) for one in found]
    table = _overview(rows)
    for suffix, content in (("csv", to_csv(table)), ("md", f"{to_markdown(table)}\n\n{table.note}\n")):
        (Path(job.output) / f"{day}-replication.{suffix}").write_text(content)
    print(f"\n{table.title}\n\n{to_markdown(table)}\n\n{table.note}")
    return 0


def _replicate(
    job: ReplicateJob, experiment: Experiment, pooling: str, output: Path, command: str
) -> tuple[EvaluatedSet, ...]:
    work = Path(job.work) / f"{experiment.name}-{pooling}"
    training = TrainJob(
        backbone=_backbone(job),
        data=experiment.train_data,
        **experiment.data,
        labels=experiment.labels,
        output=str(work / "model"),
        off_ramp_pooling=pooling,
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        learning_rate=experiment.learning_rate,
        max_rows=job.rows,
        seed=_SEED,
    )
    settings = _shareable(asdict(training), job)
    check_study(work, {name: value for name, value in settings.items() if name != "output"}, flag="--work")
    if (work / "model" / "config.json").exists():
        log.info("%s is there already", work / "model")
    else:
        train(replace(training, resume=True, checkpoint_steps=_CHECKPOINT_STEPS))
    trained = time.monotonic()
    evaluation = _evaluation(job, experiment, training, work / "trace.parquet")
    found = evaluate(evaluation)
    show(found, str(output))
    document = {
        "command": command,
        "training": settings,
        "evaluation": _shareable(asdict(evaluation), job),
        "training_seconds": training_seconds(work / "model"),
        "evaluation_seconds": time.monotonic() - trained,
        "machine": machine.describe(),
    }
    (output / "run.json").write_text(json.dumps(document, indent=1, default=str))
    return found.sets


def _shareable(fields: dict[str, Any], job: ReplicateJob) -> dict[str, Any]:
    """Results are shared, the folders that they came from are not."""
    return {name: _plain(value, job) if isinstance(value, str) else value for name, value in fields.items()}


def _plain(value: str, job: ReplicateJob) -> str:
    for root, name in ((job.assets, "ASSETS"), (job.work, "WORK"), (job.output, "OUTPUT")):
        if Path(value).is_relative_to(root):
            return str(Path(name) / Path(value).relative_to(root))
    return value


def _command(argv: Sequence[str], job: ReplicateJob) -> str:
    return shlex.join(["python", "-m", "jobs.replicate", *(_plain(word, job) for word in argv)])


def _evaluation(job: ReplicateJob, experiment: Experiment, training: TrainJob, trace: Path) -> EvaluateJob:
    return EvaluateJob(
        model=training.output,
        data=experiment.held_out,
        train_data=experiment.train_data,
        **experiment.data,
        trace=str(trace),
        thresholds=experiment.thresholds,
        timing_rows=job.timing_rows,
        engine_rows=job.engine_rows,
        static_depths=job.static_depths,
        static_style=job.static_style,
        backbone=training.backbone,
        max_train_rows=job.rows,
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        learning_rate=experiment.learning_rate,
        seed=_SEED,
    )


def _backbone(job: ReplicateJob) -> str:
    return job.backbone or str(Path(job.assets) / "e5-small")


def _glue(name: str, **recipe: Any) -> Callable[[ReplicateJob], Experiment]:
    def experiment(job: ReplicateJob) -> Experiment:
        return Experiment(
            name=name,
            data={"glue_dir": str(Path(job.assets) / "glue"), "task": name},
            train_data=None,
            held_out=None,
            labels=None,
            thresholds=_BINARY_THRESHOLDS,
            **recipe,
        )

    return experiment


def _ag_news(job: ReplicateJob) -> Experiment:
    """Titles and descriptions as pairs; the same rows are held out each time."""
    folder = Path(job.work) / "ag-news"
    train_rows, held_out = folder / "train.parquet", folder / "held-out.parquet"
    if not held_out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        table = _ag_news_table(Path(job.assets) / "ag_news" / "train.csv")
        order = np.random.default_rng(_SEED).permutation(len(table))
        pq.write_table(table.take(order[_AG_NEWS_HELD_OUT:]), train_rows)
        pq.write_table(table.take(order[:_AG_NEWS_HELD_OUT]), held_out)
    return Experiment(
        name="ag-news",
        data={"text_column": "title", "text_pair_column": "description"},
        train_data=str(train_rows),
        held_out=str(held_out),
        labels=_AG_NEWS_LABELS,
        epochs=1,
        batch_size=32,
        learning_rate=5e-5,
        thresholds=_FOUR_THRESHOLDS,
    )


def _ag_news_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise UsageError(
            f"no such file: {str(path)!r}; give --assets that has it, or --tasks without ag-news"
        )
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    table = pa_csv.read_csv(path, parse_options=parse)
    labels = [_AG_NEWS_LABELS[index - 1] for index in table["class_index"].to_pylist()]
    return table.select(["title", "description"]).append_column("label", pa.array(labels))


_EXPERIMENTS: dict[str, Callable[[ReplicateJob], Experiment]] = {
    "sst-2": _glue("sst-2", epochs=1, batch_size=32, learning_rate=5e-5),
    "mrpc": _glue("mrpc", epochs=5, batch_size=16, learning_rate=5e-5),
    "ag-news": _ag_news,
}


def _summary(task: str, pooling: str, found: EvaluatedSet) -> tuple[str, ...]:
    full = found.full
    kept = [_cheapest(found, share * full.scores[0]) for share in KEPT_SHARES]
    return (
        f"{task} {found.name}".strip(),
        pooling,
        found.metrics[0],
        f"{100 * full.scores[0]:.2f}",
        *(f"{p.speed_up:.2f}x ({100 * p.scores[0]:.2f}, S = {p.name})" if p else "–" for p in kept),
        "; ".join(f"{p.name}: {100 * p.scores[0]:.2f} at {p.speed_up:.2f}x" for p in found.statics) or "–",
    )


def _cheapest(found: EvaluatedSet, least_score: float) -> EvaluatedPoint | None:
    """The threshold that saves most of those that score at least that."""
    enough = [point for point in found.thresholds if point.scores[0] >= least_score]
    return max(enough, key=lambda point: point.saving, default=None)


def _overview(rows: Sequence[tuple[str, ...]]) -> Table:
    return Table(
        title="All experiments",
        columns=(
            "task",
            "off-ramps read",
            "score",
            "full depth %",
            *(f"keeps {100 * share:g} %" for share in KEPT_SHARES),
            "static",
        ),
        rows=tuple(rows),
        note="Layer speed-up of the threshold S that saves most while it keeps so much of full depth's score "
        "(its own in brackets). Thresholds were chosen on the rows that they are scored on, as in the paper.",
    )


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("replicate"))
