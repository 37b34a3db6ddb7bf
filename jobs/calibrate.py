"""`deebert calibrate`: from labelled or plain held-out texts to an operating point, stored with the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deebert.errors import PolicyError
from jobs.flags import flag, parse_job
from jobs.glue import find_task
from jobs.subject_flags import SubjectFlags
from jobs.terminal import quiet_libraries
from pipeline.config import PRECISIONS
from pipeline.errors import UsageError
from pipeline.fields import number

if TYPE_CHECKING:
    from deebert.calibration import Disagreement, Drop
    from deebert.checkpoint import Checkpoint
    from deebert.evaluation import LabelledSequences, OperatingPointScore, Trace
    from jobs.metrics import NamedMetric


def _proper_share(text: str) -> float:
    value = number(text)
    if not 0 < value < 1:
        raise ValueError(f"{text!r} is not a share between 0 and 1")
    return value


def _kept_share(text: str) -> float:
    return 1.0 if number(text) == 1 else _proper_share(text)


def _speed_up(text: str) -> float:
    value = number(text)
    if not 1 < value < float("inf"):
        raise ValueError(f"{text!r} is not a number above 1")
    return value


@dataclass(frozen=True, kw_only=True)
class CalibrateJob(SubjectFlags):
    """What `deebert calibrate` takes."""

    model: str = flag("folder of a DeeBERT model: the operating point is stored in its config.json")
    split: str | None = flag("of a data set; left out, validation (MNLI: say which)", default=None)
    precision: str = flag(
        "auto is that of a --trace that is there, else what classify chooses by itself: what is promised of one "
        "precision need not hold in another",
        default="auto",
        choices=PRECISIONS,
    )
    keep: float | None = flag(
        "target: the largest saving that keeps this share of full depth's score, e.g. 0.99",
        default=None,
        parse=_kept_share,
        metavar="SHARE",
    )
    max_disagreement: float | None = flag(
        "target: the largest saving with which less than this share of answers differ from full depth's, e.g. 0.02",
        default=None,
        parse=_proper_share,
        metavar="SHARE",
    )
    max_drop: float | None = flag(
        "target: the largest saving with which accuracy is less than this share of all texts below full depth's, "
        "e.g. 0.01",
        default=None,
        parse=_proper_share,
        metavar="SHARE",
    )
    confidence: float = flag("of --max-disagreement and --max-drop", default=0.95, parse=_proper_share)
    speed_up: float | None = flag(
        "target: the least saving that makes so many times fewer layers",
        default=None,
        parse=_speed_up,
        metavar="X",
    )


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, choose, store, print."""
    job = parse_job(
        CalibrateJob,
        argv,
        prog=prog,
        description="Choose the threshold at which samples leave, and store it with the model.",
    )
    print(calibrate(job))
    return 0


def calibrate(job: CalibrateJob) -> str:
    """Choose and store an operating point; what it does on the texts, as a few lines.

    Raises:
        UsageError: not exactly one target, a hub id, several sets, or flags that do not go together.
        PolicyError: the texts cannot show that the target is met, or no threshold meets it and saves anything.
        DataError: labelled data that cannot be read or does not fit the model.
        CheckpointError: the model cannot be loaded, or its folder not written.
    """
    _check(job)
    # Heavy imports come after the checks that need none of them.
    from deebert.calibration import disagreement, drop
    from deebert.checkpoint import store_operating_point
    from deebert.evaluation import score
    from deebert.exit_policy import FULL_DEPTH
    from deebert.problem import REGRESSION, SINGLE_LABEL
    from jobs.evaluation import traced_file
    from jobs.metrics import metrics_of
    from jobs.subject import load_subject

    quiet_libraries()
    subject = load_subject(replace(job, precision=_precision(job)), job.model)
    if len(subject.data) != 1:
        raise UsageError(f"the data are {len(subject.data)} sets: say which with --split")
    (name, data), file = *subject.data.items(), traced_file(job, subject)
    trace = file.sets[name].trace
    task = None if subject.task is None else find_task(subject.task)
    metric = metrics_of(task, subject.labels, subject.encoder.problem)[0]
    point = _chosen(job, trace, data, metric)
    if point.saving <= 0:
        raise PolicyError(
            "no threshold that meets this target saves anything, so none is stored: relax the target, or train longer"
        )
    full = score(trace, data.labels, FULL_DEPTH, metric.compute)
    store_operating_point(Path(job.model), point.policy)
    found = lost = None
    if trace.problem is not REGRESSION:
        found = disagreement(trace, point.policy, confidence=job.confidence)
    if trace.problem is SINGLE_LABEL:
        lost = drop(trace, data.labels, point.policy, confidence=job.confidence)
    earlier = _stored(subject.checkpoint)
    said = _said(
        job,
        point,
        full,
        metric.name,
        texts=trace.num_texts,
        origin=file.origin.read_as,
        earlier=earlier,
        found=found,
        lost=lost,
    )
    return "\n".join(f"{name:<18}{value}" for name, value in said)


def _check(job: CalibrateJob) -> None:
    """What can be refused without looking at weights or data."""
    targets = [target for target in (job.keep, job.max_disagreement, job.max_drop, job.speed_up) if target]
    if len(targets) != 1:
        found = "no target" if not targets else "more than one target"
        raise UsageError(
            f"{found} is given: give one of --keep, --max-disagreement, --max-drop and --speed-up"
        )
    if job.data is None and job.glue_dir is None:
        raise UsageError("give texts that training has not seen, as --data, or as --glue-dir with --task")
    if not Path(job.model).is_dir():
        raise UsageError(f"the model {job.model!r} is no folder, where an operating point could be stored")


def _precision(job: CalibrateJob) -> str:
    from jobs.traces import read_origin

    if job.precision != "auto" or job.trace is None or not Path(job.trace).exists():
        return job.precision
    return read_origin(Path(job.trace)).precision


def _chosen(
    job: CalibrateJob, trace: Trace, data: LabelledSequences, metric: NamedMetric
) -> OperatingPointScore:
    from deebert.calibration import (
        choose_by_disagreement,
        choose_by_drop,
        choose_by_speed_up,
        choose_threshold,
    )
    from deebert.evaluation import score

    labels, compute = data.labels, metric.compute
    if job.max_disagreement is not None:
        policy = choose_by_disagreement(trace, most=job.max_disagreement, confidence=job.confidence)
        return score(trace, labels, policy, compute)
    if job.max_drop is not None:
        policy = choose_by_drop(trace, labels, most=job.max_drop, confidence=job.confidence)
        return score(trace, labels, policy, compute)
    if job.speed_up is not None:
        return choose_by_speed_up(trace, labels, speed_up=job.speed_up, metric=compute)
    assert job.keep is not None  # as `_check` made sure
    return choose_threshold(trace, labels, keep_accuracy=job.keep, metric=compute)


def _stored(checkpoint: Checkpoint) -> str | None:
    """The operating point that the model had before, in words; as it stands where it is none."""
    stored = checkpoint.config.exit_policy
    try:
        return None if stored is None else str(checkpoint.exit_policy)
    except PolicyError:
        return str(stored)


def _said(
    job: CalibrateJob,
    point: OperatingPointScore,
    full: OperatingPointScore,
    metric: str,
    *,
    texts: int,
    origin: str,
    earlier: str | None,
    found: Disagreement | None,
    lost: Drop | None,
) -> Iterator[tuple[str, str]]:
    yield "operating point", str(point.policy)
    if earlier is not None:
        yield "in place of", earlier
    yield metric, f"{100 * point.score:.2f} % on {texts} texts; {100 * full.score:.2f} % at full depth"
    # What was tested is the target, not what the bound came to where the tests ended.
    if found is not None:
        bounded = "" if job.max_disagreement is None else _bound(job, job.max_disagreement, origin)
        yield "other answers", f"{100 * found.share:.2f} % differ from full depth's{bounded}"
    if lost is not None:
        bounded = "" if job.max_drop is None else _bound(job, job.max_drop, origin)
        yield (
            "drop in accuracy",
            f"{100 * lost.share:.2f} %: {lost.lost} right answers lost, {lost.won} won{bounded}",
        )
    yield "layers", f"{point.speed_up:.2f} times fewer (mean exit layer {point.mean_exit_layer:.2f})"
    yield "stored in", str(Path(job.model) / "config.json")


def _bound(job: CalibrateJob, share: float, origin: str) -> str:
    return (
        f"; of all such texts less than {100 * share:g} % ({100 * job.confidence:g} % confidence; {origin})"
    )


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("calibrate"))
