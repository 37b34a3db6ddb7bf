"""Metrics as GLUE has them, from scikit-learn, on label ids.

Accuracy for most tasks; for MRPC and QQP F1 of the positive class, with accuracy beside it. Knows nothing of
models, traces or off-ramps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from deebert.evaluation import Metric
from jobs.glue import GlueTask
from jobs.labelled import label_places


@dataclass(frozen=True, kw_only=True)
class NamedMetric:
    """A metric and how tables call it."""

    name: str
    compute: Metric


def _accuracy(labels: Tensor, predictions: Tensor) -> float:
    return float(accuracy_score(labels.numpy(), predictions.numpy()))


ACCURACY = NamedMetric(name="accuracy", compute=_accuracy)


def f1_of(positive: int) -> NamedMetric:
    """F1 of the class with id `positive`; 0 where it is neither present nor predicted."""

    def compute(labels: Tensor, predictions: Tensor) -> float:
        theirs, ours = (labels == positive).numpy(), (predictions == positive).numpy()
        return float(f1_score(theirs, ours, zero_division=0.0))

    return NamedMetric(name="F1", compute=compute)


def metrics_of(task: GlueTask | None, names: Sequence[str]) -> tuple[NamedMetric, ...]:
    """The metrics of a task, the one that is its score first.

    Args:
        task: None for data that belongs to none.
        names: label names in the order of the model's ids.
    """
    if task is None or task.positive is None:
        return (ACCURACY,)
    (positive,) = label_places((task.positive,), names)
    assert positive is not None  # the data's labels were matched with these names
    return (f1_of(positive), ACCURACY)
