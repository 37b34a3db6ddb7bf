"""`deebert evaluate`: every off-ramp's score on labelled sets, what each threshold keeps and saves, pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.flags import flag, parse_job
from jobs.subject_flags import SubjectFlags
from jobs.terminal import quiet_libraries
from pipeline.errors import UsageError
from pipeline.fields import each, number, positive, random_seed, share, whole

if TYPE_CHECKING:
    from jobs.evaluation import Evaluation


ENTROPY_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
CERTAINTY_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""That are tried where none are given."""


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(SubjectFlags):
    """What `deebert evaluate` takes."""

    thresholds: tuple[float, ...] = flag(
        "entropy thresholds to try, nats", default=ENTROPY_THRESHOLDS, parse=each(number)
    )
    certainty_thresholds: tuple[float, ...] = flag(
        "of a model that learns to exit: certainty thresholds to try",
        default=CERTAINTY_THRESHOLDS,
        parse=each(share),
    )
    store_agreement: bool = flag(
        "with --precision int8 and at least 598 texts: note in the model's folder the share of labels that are "
        "float32's; from 99.5 % on, auto chooses int8",
        default=False,
    )
    timing_rows: int = flag(
        "samples to measure time on, one at a time; 0 measures nothing", default=100, parse=whole
    )
    engine_rows: int = flag("and through the engine", default=1000, parse=positive)
    timing_rounds: int = flag("rounds of measuring; the median counts", default=3, parse=positive)
    static_depths: tuple[int, ...] = flag(
        "baselines: train the backbone cut to so many layers",
        default=(),
        parse=each(positive),
        metavar="K,K",
    )
    static_style: str = flag(
        "layers that static baselines keep", default="first", choices=("first", "every-other")
    )
    backbone: str | None = flag("encoder that static baselines are cut from", default=None)
    train_data: str | None = flag(
        "their training texts, as --data; left out, the train split of --glue-dir or of the hub id",
        default=None,
    )
    max_train_rows: int | None = flag(
        "train them on a random sample of this many rows", default=None, parse=positive
    )
    epochs: float = flag("their epochs", default=3.0, parse=number)
    batch_size: int = flag("their samples per step", default=8, parse=positive)
    learning_rate: float = flag("their peak learning rate", default=2e-5, parse=number)
    seed: int = flag("their random seed", default=42, parse=random_seed)
    output: str | None = flag("folder for report.html, pictures and tables", default=None)


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, evaluate, print and write."""
    job = parse_job(
        EvaluateJob,
        argv,
        prog=prog,
        description="Score every off-ramp, sweep thresholds, measure time, draw the paper's figures.",
    )
    show(evaluate(job), job.output)
    return 0


def evaluate(job: EvaluateJob) -> Evaluation:
    """What `job` asks for, found; nothing is written but the trace.

    Raises:
        UsageError: flags that do not go together, or a trace of another model or of other data.
        DataError: labelled data that cannot be read or does not fit the model.
        CheckpointError: the model cannot be loaded.
    """
    _check(job)
    # Heavy imports come after the checks that need none of them.
    from jobs.evaluation import run

    quiet_libraries()
    return run(job)


def show(found: Evaluation, output: str | None) -> None:
    """Print the tables, and write them with the page and its pictures where there is an output."""
    from pipeline.report.evaluated import state_evaluation, to_markdown
    from pipeline.report.evaluation import evaluation_files

    print(f"{found.origin}\n")
    for one in found.sets:
        for table in state_evaluation(one).values():
            print(f"{table.title}\n\n{to_markdown(table)}", end="\n\n")
    if output is None:
        return
    folder = Path(output)
    files = evaluation_files(found.sets, model=found.model, task=found.task, origin=found.origin)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UsageError(f"cannot write to {output!r}: {error.strerror or error}") from error
    print(folder / "report.html")


def _check(job: EvaluateJob) -> None:
    has_trace = job.trace is not None and Path(job.trace).exists()
    if job.model is None and not has_trace:
        raise UsageError("give --model, or a --trace that is there already")
    if job.data is None and job.glue_dir is None and not has_trace:
        raise UsageError("give the labelled texts as --data, or as --glue-dir with --task")
    if job.model is None and (job.data is not None or job.glue_dir is not None):
        raise UsageError(
            "a --trace is of its own texts: leave --data and --glue-dir out, or give the --model to trace them with"
        )
    if job.store_agreement and (job.precision != "int8" or job.model is None or not Path(job.model).is_dir()):
        raise UsageError("--store-agreement needs --precision int8 and a folder as --model")
    if job.store_agreement and job.data is None and job.glue_dir is None:
        raise UsageError("--store-agreement needs texts, as --data or --glue-dir")
    if job.static_depths and (job.model is None or job.backbone is None):
        raise UsageError("--static-depths needs --model and the --backbone that it was trained from")
    if job.static_depths and job.data is None and job.glue_dir is None:
        raise UsageError("--static-depths needs the labelled texts, as --data or --glue-dir")


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("evaluate"))
