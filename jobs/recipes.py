"""`python -m jobs.recipes`: training recipes against each other, over several seeds, as Markdown tables.

Trains each variant on the same rows with the same budget and reads its score off the threshold sweep at full
depth and at given layer speed-ups. What is there already is not trained again: run it in parts, add variants, run
seeds beside each other in one folder. What all of them share is in the folder's `study.json`; other settings are
refused.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deebert.problem import SINGLE_LABEL
from jobs.flags import comma_list, flag, label_names, parse_job
from jobs.glue import TASK_NAMES, Columns
from jobs.recipe_scores import ModelScore, judge, tables
from jobs.recipe_variants import BASE, VARIANTS, Between, Static, Trained
from jobs.rival_policies import POLICIES
from jobs.train import TrainJob, train
from pipeline.errors import UsageError
from pipeline.fields import each, number, positive, positive_number, random_seed, share

if TYPE_CHECKING:
    from deebert.checkpoint import Checkpoint
    from deebert.evaluation import LabelledSequences, Metric, Trace
    from jobs.labelled import LabelledSource, LabelledTexts

log = logging.getLogger(__name__)


# Folders say nothing of the results that are shared.
_PLACES = ("backbone", "data", "evaluation_data", "glue_dir", "output")
# These may differ from call to call in one folder.
_FREE = ("variants", "seeds", "speed_ups", "policies", "checkpoint_steps", "output")


@dataclass(frozen=True, kw_only=True)
class RecipesJob:
    """What `python -m jobs.recipes` takes."""

    backbone: str = flag("folder or hub id of the encoder")
    data: str | None = flag("labelled texts to train on", default=None)
    evaluation_data: str | None = flag("labelled texts to judge by", default=None)
    glue_dir: str | None = flag("or GLUE's TSV folders for both, with --task", default=None, metavar="DIR")
    task: str | None = flag("GLUE task of the data", default=None, choices=TASK_NAMES)
    text_column: str = flag("column of the text", default="text")
    text_pair_column: str | None = flag("column of the second segment", default=None)
    label_column: str = flag("column of the label", default="label")
    labels: tuple[str, ...] | None = flag(
        "label names in the order of their ids", default=None, parse=label_names, metavar="A,B"
    )
    output: str = flag("folder for the models, results.json and results.md")
    variants: tuple[str, ...] = flag(
        "which to compare",
        default=(BASE, "continued", "continued-100-0", "static-6"),
        parse=comma_list,
        metavar="A,B",
    )
    seeds: tuple[int, ...] = flag("one training each", default=(42,), parse=each(random_seed), metavar="I,I")
    speed_ups: tuple[float, ...] = flag(
        "layer speed-ups to compare at", default=(2.0, 3.0, 4.0), parse=each(positive_number)
    )
    policies: tuple[str, ...] = flag(
        "exit policies of other papers to judge the same models by",
        default=(),
        parse=comma_list,
        metavar="A,B",
    )
    held_out: float = flag(
        "share of the training rows that nothing trains on: thresholds are chosen on them",
        default=0.03,
        parse=share,
    )
    max_rows: int | None = flag("train on a random sample of this many rows", default=None, parse=positive)
    epochs: float = flag("stage 1: epochs", default=1.0, parse=number)
    batch_size: int = flag("stage 1: samples per step", default=32, parse=positive)
    learning_rate: float = flag("stage 1: peak learning rate", default=5e-5, parse=number)
    off_ramp_epochs: float | None = flag("stage 2: epochs", default=None, parse=number)
    precision: str = flag(
        "of training; judged in float32", default="auto", choices=("auto", "float32", "bfloat16")
    )
    checkpoint_steps: int = flag("steps between checkpoints", default=1000, parse=positive)

    @property
    def sources(self) -> tuple[LabelledSource, LabelledSource]:
        """Of the rows to train on, and to judge by."""
        from jobs.labelled import LabelledSource

        columns = Columns(text=self.text_column, pair=self.text_pair_column, label=self.label_column)
        ours = LabelledSource(data=self.data, glue_dir=self.glue_dir, task=self.task, columns=columns)
        theirs = self.evaluation_data or self.data
        return ours, replace(ours, data=theirs)


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Train what is missing, judge it, print the tables."""
    job = parse_job(RecipesJob, argv, prog=prog, description="Compare training recipes on the same rows.")
    if unknown := [name for name in job.variants if name not in VARIANTS]:
        raise UsageError(f"unknown variant {unknown[0]!r}: choose among {', '.join(VARIANTS)}")
    if unknown := [name for name in job.policies if name not in POLICIES]:
        raise UsageError(f"unknown policy {unknown[0]!r}: choose among {', '.join(POLICIES)}")
    if job.glue_dir is None and job.evaluation_data is None:
        raise UsageError("a recipe is not judged by what it trained on: give --evaluation-data")
    results = compare(job)
    text = tables(results, job.speed_ups, BASE if BASE in results else job.variants[0])
    from jobs.benchmarks import machine

    document = {
        "job": {name: value for name, value in asdict(job).items() if name not in _PLACES},
        "machine": machine.describe(),
        "scores": {name: [score.to_dict() for score in scores] for name, scores in results.items()},
    }
    # A curve has a hundred points: sixteen digits of each, a line for each, would be most of a file to share.
    rounded = json.loads(json.dumps(document), parse_float=lambda text: round(float(text), 6))
    (Path(job.output) / "results.json").write_text(json.dumps(rounded) + "\n")
    (Path(job.output) / "results.md").write_text(text + "\n")
    print(text)
    return 0


def compare(job: RecipesJob) -> dict[str, list[ModelScore]]:
    """Each variant's scores, one a seed; every one is kept, so that a second call does only what is new."""
    study = _Study(job)
    return {name: [study.score(name, seed) for seed in job.seeds] for name in job.variants}


class _Study:
    """Models and results of one folder."""

    def __init__(self, job: RecipesJob) -> None:
        self._job, self._folder = job, Path(job.output)
        ours, theirs = job.sources
        everything = ours.training_texts(job.labels)
        if everything.problem is not SINGLE_LABEL:
            raise UsageError(
                f"the labels are of a {everything.problem.name}, and recipes are compared by the entropy over classes: "
                "give a task or data with one class for each text"
            )
        self._kept, self._held_out = self._split(everything)
        self._names, self._task = everything.names, ours.glue_task
        self._judged = next(iter(theirs.evaluation_texts(everything.names).values()))
        # After what can be wrong with the data: a folder is not bound to settings that never worked.
        settings = {name: value for name, value in asdict(job).items() if name not in _FREE}
        check_study(self._folder, settings, flag="--output")
        self._train = self._file_of(self._kept)

    def score(self, name: str, seed: int) -> ModelScore:
        """One variant's score; trained first, with all that it builds on, where it is not there yet."""
        path = self._model(name, seed).with_suffix(".json")
        if not path.exists():
            made = self._made(name, seed)
            _keep(made, path)
        kept = ModelScore.of(json.loads(path.read_text()))
        if kept.chosen is None or self._answers(kept):
            return kept
        # Judged at other speed-ups or by other policies: the model is still there.
        judged = self._scored(self._model(name, seed))
        judged = replace(
            kept,
            chosen={**kept.chosen, **(judged.chosen or {})},
            by_policy=_merged(kept.by_policy or {}, judged.by_policy or {}),
        )
        _keep(judged, path)
        return judged

    def _answers(self, kept: ModelScore) -> bool:
        """Whether what was kept has all that is asked for."""
        asked = {f"{s:g}" for s in self._job.speed_ups}
        has = [kept.chosen or {}, *((kept.by_policy or {}).get(name, {}) for name in self._job.policies)]
        return all(asked <= scores.keys() for scores in has)

    def _made(self, name: str, seed: int) -> ModelScore:
        variant = VARIANTS[name]
        before = sum(self.score(n, seed).total_seconds for n in sorted(variant.builds_on))
        log.info("%s, seed %d", name, seed)
        started = time.monotonic()
        if isinstance(variant, Static):
            made = self._static(variant, seed)
            seconds = total = time.monotonic() - started
        else:
            if isinstance(variant, Between):
                self._go_between(variant, seed, self._model(name, seed))
                seconds = time.monotonic() - started
            else:
                train(self._train_job(name, variant, seed))
                seconds = training_seconds(self._model(name, seed))
            total = seconds + before
            made = self._scored(self._model(name, seed))
        return replace(made, seconds=seconds, total_seconds=total)

    def _model(self, name: str, seed: int) -> Path:
        return self._folder / f"{name}-{seed}"

    def _split(self, texts: LabelledTexts) -> tuple[LabelledTexts, LabelledTexts]:
        """The rows to train on, and those held out, the same for all seeds."""
        import numpy as np

        order = np.random.default_rng(0).permutation(len(texts))
        held = max(1, round(self._job.held_out * len(texts)))
        return texts.take(np.sort(order[held:]).tolist()), texts.take(np.sort(order[:held]).tolist())

    def _file_of(self, texts: LabelledTexts) -> Path:
        """Rows as `deebert train` reads them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._folder / "train.parquet"
        if not path.exists():
            names = [texts.names[i] for i in texts.labels]
            columns = {"text": texts.texts, "pair": texts.pairs, "label": names}
            table = pa.table({name: list(values) for name, values in columns.items() if values is not None})
            with _whole(path) as partial:
                pq.write_table(table, partial)
        return path

    def _train_job(self, name: str, variant: Trained, seed: int) -> TrainJob:
        job = self._job
        has_stage_1 = variant.flags.get("recipe") != "off-ramps"
        budget: dict[str, Any] = {
            "epochs": variant.share * job.epochs,
            "batch_size": job.batch_size,
            "learning_rate": job.learning_rate,
        }
        return TrainJob(
            backbone=job.backbone if variant.start is None else None,
            from_model=None if variant.start is None else str(self._model(variant.start, seed)),
            teacher=None if variant.teacher is None else str(self._model(variant.teacher, seed)),
            data=str(self._train),
            text_pair_column=None if self._held_out.pairs is None else "pair",
            labels=self._names,
            max_rows=job.max_rows,
            off_ramp_epochs=job.off_ramp_epochs,
            precision=job.precision,
            seed=seed,
            checkpoint_steps=job.checkpoint_steps,
            output=str(self._model(name, seed)),
            # A run that was cut short left a training, or a model that was not judged yet.
            resume=True,
            overwrite=True,
            **(budget if has_stage_1 else {}),
            **variant.flags,
        )

    def _scored(self, folder: Path) -> ModelScore:
        from deebert.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(str(folder))
        judged, held_out = (self._traced(checkpoint, texts) for texts in (self._judged, self._held_out))
        return judge(judged, held_out, self._job.speed_ups, self._metric, self._job.policies)

    def _static(self, variant: Static, seed: int) -> ModelScore:
        from deebert.checkpoint import Checkpoint, load_checkpoint
        from deebert.evaluation import score
        from deebert.exit_policy import FULL_DEPTH
        from deebert.precision import resolve_precision
        from deebert.training import BackboneStage, Recipe
        from jobs.labelled import sample
        from jobs.static import train_static
        from jobs.traces import StaticRecord

        job = self._job
        like = load_checkpoint(str(self._model(variant.like, seed)))
        data = _tokenized(like, sample(self._kept, job.max_rows, seed=seed))
        record = StaticRecord(depth=variant.depth, style="first", recipe={"backbone": job.backbone})
        budget = BackboneStage(epochs=job.epochs, batch_size=job.batch_size, learning_rate=job.learning_rate)
        recipe = Recipe(
            stage_1=budget,
            seed=seed,
            precision=resolve_precision(job.precision),
            checkpoint_steps=job.checkpoint_steps,
        )
        model = train_static(record, like=like, data=data, recipe=recipe).model
        traced, judged = self._traced(Checkpoint.of(like.path, model, like.tokenizer), self._judged)
        return ModelScore(
            full=score(traced, judged.labels, FULL_DEPTH, self._metric).score,
            depth_speed_up=like.config.num_hidden_layers / variant.depth,
        )

    def _go_between(self, variant: Between, seed: int, folder: Path) -> None:
        from deebert.checkpoint import load_checkpoint
        from deebert.training import Interpolation, interpolate, snapshot

        start, end = (load_checkpoint(str(self._model(n, seed))) for n in (variant.start, variant.towards))
        first, last = variant.shares
        interpolate(end.model, snapshot(start.model), Interpolation(first=first, last=last))
        end.model.config.int8_agreement = end.model.config.exit_policy = None  # of other weights
        end.model.save_pretrained(folder)
        end.tokenizer.save_pretrained(folder)

    def _traced(self, checkpoint: Checkpoint, texts: LabelledTexts) -> tuple[Trace, LabelledSequences]:
        from deebert.encoder import PackedEncoder
        from deebert.evaluation import trace

        data = _tokenized(checkpoint, texts)
        return trace(PackedEncoder(checkpoint.fused), data.tokens), data

    @property
    def _metric(self) -> Metric:
        from jobs.metrics import metrics_of

        return metrics_of(self._task, self._names)[0].compute


def _merged(
    kept: Mapping[str, Mapping[str, float | None]], judged: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, float | None]]:
    names = dict.fromkeys((*kept, *judged))
    return {name: {**kept.get(name, {}), **judged.get(name, {})} for name in names}


def _tokenized(checkpoint: Checkpoint, texts: LabelledTexts) -> LabelledSequences:
    from pipeline.tokenization import TextTokenizer

    return texts.tokenized(TextTokenizer(checkpoint.tokenizer, max_length=checkpoint.default_max_length))


def check_study(folder: Path, settings: Mapping[str, Any], *, flag: str) -> None:
    """Write the settings of a new folder to its `study.json`; refuse a folder that other settings filled.

    A folder without that file, by an earlier version, is taken to be of these settings.

    Args:
        folder: made where it is not there.
        settings: JSON values that decide what is in it.
        flag: names the folder.

    Raises:
        UsageError: a setting differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.json"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    # A link is there whole at once and, unlike a renaming, never replaces what another process has just written.
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            partial.replace(path)
    partial.unlink(missing_ok=True)
    theirs, ours = json.loads(path.read_text()), json.loads(json.dumps(settings))
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise UsageError(
                f"the folder {str(folder)!r} is of other settings ({name.replace('_', ' ')} {theirs.get(name)}, not "
                f"{value}): go on with its own, or choose another {flag}"
            )


def training_seconds(folder: Path) -> float:
    """Over all attempts: a training that was killed took no less for it."""
    from deebert.training import LOG_NAME, read_log

    return sum(float(record["seconds"]) for record in read_log(folder / LOG_NAME) if "done" in record)


def _keep(score: ModelScore, path: Path) -> None:
    with _whole(path) as partial:
        partial.write_text(json.dumps(score.to_dict()))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is then there whole or not at all, whoever else writes it meanwhile."""
    partial = path.with_suffix(f".{os.getpid()}")
    yield partial
    partial.replace(path)


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("recipes"))
