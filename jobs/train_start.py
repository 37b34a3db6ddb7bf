"""What a training starts from: a backbone, a fine-tuned classifier or a DeeBERT model, loaded as the flags say.

Knows nothing of recipes or of where rows come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from deebert.checkpoint import Checkpoint
    from deebert.modeling import DeeBertForSequenceClassification
    from jobs.labelled import LabelledTexts
    from jobs.train import TrainJob

DEFAULT_LENGTH = 128
"""Tokens that a text is cut to where neither the flags nor a model say."""


def trained_start(job: TrainJob) -> Checkpoint:
    """The model or classifier to go on with.

    Raises:
        UsageError: it cannot be loaded.
    """
    from deebert.checkpoint import Checkpoint, load_checkpoint
    from deebert.modeling import DeeBertForSequenceClassification

    if job.from_model is not None:
        checkpoint = load_checkpoint(job.from_model, allow_pickle=job.allow_pickle)
        if job.learn_to_exit:
            checkpoint.model.learn_to_exit()
        # The model is what is trained from here on, and may have a head more than the folder.
        return Checkpoint.of(checkpoint.path, checkpoint.model, checkpoint.tokenizer)
    assert job.from_classifier is not None
    with _refusing_unreadable("classifier", job.from_classifier):
        model = DeeBertForSequenceClassification.from_classifier(
            job.from_classifier,
            allow_pickle=job.allow_pickle,
            learns_to_exit=job.learn_to_exit,
            **_off_ramp_config(job),
        )
        return _with_tokenizer(job.from_classifier, model)


def fresh_start(job: TrainJob, texts: LabelledTexts) -> Checkpoint:
    """A new model on the backbone, for what the texts are labelled with.

    Raises:
        UsageError: the backbone cannot be loaded.
        DataError: there is one label only.
    """
    from deebert.errors import DataError
    from deebert.modeling import DeeBertForSequenceClassification
    from deebert.problem import SINGLE_LABEL

    assert job.backbone is not None
    if texts.problem is SINGLE_LABEL and len(texts.names) < 2:
        raise DataError(
            f"the data has the label {texts.names[0]!r} in every row, which leaves nothing to tell apart: check "
            "--label-column, or name all labels with --labels"
        )
    with _refusing_unreadable("backbone", job.backbone):
        model = DeeBertForSequenceClassification.from_backbone(
            job.backbone,
            labels=list(texts.names),
            off_ramp_pooling=job.new_off_ramps_read,  # type: ignore[arg-type]  # one of the flag's choices
            allow_pickle=job.allow_pickle,
            problem_type=texts.problem.name,
            learns_to_exit=job.learn_to_exit,
            **_off_ramp_config(job),
        )
        return _with_tokenizer(job.backbone, model)


def name_labels(start: Checkpoint, texts: LabelledTexts) -> None:
    """Give the names that the texts' labels were told to have to a model whose own are placeholders, in their order."""
    if _has_placeholders(start) and len(start.labels) == len(texts.names):
        config = start.config
        config.id2label = dict(enumerate(texts.names))
        config.label2id = {name: i for i, name in enumerate(texts.names)}


def resolved_length(job: TrainJob, start: Checkpoint) -> int:
    """The tokens a text is cut to.

    Raises:
        UsageError: more were asked for than the model has positions for.
    """
    from pipeline.planning import resolve_max_length

    if job.max_length is None and job.from_model is None:
        return min(DEFAULT_LENGTH, start.longest_input)
    return resolve_max_length(job.max_length, None, start)


def check_fit(start: Checkpoint, texts: LabelledTexts) -> None:
    """Refuse labels that the model does not have, and answers that could never leave early.

    Raises:
        UsageError: one of the two.
    """
    if start.config.problem.outcomes(len(start.labels)) is None:
        if start.model.exit_head is None:
            raise UsageError(
                "a regression has no entropy to exit by: give --learn-to-exit, which trains a head that tells when"
            )
        return
    if start.labels != texts.names and _has_placeholders(start):
        count = len(start.labels)
        raise UsageError(
            f"the model {start.path!r} has {count} labels without names and the data has {', '.join(texts.names)}: "
            f"name the model's {count} labels with --labels, in the order of its ids"
        )
    if start.labels != texts.names:
        raise UsageError(
            f"the model {start.path!r} knows {', '.join(start.labels)} and the data has {', '.join(texts.names)}: "
            f"give --labels {','.join(start.labels)}"
        )


def _has_placeholders(start: Checkpoint) -> bool:
    """Whether its labels are what Hugging Face calls them where nobody has named them."""
    return start.labels == tuple(f"LABEL_{i}" for i in range(len(start.labels)))


def _off_ramp_config(job: TrainJob) -> dict[str, Any]:
    """What the flags say of the off-ramps, their pooling aside, as arguments of `DeeBertConfig`."""
    layers = {} if job.off_ramp_layers is None else {"off_ramp_layers": job.off_ramp_layers}
    return {**layers, **({"shares_off_ramp_pooler": True} if job.shared_pooler else {})}


def _with_tokenizer(name: str, model: DeeBertForSequenceClassification) -> Checkpoint:
    from deebert.checkpoint import Checkpoint, pretrained_tokenizer

    tokenizer = pretrained_tokenizer(name, model.config.backbone_config)
    return Checkpoint.of(name, model, tokenizer)


@contextmanager
def _refusing_unreadable(what: str, name: str) -> Iterator[None]:
    from deebert.weights import UNREADABLE, reason

    try:
        yield
    except UNREADABLE as error:
        raise UsageError(f"cannot load the {what} {name!r}: {reason(error)}") from error
