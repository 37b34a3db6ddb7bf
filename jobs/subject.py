"""The model under evaluation and its labelled data, ready to run.

Knows nothing of what is done with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deebert.checkpoint import Checkpoint, load_checkpoint
from deebert.cost import ModelShape
from deebert.encoder import PackedEncoder
from deebert.evaluation import LabelledSequences
from deebert.fused import FusedModel
from deebert.precision import DTYPES, Precision, resolve_precision
from deebert.problem import Problem
from jobs.label_ids import label_places
from jobs.labelled import LabelledSource
from jobs.traces import TraceOrigin, data_digest
from pipeline.errors import UsageError
from pipeline.planning import resolve_max_length
from pipeline.tokenization import TextTokenizer

if TYPE_CHECKING:
    from jobs.subject_flags import SubjectFlags


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The model under evaluation, ready to run, and its labelled data where they were given."""

    checkpoint: Checkpoint
    encoder: PackedEncoder
    labels: tuple[str, ...]
    precision: Precision
    tokenizer: TextTokenizer
    task: str | None
    data: Mapping[str, LabelledSequences]
    """By set; empty where none were given."""


def load_subject(flags: SubjectFlags, model: str) -> Subject:
    """Load the model and, where there are any, tokenize its labelled data.

    Raises:
        CheckpointError: the model cannot be loaded.
        UsageError, DataError: labels or data that do not fit it.
    """
    checkpoint = load_checkpoint(model)
    labels = flags.labels or checkpoint.labels
    _check_labels(labels, checkpoint)
    tokenizer = TextTokenizer(
        checkpoint.tokenizer,
        max_length=resolve_max_length(flags.max_length, None, checkpoint),
        window_stride=flags.window_stride,
    )
    precision = resolve_precision(flags.precision, int8_agreement=checkpoint.config.int8_agreement)
    source = _labelled_source(flags, checkpoint.config.problem)
    texts = {} if source is None else source.evaluation_texts(labels)
    task = None if source is None else source.glue_task
    return Subject(
        checkpoint=checkpoint,
        encoder=packed_encoder(checkpoint.fused, precision),
        labels=labels,
        precision=precision,
        tokenizer=tokenizer,
        task=task.name if task else None,
        data={name: one.tokenized(tokenizer) for name, one in texts.items()},
    )


def _check_labels(labels: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """The model's labels may be called by other names, but none of them by that of another one."""
    own = checkpoint.labels
    if len(labels) != len(own):
        raise UsageError(f"--labels names {len(labels)} labels but the model has {len(own)}")
    for i, place in enumerate(label_places(labels, own)):
        if place not in (None, i):
            raise UsageError(
                f"--labels gives {labels[i]!r} the id {i}, and the model {checkpoint.path!r} knows it by {place}: "
                f"leave --labels out, or name the labels in the model's order, {','.join(own)}"
            )


def packed_encoder(model: FusedModel, precision: Precision) -> PackedEncoder:
    """The inference form, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PackedEncoder(model, device=device, dtype=DTYPES[precision])


def _labelled_source(flags: SubjectFlags, problem: Problem) -> LabelledSource | None:
    if flags.data is None and flags.glue_dir is None:
        return None
    return LabelledSource(
        data=flags.data,
        glue_dir=flags.glue_dir,
        task=flags.task,
        columns=flags.columns,
        split=flags.split,
        problem=problem,
        label_separator=flags.label_separator,
    )


def origin_of(subject: Subject) -> TraceOrigin:
    """What a trace of this subject is of."""
    config = subject.checkpoint.config
    return TraceOrigin(
        model=subject.checkpoint.path,
        model_digest=subject.checkpoint.digest,
        data_digest=data_digest(subject.data),
        task=subject.task,
        labels=subject.labels,
        problem_type=config.problem.name,
        precision=subject.precision,
        max_length=subject.tokenizer.max_length,
        window_stride=subject.tokenizer.window_stride,
        shape=ModelShape.of(config),
    )
