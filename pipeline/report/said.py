"""What rows say, recounted: the columns of a part that depend on what the model was asked.

One counter a problem type. Knows nothing of layers, tokens or the run record.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Said(Protocol):
    """Counts row groups; the numbers are about all rows added so far."""

    columns: tuple[str, ...]
    """That it reads, beside ``audit_prediction``."""
    label_rows: Ints
    """Rows per label, in the model's order; all zeros where there are no labels."""
    unknown_label_rows: int
    """Rows with a label that the model does not have."""
    mislabelled_rows: int
    """Rows whose ``label`` is not the name of their ``prediction``."""

    def add(self, frame: pd.DataFrame) -> tuple[Mask, npt.NDArray[np.float64] | None]:
        """Count one row group: which audited rows agree with full depth, and scores where a row has one."""
        ...


def said_by(problem_type: str, labels: Sequence[str]) -> Said:
    """The counter for a model's answers."""
    if problem_type == "regression":
        return Numbers(labels)
    return LabelSets(labels) if problem_type == "multi_label_classification" else SingleLabels(labels)


class _Counts:
    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        # A model may give two classes one name: both count under the first.
        self._index_of_name = {name: i for i, name in reversed(list(enumerate(labels)))}
        self._first_of_class = np.array([self._index_of_name[name] for name in labels], np.int64)
        self.label_rows: Ints = np.zeros(len(labels), np.int64)
        self.unknown_label_rows = 0
        self.mislabelled_rows = 0


class SingleLabels(_Counts):
    """One label a row."""

    columns: tuple[str, ...] = ("prediction", "label", "score")

    def add(self, frame: pd.DataFrame) -> tuple[Mask, npt.NDArray[np.float64] | None]:
        """See `Said`."""
        prediction = frame["prediction"].to_numpy(np.int64)
        labels = self._label_indices(frame)
        self.mislabelled_rows += int((labels != self._class_labels(prediction)).sum())
        counts = np.bincount(labels, minlength=len(self._labels) + 1)
        self.label_rows += counts[:-1]
        self.unknown_label_rows += int(counts[-1])
        audited = frame["audit_prediction"]
        agreeing = audited.notna().to_numpy(bool) & (audited.fillna(-1).to_numpy(np.int64) == prediction)
        return agreeing, frame["score"].to_numpy(np.float64)

    def _label_indices(self, frame: pd.DataFrame) -> Ints:
        codes, names = pd.factorize(frame["label"])
        unknown = len(self._labels)
        indices = np.array([self._index_of_name.get(name, unknown) for name in names] + [unknown], np.int64)
        return indices[codes]  # a null's code is -1: the appended entry

    def _class_labels(self, prediction: Ints) -> Ints:
        known = (prediction >= 0) & (prediction < self._first_of_class.size)
        return np.where(known, self._first_of_class[np.where(known, prediction, 0)], -1)


class LabelSets(_Counts):
    """Any number of labels a row."""

    columns: tuple[str, ...] = ("prediction", "label")

    def add(self, frame: pd.DataFrame) -> tuple[Mask, npt.NDArray[np.float64] | None]:
        """See `Said`."""
        codes, names = pd.factorize(np.array([*chain.from_iterable(frame["label"])], object))
        places = np.array([self._index_of_name.get(name, -1) for name in names], np.int64)
        predicted, _ = self._sets(frame["prediction"])
        named, is_unknown = self._sets(frame["label"], np.append(places, -1)[codes])
        audited = frame["audit_prediction"].notna().to_numpy(bool)
        full_depth, _ = self._sets(frame["audit_prediction"].where(audited, None))
        under_first = np.zeros_like(predicted)
        rows, classes = np.nonzero(predicted)
        under_first[rows, self._first_of_class[classes]] = True
        self.label_rows += under_first.sum(axis=0)
        self.unknown_label_rows += int(is_unknown.sum())
        self.mislabelled_rows += int(((under_first != named).any(axis=1) | is_unknown).sum())
        return audited & (predicted == full_depth).all(axis=1), None

    def _sets(self, column: pd.Series[Any], ids: npt.NDArray[Any] | None = None) -> tuple[Mask, Mask]:
        """A column of lists -> (N, C) which labels are in each, (N,) whether one is that the model has not.

        Args:
            column: N lists of label ids, or None for an empty one.
            ids: those of all lists, end to end, where the lists hold something else.
        """
        lists = [() if one is None else one for one in column]
        rows = np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), np.int64, len(lists)))
        flat = np.fromiter(chain.from_iterable(lists), np.int64, len(rows)) if ids is None else ids
        known = (flat >= 0) & (flat < len(self._labels))
        holds = np.zeros((len(lists), len(self._labels)), np.bool_)
        holds[rows[known], flat[known]] = True
        is_unknown = np.zeros(len(lists), np.bool_)
        is_unknown[rows[~known]] = True
        return holds, is_unknown


class Numbers(_Counts):
    """A number a row."""

    columns: tuple[str, ...] = ("prediction",)

    def add(self, frame: pd.DataFrame) -> tuple[Mask, npt.NDArray[np.float64] | None]:
        """See `Said`."""
        audit, prediction = (frame[name].to_numpy(np.float64) for name in ("audit_prediction", "prediction"))
        return audit == prediction, None  # a null is NaN, which equals nothing
