"""An evaluation, step by step: data, trace, static baselines, timings, scores.

Each step takes what the one before found; a step whose result the trace file holds already is not repeated.
Knows nothing of flags' spelling, pages or pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deebert.baselines import kept_layers
from deebert.checkpoint import Checkpoint, load_checkpoint, weights_digest
from deebert.cost import ModelShape
from deebert.encoder import PackedEncoder
from deebert.evaluation import (
    LabelledSequences,
    exits,
    flop_saving,
    off_ramp_scores,
    score,
    static_flop_saving,
    trace,
)
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.modeling import DeeBertForSequenceClassification
from deebert.precision import DTYPES, Precision, resolve_precision
from deebert.training import StageConfig, TwoStageConfig
from jobs.glue import find_task
from jobs.labelled import LabelledSource, sample
from jobs.metrics import NamedMetric, metrics_of
from jobs.static import StaticBaseline, train_static
from jobs.timing import Contender, Timing, choose_samples, measure
from jobs.traces import TracedSet, TraceFile, TraceOrigin, data_digest, read_traces, write_traces
from pipeline.errors import UsageError
from pipeline.report.evaluated import FULL_DEPTH_NAME, EvaluatedPoint, EvaluatedSet, Measured
from pipeline.tokenization import TextTokenizer

if TYPE_CHECKING:
    from jobs.evaluate import EvaluateJob

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found."""

    model: str
    task: str | None
    origin: str
    """One line on precision and length."""
    sets: tuple[EvaluatedSet, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Subject:
    """The model under evaluation, ready to run, and its labelled data where they were given."""

    checkpoint: Checkpoint
    encoder: PackedEncoder
    labels: tuple[str, ...]
    precision: Precision
    tokenizer: TextTokenizer
    task: str | None
    data: Mapping[str, LabelledSequences]


def run(job: EvaluateJob) -> Evaluation:
    """The whole evaluation; writes the trace and nothing else."""
    subject = None if job.model is None else _subject(job, job.model)
    file = _traced(job, subject)
    statics = () if subject is None else _train_statics(job, subject)
    file = _timed(job, subject, file, statics)
    answers = (
        {}
        if subject is None
        else {name: _static_answers(data, subject.precision, statics) for name, data in subject.data.items()}
    )
    return Evaluation(
        model=file.origin.model,
        task=file.origin.task,
        origin=f"{file.origin.precision}, texts cut to {file.origin.max_length} tokens",
        sets=tuple(_evaluated(name, file, job.thresholds, answers.get(name, ())) for name in file.sets),
    )


def _subject(job: EvaluateJob, model: str) -> _Subject:
    checkpoint = load_checkpoint(model)
    labels = job.labels or checkpoint.labels
    if len(labels) != len(checkpoint.labels):
        raise UsageError(f"--labels names {len(labels)} labels but the model has {len(checkpoint.labels)}")
    tokenizer = TextTokenizer(
        checkpoint.tokenizer, max_length=job.max_length or checkpoint.default_max_length
    )
    precision = resolve_precision(job.precision)
    source = _source(job)
    texts = {} if source is None else source.evaluation_texts(labels)
    task = None if source is None else source.glue_task
    return _Subject(
        checkpoint=checkpoint,
        encoder=_encoder(checkpoint.model, precision),
        labels=labels,
        precision=precision,
        tokenizer=tokenizer,
        task=task.name if task else None,
        data={name: one.tokenized(tokenizer) for name, one in texts.items()},
    )


def _encoder(model: DeeBertForSequenceClassification, precision: Precision) -> PackedEncoder:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PackedEncoder(model, device=device, dtype=DTYPES[precision])


def _source(job: EvaluateJob) -> LabelledSource | None:
    if job.data is None and job.glue_dir is None:
        return None
    return LabelledSource(
        data=job.data, glue_dir=job.glue_dir, task=job.task, columns=job.columns, split=job.split
    )


def _traced(job: EvaluateJob, subject: _Subject | None) -> TraceFile:
    """The trace file's content, read where it is there, else made and, where a name was given, written."""
    path = None if job.trace is None else Path(job.trace)
    if path is not None and path.exists():
        file = read_traces(path)
        if subject is not None:
            _check_origin(job, file.origin, subject)
        return file
    assert subject is not None  # as `evaluate` checked
    file = TraceFile(
        origin=_origin(subject),
        sets={
            name: TracedSet(trace=trace(subject.encoder, data.tokens), labels=data.labels)
            for name, data in subject.data.items()
        },
        timings={},
    )
    if path is not None:
        write_traces(path, file)
    return file


def _origin(subject: _Subject) -> TraceOrigin:
    backbone = subject.checkpoint.model.config.backbone_config
    return TraceOrigin(
        model=subject.checkpoint.path,
        model_digest=weights_digest(subject.checkpoint.model),
        data_digest=data_digest(subject.data),
        task=subject.task,
        labels=subject.labels,
        precision=subject.precision,
        max_length=subject.tokenizer.max_length,
        shape=ModelShape(
            num_layers=backbone.num_hidden_layers,
            hidden_size=backbone.hidden_size,
            intermediate_size=backbone.intermediate_size,
            num_labels=len(subject.labels),
        ),
    )


def _check_origin(job: EvaluateJob, origin: TraceOrigin, subject: _Subject) -> None:
    """A trace of another model or of other data would be silently wrong."""
    given = _origin(subject)
    checks: list[tuple[str, object, object]] = [
        ("another model", origin.model_digest, given.model_digest),
        ("another precision", origin.precision, given.precision),
        ("another label order", origin.labels, given.labels),
    ]
    if subject.data:
        checks += [
            ("other data or another length", origin.data_digest, given.data_digest),
            ("another task", origin.task, given.task),
        ]
    for what, theirs, ours in checks:
        if theirs != ours:
            raise UsageError(
                f"the trace {job.trace!r} is of {what} ({_short(theirs)}, not {_short(ours)}): "
                "remove it or give another --trace"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _train_statics(job: EvaluateJob, subject: _Subject) -> tuple[StaticBaseline, ...]:
    if not job.static_depths:
        return ()
    depth_of_all = subject.checkpoint.model.config.num_hidden_layers
    for depth in job.static_depths:  # before any is trained
        kept_layers(depth_of_all, depth, job.static_style)  # type: ignore[arg-type]  # one of the choices
    source = LabelledSource(
        data=job.train_data or job.data,
        glue_dir=None if job.train_data else job.glue_dir,
        task=job.task,
        columns=job.columns,
    )
    everything = source.training_texts(subject.labels).tokenized(subject.tokenizer)
    data = sample(everything, job.max_train_rows, seed=job.seed)
    recipe = TwoStageConfig(
        stage_1=StageConfig(epochs=job.epochs, batch_size=job.batch_size, learning_rate=job.learning_rate),
        seed=job.seed,
        bf16=resolve_precision("auto") == "bfloat16",
    )
    return tuple(
        train_static(
            str(job.backbone),
            depth,
            job.static_style,  # type: ignore[arg-type]  # one of the choices
            like=subject.checkpoint,
            data=data,
            recipe=recipe,
        )
        for depth in job.static_depths
    )


def _timed(
    job: EvaluateJob, subject: _Subject | None, file: TraceFile, statics: Sequence[StaticBaseline]
) -> TraceFile:
    """The file with seconds for everything that is evaluated, measured now where it lacks some and can be."""
    if job.timing_rows == 0 or subject is None or not subject.data:
        return file
    contenders = _contenders(job.thresholds, subject, statics)
    wanted = {c.name for c in contenders}
    timings = dict(file.timings)
    for name, data in subject.data.items():
        if wanted <= {t.name for t in timings.get(name, ())}:
            continue
        log.info("measuring %d contenders in turn, %d rounds", len(contenders), job.timing_rounds)
        samples = choose_samples(data.tokens, job.timing_rows)
        timings[name] = measure(contenders, samples, rounds=job.timing_rounds)
    if timings == file.timings:
        return file
    file = replace(file, timings=timings)
    if job.trace is not None:
        write_traces(Path(job.trace), file)
    return file


def _contenders(
    thresholds: Sequence[float], subject: _Subject, statics: Sequence[StaticBaseline]
) -> tuple[Contender, ...]:
    full = Contender(name=FULL_DEPTH_NAME, encoder=subject.encoder, policy=FULL_DEPTH)
    early = (
        Contender(name=f"{t:g}", encoder=subject.encoder, policy=EntropyThreshold(t)) for t in thresholds
    )
    shallow = (
        Contender(name=s.name, encoder=_encoder(s.model, subject.precision), policy=FULL_DEPTH)
        for s in statics
    )
    return (full, *early, *shallow)


@dataclass(frozen=True, kw_only=True, eq=False)
class _SetScorer:
    """One traced set and what it is scored by."""

    traced: TracedSet
    shape: ModelShape
    metrics: tuple[NamedMetric, ...]
    timings: Mapping[str, Timing]
    """By contender; empty where nothing was measured."""

    def off_ramps(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(layer, score by each metric)."""
        trace, labels = self.traced.trace, self.traced.labels
        by_metric = [off_ramp_scores(trace, labels, metric.compute) for metric in self.metrics]
        return tuple(zip(trace.layers, zip(*by_metric, strict=True), strict=True))

    def point(self, name: str, policy: EntropyThreshold) -> EvaluatedPoint:
        trace, labels = self.traced.trace, self.traced.labels
        found = score(trace, labels, policy)
        _, predictions = exits(trace, policy)
        return EvaluatedPoint(
            name=name,
            scores=self._scores(predictions),
            mean_exit_layer=found.mean_exit_layer,
            speed_up=found.speed_up,
            saving=found.saving,
            flop_saving=flop_saving(trace, policy, self.shape),
            exit_histogram=found.exit_histogram,
            measured=self._measured(name),
        )

    def static_point(self, static: StaticBaseline, predictions: Tensor) -> EvaluatedPoint:
        depth, num_layers = static.depth, self.shape.num_layers
        return EvaluatedPoint(
            name=static.name,
            scores=self._scores(predictions),
            mean_exit_layer=float(depth),
            speed_up=num_layers / depth,
            saving=1.0 - depth / num_layers,
            flop_saving=static_flop_saving(self.traced.trace, depth, self.shape),
            exit_histogram=(),
            measured=self._measured(static.name),
        )

    def _scores(self, predictions: Tensor) -> tuple[float, ...]:
        return tuple(metric.compute(self.traced.labels, predictions) for metric in self.metrics)

    def _measured(self, name: str) -> Measured | None:
        timing, full = self.timings.get(name), self.timings.get(FULL_DEPTH_NAME)
        if timing is None or full is None:
            return None
        return Measured(
            samples=timing.samples,
            rounds=timing.rounds,
            alone_seconds=timing.alone_seconds,
            alone_saving=1.0 - timing.alone_seconds / full.alone_seconds,
            engine_seconds=timing.engine_seconds,
            engine_saving=1.0 - timing.engine_seconds / full.engine_seconds,
            expected_saving=1.0 - timing.mean_exit_layer / self.shape.num_layers,
        )


def _evaluated(
    name: str,
    file: TraceFile,
    thresholds: Sequence[float],
    statics: Sequence[tuple[StaticBaseline, Tensor]],
) -> EvaluatedSet:
    """The scores of one set; `statics` are the baselines with their predictions on it."""
    task = file.origin.task
    scorer = _SetScorer(
        traced=file.sets[name],
        shape=file.origin.shape,
        metrics=metrics_of(find_task(task) if task else None, file.origin.labels),
        timings={timing.name: timing for timing in file.timings.get(name, ())},
    )
    return EvaluatedSet(
        name=name,
        samples=len(scorer.traced.labels),
        metrics=tuple(metric.name for metric in scorer.metrics),
        off_ramps=scorer.off_ramps(),
        full=scorer.point(FULL_DEPTH_NAME, FULL_DEPTH),
        thresholds=tuple(scorer.point(f"{t:g}", EntropyThreshold(t)) for t in thresholds),
        statics=tuple(scorer.static_point(static, answers) for static, answers in statics),
    )


def _static_answers(
    data: LabelledSequences, precision: Precision, statics: Sequence[StaticBaseline]
) -> tuple[tuple[StaticBaseline, Tensor], ...]:
    """Each baseline and its predictions (N,)."""
    return tuple(
        (static, trace(_encoder(static.model, precision), data.tokens).logits[-1].argmax(-1))
        for static in statics
    )
