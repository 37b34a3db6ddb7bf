"""Metrics as GLUE has them, from scikit-learn and SciPy, on labels and predictions in their problem's form.

Accuracy for most tasks; for MRPC and QQP F1 of the positive class, with accuracy beside it; for regressions the
correlations of Pearson and Spearman. Multi-label data, which GLUE has not, are scored by F1 over all decisions
(micro), over labels (macro), and by the share of rows whose labels are all right. Knows nothing of models, traces or
off-ramps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from deebert.evaluation import Metric
from deebert.problem import MULTI_LABEL, SINGLE_LABEL, Problem
from jobs.glue import GlueTask
from jobs.label_ids import label_places


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


def _correlation(name: str, correlate: Callable[..., Any]) -> NamedMetric:
    def compute(labels: Tensor, predictions: Tensor) -> float:
        if len(labels.unique()) == 1 or len(predictions.unique()) == 1:
            return 0.0  # undefined: what never changes goes with nothing
        return float(correlate(labels.numpy(), predictions.numpy()).statistic)

    return NamedMetric(name=name, compute=compute)


PEARSON = _correlation("Pearson", pearsonr)
SPEARMAN = _correlation("Spearman", spearmanr)


def _f1_over(average: str) -> NamedMetric:
    def compute(labels: Tensor, predictions: Tensor) -> float:
        theirs, ours = labels.bool().numpy(), predictions.bool().numpy()
        # To scikit-learn a single column is two classes, over which the micro average is accuracy.
        over = average if theirs.shape[1] > 1 else "binary"
        return float(f1_score(theirs, ours, average=over, zero_division=0.0))

    return NamedMetric(name=f"{average} F1", compute=compute)


def _all_right(labels: Tensor, predictions: Tensor) -> float:
    return float(accuracy_score(labels.bool().numpy(), predictions.bool().numpy()))


_OF_SETS = (_f1_over("micro"), _f1_over("macro"), NamedMetric(name="exact match", compute=_all_right))
_OF_NUMBERS = (PEARSON, SPEARMAN)


def metrics_of(
    task: GlueTask | None, names: Sequence[str], problem: Problem = SINGLE_LABEL
) -> tuple[NamedMetric, ...]:
    """The metrics of a task, the one that is its score first.

    Args:
        task: None for data that belongs to none.
        names: label names in the order of the model's ids.
        problem: what the model is asked.
    """
    if problem is not SINGLE_LABEL:
        return _OF_SETS if problem is MULTI_LABEL else _OF_NUMBERS
    if task is None or task.positive is None:
        return (ACCURACY,)
    (positive,) = label_places((task.positive,), names)
    assert positive is not None  # the data's labels were matched with these names
    return (f1_of(positive), ACCURACY)
