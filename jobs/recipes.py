"""`python -m jobs.recipes`: training recipes against each other, as a Markdown table.

Trains each variant on the same rows with the same budget and reads its accuracy off the threshold sweep at full
depth and at given layer speed-ups. What is there already is not trained again: run it in parts, add variants.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.flags import comma_list, flag, parse_job
from jobs.train import TrainJob, train
from pipeline.config import positive
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from deebert.evaluation import Trace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One recipe: flags of `deebert train`, and models of other variants that it builds on."""

    flags: Mapping[str, Any]
    start: str | None = None
    """The variant whose model it goes on with, instead of the backbone."""
    teacher: str | None = None
    """The variant whose model teaches it."""


_JOINT = {"recipe": "joint", "self_distillation": 0.5}
_JOINT_FAST = {**_JOINT, "off_ramp_learning_rate": 5e-4}
_ALTERNATING = {"recipe": "alternating", "self_distillation": 0.5, "off_ramp_learning_rate": 5e-4}
_REFRESH = {"recipe": "off-ramps", "self_distillation": 0.7}

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "two-stage": Variant(flags={}),
        "two-stage-exact": Variant(flags={"recipe": "off-ramps", "stage_2": "exact"}, start="two-stage"),
        "two-stage-distilled": Variant(flags=_REFRESH, start="two-stage"),
        "joint": Variant(flags={"recipe": "joint"}),
        "joint-distilled": Variant(flags=_JOINT),
        "joint-uniform": Variant(flags={**_JOINT, "weighting": "uniform"}),
        "joint-equilibrium": Variant(flags={**_JOINT, "weighting": "equilibrium"}),
        "joint-fast-off-ramps": Variant(flags=_JOINT_FAST),
        "joint-refreshed": Variant(flags=_REFRESH, start="joint-fast-off-ramps"),
        "alternating": Variant(flags=_ALTERNATING),
        "alternating-refreshed": Variant(flags=_REFRESH, start="alternating"),
        "taught": Variant(flags=_JOINT_FAST, teacher="two-stage"),
        "taught-refreshed": Variant(flags=_REFRESH, start="taught"),
        "taught-hidden": Variant(flags={**_JOINT_FAST, "teacher_hidden_weight": 1.0}, teacher="two-stage"),
        "continued": Variant(flags=_JOINT_FAST, start="two-stage", teacher="two-stage"),
        "continued-refreshed": Variant(flags=_REFRESH, start="continued"),
    }
)


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in comma_list(text))


@dataclass(frozen=True, kw_only=True)
class RecipesJob:
    """What `python -m jobs.recipes` takes."""

    backbone: str = flag("folder or hub id of a BERT or RoBERTa encoder")
    data: str = flag("labelled texts to train on")
    evaluation_data: str = flag("labelled texts to judge by")
    text_column: str = flag("column of the text", default="text")
    text_pair_column: str | None = flag("column of the second segment", default=None)
    label_column: str = flag("column of the label", default="label")
    labels: tuple[str, ...] | None = flag(
        "label names in the order of their ids", default=None, parse=comma_list, metavar="A,B"
    )
    output: str = flag("folder for the models and results.json")
    variants: tuple[str, ...] = flag(
        "which to compare", default=tuple(VARIANTS), parse=comma_list, metavar="A,B"
    )
    speed_ups: tuple[float, ...] = flag(
        "layer speed-ups to compare at", default=(2.0, 3.0, 4.0), parse=_floats
    )
    max_rows: int | None = flag("train on a random sample of this many rows", default=None, parse=positive)
    epochs: float = flag("stage 1: epochs", default=1.0, parse=float)
    batch_size: int = flag("stage 1: samples per step", default=32, parse=positive)
    learning_rate: float = flag("stage 1: peak learning rate", default=5e-5, parse=float)
    off_ramp_epochs: float | None = flag("stage 2: epochs", default=None, parse=float)
    precision: str = flag(
        "of training; judged in float32", default="auto", choices=("auto", "float32", "bfloat16")
    )
    seed: int = flag("random seed", default=42, parse=int)
    checkpoint_steps: int = flag("steps between checkpoints", default=1000, parse=positive)


Result = dict[str, Any]


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Train what is missing, judge it, print the table."""
    job = parse_job(RecipesJob, argv, prog=prog, description="Compare training recipes on the same rows.")
    if unknown := [name for name in job.variants if name not in VARIANTS]:
        raise UsageError(f"unknown variant {unknown[0]!r}: choose among {', '.join(VARIANTS)}")
    print(_markdown(compare(job), job))
    return 0


def compare(job: RecipesJob) -> dict[str, Result]:
    """Each variant's result; kept in `results.json`, so that a second call does only what is new."""
    path = Path(job.output) / "results.json"
    results: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    for name in job.variants:
        _make(name, job, results, path)
    return {name: results[name] for name in job.variants}


def _make(name: str, job: RecipesJob, results: dict[str, Result], path: Path) -> None:
    variant = VARIANTS[name]
    for needed in filter(None, (variant.start, variant.teacher)):
        _make(needed, job, results, path)
    if name in results:
        return
    started = time.monotonic()
    train(_train_job(name, variant, job))
    seconds = time.monotonic() - started
    builds_on = {n for n in (variant.start, variant.teacher) if n is not None}
    total = seconds + sum(results[n]["total_seconds"] for n in builds_on)
    results[name] = {"seconds": seconds, "total_seconds": total, **_judge(Path(job.output) / name, job)}
    path.write_text(json.dumps(results, indent=1))


def _train_job(name: str, variant: Variant, job: RecipesJob) -> TrainJob:
    folder = Path(job.output)
    has_stage_1 = variant.flags.get("recipe") != "off-ramps"
    budget: dict[str, Any] = {
        "epochs": job.epochs,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
    }
    return TrainJob(
        backbone=job.backbone if variant.start is None else None,
        from_model=None if variant.start is None else str(folder / variant.start),
        teacher=None if variant.teacher is None else str(folder / variant.teacher),
        data=job.data,
        text_column=job.text_column,
        text_pair_column=job.text_pair_column,
        label_column=job.label_column,
        labels=job.labels,
        max_rows=job.max_rows,
        off_ramp_epochs=job.off_ramp_epochs,
        precision=job.precision,
        seed=job.seed,
        checkpoint_steps=job.checkpoint_steps,
        output=str(folder / name),
        # A run that was cut short left a training, or a model that was not judged yet.
        resume=True,
        overwrite=True,
        **(budget if has_stage_1 else {}),
        **variant.flags,
    )


def _judge(folder: Path, job: RecipesJob) -> Result:
    from deebert.checkpoint import load_checkpoint
    from deebert.encoder import PackedEncoder
    from deebert.evaluation import off_ramp_accuracy, sweep, trace
    from jobs.labelled import load_labelled
    from pipeline.tokenization import TextTokenizer

    checkpoint = load_checkpoint(str(folder))
    texts = load_labelled(
        job.evaluation_data,
        text_column=job.text_column,
        text_pair_column=job.text_pair_column,
        label_column=job.label_column,
        names=checkpoint.labels,
        split="validation",
    )
    data = texts.tokenized(TextTokenizer(checkpoint.tokenizer, max_length=checkpoint.default_max_length))
    traced: Trace = trace(PackedEncoder.of(checkpoint.model), data.tokens)
    most = math.log(traced.logits.shape[-1])
    full, *points = sweep(traced, data.labels, (None, *np.linspace(0, most, 201)[1:].tolist()))
    return {
        "off_ramps": off_ramp_accuracy(traced, data.labels),
        "full": full.accuracy,
        "points": [(p.speed_up, p.accuracy) for p in (full, *points)],
    }


def accuracy_at(points: Sequence[Sequence[float]], speed_up: float) -> float | None:
    """Accuracy at a layer speed-up, between the two operating points around it; None beyond the last.

    Args:
        points: (layer speed-up, accuracy) of rising thresholds.
        speed_up: where to read.
    """
    speeds, accuracies = zip(*points, strict=True)
    if speed_up > speeds[-1]:
        return None
    return float(np.interp(speed_up, speeds, accuracies))


def _markdown(results: Mapping[str, Result], job: RecipesJob) -> str:
    columns = [
        "variant",
        "full depth",
        *(f"{s:g}×" for s in job.speed_ups),
        "seconds",
        "with what it builds on",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for name, result in results.items():
        at = (accuracy_at(result["points"], s) for s in job.speed_ups)
        cells = [_percent(result["full"]), *map(_percent, at)]
        times = [f"{result['seconds']:.0f}", f"{result['total_seconds']:.0f}"]
        lines.append(f"| {' | '.join([name, *cells, *times])} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}"


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("recipes"))
