"""An evaluation, step by step: trace, static baselines, seconds, scores.

Each step takes what the one before found; what the trace file holds already is not done again. Knows nothing
of flags' spelling, pages or pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deebert.baselines import StaticStyle, kept_layers
from deebert.calibration import fewest_texts, share_interval
from deebert.checkpoint import store_int8_agreement
from deebert.encoder import PackedEncoder
from deebert.evaluation import LabelledSequences, Trace, predictions, trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, StoredPolicy
from deebert.precision import LEAST_INT8_AGREEMENT, resolve_precision
from deebert.problem import REGRESSION, Problem, problem_of
from jobs.labelled import LabelledSource, sample
from jobs.scoring import evaluated
from jobs.subject import Subject, load_subject, origin_of, packed_encoder
from jobs.terminal import showing
from jobs.timing import Contender, Measure, Timing, choose_samples, measure
from jobs.traces import (
    StaticRecord,
    TracedSet,
    TraceFile,
    TraceOrigin,
    data_digest,
    read_traces,
    traced_policies,
    write_traces,
)
from pipeline.errors import UsageError
from pipeline.report.evaluated import FULL_DEPTH_NAME, EvaluatedSet
from pipeline.tokenization import TextTokenizer

if TYPE_CHECKING:
    from deebert.training import Recipe
    from jobs.evaluate import EvaluateJob
    from jobs.static import StaticBaseline
    from jobs.subject_flags import SubjectFlags

log = logging.getLogger(__name__)

CONFIDENCE = 0.95
"""Of what is said of the labels that a precision keeps."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found."""

    model: str
    task: str | None
    origin: str
    """One line on precision and length."""
    sets: tuple[EvaluatedSet, ...]


def run(job: EvaluateJob) -> Evaluation:
    """The whole evaluation; writes the trace, and what it is asked to store with the model."""
    subject = None if job.model is None else load_subject(job, job.model)
    if subject is not None:  # before anything is traced
        _check_thresholds(job, subject.encoder.problem, subject.labels)
        if job.store_agreement:
            _check_store(subject)
    file = traced_file(job, subject)
    _check_thresholds(job, problem_of(file.origin.problem_type), file.origin.labels)
    statics = file.statics
    if subject is not None and subject.data:
        fresh: tuple[StaticBaseline, ...] = ()
        if job.static_depths:
            statics, fresh = _static_baselines(job, subject, file)
            file = _with_answers(job, subject, file, fresh)
        file = _timed(job, subject, file, fresh)
        has_labels = subject.encoder.problem is not REGRESSION
        if has_labels and file.agreeing is None and subject.precision != "float32":
            file = _kept(job, replace(file, agreeing=_agreeing(subject, file)))
        if job.store_agreement and file.agreeing is not None:
            _store(Path(subject.checkpoint.path), file.agreeing / _texts(subject))
    return Evaluation(
        model=file.origin.model,
        task=file.origin.task,
        origin=_origin(file),
        sets=tuple(evaluated(name, file, policies_of(job, file), statics) for name in file.sets),
    )


def _origin(file: TraceFile) -> str:
    if file.agreeing is None:
        return file.origin.read_as
    texts = sum(len(traced.labels) for traced in file.sets.values())
    low, high = share_interval(file.agreeing, texts, CONFIDENCE)
    return (
        f"{file.origin.read_as}; {100 * file.agreeing / texts:.2f} % of the labels at full depth are float32's, of "
        f"{texts} texts ({100 * low:.2f} to {100 * high:.2f} % with {100 * CONFIDENCE:g} % confidence)"
    )


def _check_store(subject: Subject) -> None:
    """A handful of labels that all stay would be 100 %, by which `auto` goes as by any share."""
    model = subject.checkpoint.path
    if subject.encoder.problem is REGRESSION:
        raise UsageError(
            f"the model {model!r} is a regression, which has no labels to keep: leave --store-agreement out"
        )
    least = fewest_texts(1 - LEAST_INT8_AGREEMENT, CONFIDENCE)
    if _texts(subject) < least:
        raise UsageError(
            f"{_texts(subject)} texts cannot show that int8 keeps {100 * LEAST_INT8_AGREEMENT:g} % of the labels: give "
            f"at least {least}, or leave --store-agreement out"
        )


def _texts(subject: Subject) -> int:
    return sum(len(data.labels) for data in subject.data.values())


def _check_thresholds(job: EvaluateJob, problem: Problem, labels: Sequence[str]) -> None:
    """What `classify` would refuse is no operating point to show. Where answers have no entropy, none is tried."""
    for threshold in () if problem.outcomes(len(labels)) is None else job.thresholds:
        EntropyThreshold(threshold).check(
            problem=problem, num_labels=len(labels), num_layers=1, learns_to_exit=False
        )


def traced_file(job: SubjectFlags, subject: Subject | None) -> TraceFile:
    """The trace file's content, read where it is there, else made and written where a name was given.

    Raises:
        UsageError: it is of another model or of other data.
        DataError: the file is not a trace.
    """
    if job.trace is not None and Path(job.trace).exists():
        file = read_traces(Path(job.trace))
        if subject is not None:
            _check_origin(job, file.origin, subject)
        return file
    assert subject is not None  # as `evaluate` checked
    sets = {
        name: TracedSet(trace=_traced("tracing", subject.encoder, data), labels=data.labels)
        for name, data in subject.data.items()
    }
    return _kept(job, TraceFile(origin=origin_of(subject), sets=sets))


def _traced(what: str, encoder: PackedEncoder, data: LabelledSequences) -> Trace:
    # Tokens, not texts: texts run sorted by length, so that the first are the fastest.
    with showing(what, data.tokens.layout.total_tokens, "tokens") as seen:
        return trace(encoder, data.tokens, windows=data.windows, on_tokens=seen)


def _agreeing(subject: Subject, file: TraceFile) -> int:
    """Of all texts, those that the traced precision labels at full depth as float32 does."""
    encoder = packed_encoder(subject.checkpoint.fused, "float32")
    same = [
        predictions(_traced("tracing in float32", encoder, data), FULL_DEPTH)
        == predictions(file.sets[name].trace, FULL_DEPTH)
        for name, data in subject.data.items()
    ]
    # Of many labels, all must agree.
    return sum(int(one.reshape(len(one), -1).all(dim=1).sum()) for one in same)


def _store(model: Path, agreement: float) -> None:
    store_int8_agreement(model, agreement)
    chosen = "is" if agreement >= LEAST_INT8_AGREEMENT else "is not"
    log.info("%s: --precision auto %s int8 on CPUs with VNNI", model, chosen)


def _kept(job: SubjectFlags, file: TraceFile) -> TraceFile:
    """The same, written where a name was given."""
    if job.trace is not None:
        write_traces(Path(job.trace), file)
    return file


def _check_origin(job: SubjectFlags, origin: TraceOrigin, subject: Subject) -> None:
    """A trace of another model or of other data would be silently wrong."""
    given = origin_of(subject)
    checks: list[tuple[str, object, object]] = [
        ("another model", origin.model_digest, given.model_digest),
        ("another precision", origin.precision, given.precision),
        ("another label order", origin.labels, given.labels),
        ("another problem type", origin.problem_type, given.problem_type),
    ]
    if subject.data or job.max_length is not None:  # left out, it is the model's and not the trace's
        checks.append(("another length", origin.max_length, given.max_length))
    if subject.data:
        checks += [
            ("another window stride", origin.window_stride, given.window_stride),
            ("other data", origin.data_digest, given.data_digest),
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


def _static_baselines(
    job: EvaluateJob, subject: Subject, file: TraceFile
) -> tuple[tuple[StaticRecord, ...], tuple[StaticBaseline, ...]]:
    """The baselines asked for, and those of them that the file lacks, trained now."""
    # Imported here: what trains takes seconds, and most evaluations train nothing.
    from jobs.static import train_static

    depth_of_all = subject.checkpoint.config.num_hidden_layers
    style: StaticStyle = job.static_style  # type: ignore[assignment]  # one of the flag's choices
    for depth in job.static_depths:  # before any is trained
        kept_layers(depth_of_all, depth, style)
    data = _training_data(job, subject)
    recipe = {
        "backbone": job.backbone,
        "data_digest": data_digest({"train": data}),
        "epochs": job.epochs,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
    }
    wanted = tuple(StaticRecord(depth=k, style=style, recipe=recipe) for k in job.static_depths)
    lacking = [record for record in wanted if record not in file.statics]
    fresh = (
        train_static(record, like=subject.checkpoint, data=data, recipe=_recipe(job)) for record in lacking
    )
    return wanted, tuple(fresh)


def _training_data(job: EvaluateJob, subject: Subject) -> LabelledSequences:
    source = LabelledSource(
        data=job.train_data or job.data,
        glue_dir=None if job.train_data else job.glue_dir,
        task=job.task,
        columns=job.columns,
        problem=subject.checkpoint.config.problem,
        label_separator=job.label_separator,
    )
    if job.train_data is None and source.is_one_set:
        raise UsageError(
            "--static-depths would train on the very rows that it is scored on: give --train-data"
        )
    # Cut, as `train` does it: a text's label need not be that of each of its windows.
    tokenizer = TextTokenizer(subject.checkpoint.tokenizer, max_length=subject.tokenizer.max_length)
    drawn = sample(source.training_texts(subject.labels), job.max_train_rows, seed=job.seed)
    return drawn.tokenized(tokenizer)


def _recipe(job: EvaluateJob) -> Recipe:
    from deebert.training import BackboneStage, Recipe

    return Recipe(
        stage_1=BackboneStage(epochs=job.epochs, batch_size=job.batch_size, learning_rate=job.learning_rate),
        seed=job.seed,
        precision=resolve_precision("auto"),
    )


def _with_answers(
    job: EvaluateJob, subject: Subject, file: TraceFile, fresh: Sequence[StaticBaseline]
) -> TraceFile:
    """The file with what new baselines say of every set; each replaces an older one of its name."""
    if not fresh:
        return file
    sets = dict(file.sets)
    for name, data in subject.data.items():
        answers = dict(sets[name].static_predictions)
        for static in fresh:
            encoder = packed_encoder(static.fused, subject.precision)
            answered = _traced(f"tracing {static.record.name}", encoder, data)
            answers[static.record.name] = predictions(answered, FULL_DEPTH)
        sets[name] = replace(sets[name], static_predictions=answers)
    records = {record.name: record for record in (*file.statics, *(static.record for static in fresh))}
    return _kept(job, replace(file, sets=sets, statics=tuple(records.values())))


def _timed(
    job: EvaluateJob, subject: Subject, file: TraceFile, statics: Sequence[StaticBaseline]
) -> TraceFile:
    """The file with the seconds that it lacks, measured now."""
    contenders = _contenders(policies_of(job, file), subject, statics)
    wanted = {contender.name for contender in contenders}
    timings = dict(file.timings)
    for name, data in subject.data.items():
        alone, engine = (choose_samples(data.tokens, n) for n in (job.timing_rows, job.engine_rows))
        asked = (job.timing_rounds, len(alone), len(engine))
        alike = {
            t.name for t in timings.get(name, ()) if (t.rounds, t.alone.samples, t.engine.samples) == asked
        }
        if job.timing_rows == 0 or wanted <= alike:
            continue
        log.info("measuring %d contenders in turn, %d rounds", len(contenders), job.timing_rounds)
        kept = _of_earlier_rounds(timings.get(name, ()), {record.name for record in file.statics} - wanted)
        timings[name] = (*measure(contenders, alone, engine, rounds=job.timing_rounds), *kept)
    return file if timings == file.timings else _kept(job, replace(file, timings=timings))


def _of_earlier_rounds(timings: Sequence[Timing], names: Set[str]) -> tuple[Timing, ...]:
    """Those of static baselines whose models are gone, each beside full depth's seconds of its own rounds."""
    full = next((timing for timing in timings if timing.name == FULL_DEPTH_NAME), None)

    def beside(mine: Measure, whole: Measure) -> Measure:
        return mine if mine.full_depth_seconds else replace(mine, full_depth_seconds=whole.seconds)

    return tuple(
        replace(timing, alone=beside(timing.alone, full.alone), engine=beside(timing.engine, full.engine))
        for timing in timings
        if full is not None and timing.name in names
    )


def policies_of(job: EvaluateJob, file: TraceFile) -> dict[str, StoredPolicy]:
    """The policies to try, by the name that tables give them: those that the traced model knows."""
    return traced_policies(file, thresholds=job.thresholds, certainty_thresholds=job.certainty_thresholds)


def _contenders(
    policies: Mapping[str, StoredPolicy], subject: Subject, statics: Sequence[StaticBaseline]
) -> tuple[Contender, ...]:
    full = Contender(name=FULL_DEPTH_NAME, encoder=subject.encoder, policy=FULL_DEPTH)
    early = (
        Contender(name=name, encoder=subject.encoder, policy=policy) for name, policy in policies.items()
    )
    shallow = (
        Contender(
            name=static.record.name,
            encoder=packed_encoder(static.fused, subject.precision),
            policy=FULL_DEPTH,
        )
        for static in statics
    )
    return (full, *early, *shallow)
