"""The columns of a part and the metadata of its footer.

Turns arrays of answers into an Arrow table. Knows nothing of where it is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from deebert.problem import Problem
from deebert.version import __version__
from pipeline.records import Identity, ShardRecord

IDENTITY_KEY = b"deebert.identity"
RECORD_KEY = b"deebert.shard"
RESERVED_COLUMNS = (
    "row_id",
    "source_file",
    "source_row",
    "prediction",
    "label",
    "score",
    "exit_layer",
    "entropy",
    "certainty",
    "num_tokens",
    "num_windows",
    "truncated",
    "audit_prediction",
    "probabilities",
)

Predictions = npt.NDArray[Any]
"""N answers: label ids (N,) int32, chosen labels (N, C) bool, or numbers (N,) float32."""


def no_predictions(problem: Problem, rows: int, num_labels: int) -> Predictions:
    """Room for the answers of so many rows, in the problem's form."""
    empty = problem.predict(torch.zeros(0, num_labels)).numpy()
    # Parquet's labels are 32 bits wide.
    return np.zeros((rows, *empty.shape[1:]), np.int32 if empty.dtype == np.int64 else empty.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The engine's answers for N rows, in input order; every array has N rows."""

    source_rows: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int32]
    """As run: a token that two windows of a text share counts twice."""
    num_windows: npt.NDArray[np.int32]
    """1 but for texts that were longer than the model reads at once."""
    truncated: npt.NDArray[np.bool_]
    prediction: Predictions
    exit_layer: npt.NDArray[np.int16]
    """1-based; of a text in windows, that of the deepest (`deebert.windows`)."""
    entropy: npt.NDArray[np.float32]
    """NaN where the problem has none."""
    certainty: npt.NDArray[np.float32]
    """NaN where the exit policy does not read it."""
    probabilities: npt.NDArray[np.float32]
    """(N, C); the value itself of a regression."""
    audited: npt.NDArray[np.bool_]
    """Whether the row also ran at full depth."""
    audit_prediction: Predictions
    """The answer of full depth, where `audited`."""

    def agreeing(self) -> npt.NDArray[np.bool_]:
        """Which audited rows have full depth's answer: its label, all of its labels, or its number."""
        same: npt.NDArray[np.bool_] = self.audit_prediction == self.prediction
        return self.audited & same.all(axis=tuple(range(1, same.ndim)))

    def audit_distance(self) -> float:
        """Σ |number - full depth's| over the audited rows of a regression; 0 of labels."""
        if self.prediction.dtype != np.float32:
            return 0.0
        differences = self.prediction[self.audited].astype(np.float64) - self.audit_prediction[self.audited]
        return float(np.abs(differences).sum())

    @staticmethod
    def empty(problem: Problem, num_labels: int) -> Answers:
        """Zero rows."""
        return Answers(
            source_rows=np.zeros(0, np.int64),
            num_tokens=np.zeros(0, np.int32),
            num_windows=np.zeros(0, np.int32),
            truncated=np.zeros(0, np.bool_),
            prediction=no_predictions(problem, 0, num_labels),
            exit_layer=np.zeros(0, np.int16),
            entropy=np.zeros(0, np.float32),
            certainty=np.zeros(0, np.float32),
            probabilities=np.zeros((0, num_labels), np.float32),
            audited=np.zeros(0, np.bool_),
            audit_prediction=no_predictions(problem, 0, num_labels),
        )


def part_table(
    answers: Answers,
    *,
    source_file: str,
    kept: pa.Table,
    id_column: str | None,
    keep_columns: tuple[str, ...],
    labels: tuple[str, ...],
    with_probabilities: bool,
    with_windows: bool = False,
    with_certainty: bool = False,
) -> pa.Table:
    """The rows of a part.

    What a row says is, by its problem: a label (``prediction`` its id, ``label``, ``score``); the labels that hold, as
    lists of the same (perhaps empty); or a number (``prediction`` alone). ``entropy`` is null where there is none.

    Args:
        answers: N rows.
        source_file: path or URL of the input file.
        kept: N rows of the id and kept columns.
        id_column: the column of `kept` that becomes ``row_id``, or None.
        keep_columns: the columns of `kept` that are copied.
        labels: label names, in the order of their ids.
        with_probabilities: whether to add ``probabilities``.
        with_windows: whether to add ``num_windows``.
        with_certainty: whether to add ``certainty``, which a learned exit policy reads.
    """
    rows = len(answers.source_rows)
    source = _constant(source_file, rows)
    columns = {
        "row_id": _row_ids(source_file, answers.source_rows) if id_column is None else kept[id_column],
        "source_file": source,
        "source_row": pa.array(answers.source_rows),
        **{name: kept[name] for name in keep_columns},
        **_said(answers, labels),
        "exit_layer": pa.array(answers.exit_layer),
        "entropy": pa.array(answers.entropy, mask=np.isnan(answers.entropy)),
        **({"certainty": pa.array(answers.certainty)} if with_certainty else {}),
        "num_tokens": pa.array(answers.num_tokens),
        **({"num_windows": pa.array(answers.num_windows)} if with_windows else {}),
        "truncated": pa.array(answers.truncated),
        "audit_prediction": _audited(answers),
    }
    if with_probabilities:
        columns["probabilities"] = _lists(answers.probabilities)
    return pa.table(columns)


def footer(identity: Identity, record: ShardRecord, labels: tuple[str, ...]) -> dict[bytes, bytes]:
    """Key-value metadata of a part's footer: whose it is, what it holds, how it came to be."""
    return {
        IDENTITY_KEY: identity.digest.encode(),
        b"deebert.model": identity.model_digest.encode(),
        b"deebert.exit_policy": json.dumps(identity.exit_policy).encode(),
        b"deebert.labels": json.dumps(labels).encode(),
        b"deebert.rows": str(record.totals.rows).encode(),
        b"deebert.exit_histogram": json.dumps(record.totals.exit_rows).encode(),
        b"deebert.version": __version__.encode(),
        RECORD_KEY: json.dumps(record.to_dict()).encode(),
    }


def _said(answers: Answers, labels: tuple[str, ...]) -> dict[str, pa.Array]:
    """The columns that depend on what the model is asked."""
    prediction, names = answers.prediction, pa.array(labels, pa.string())
    if prediction.dtype == np.float32:
        return {"prediction": pa.array(prediction)}
    if prediction.dtype == np.int32:
        return {
            "prediction": pa.array(prediction),
            "label": pa.DictionaryArray.from_arrays(pa.array(prediction), names),
            "score": pa.array(answers.probabilities.max(axis=1, initial=0.0)),
        }
    ids = _sets(prediction)
    return {
        "prediction": ids,
        "label": pa.ListArray.from_arrays(ids.offsets, names.take(ids.values)),
        "score": pa.ListArray.from_arrays(ids.offsets, pa.array(answers.probabilities[prediction])),
    }


def _audited(answers: Answers) -> pa.Array:
    if answers.audit_prediction.dtype == np.bool_:
        return _sets(answers.audit_prediction, null=~answers.audited)
    return pa.array(answers.audit_prediction, mask=~answers.audited)


def _sets(holds: npt.NDArray[np.bool_], null: npt.NDArray[np.bool_] | None = None) -> pa.ListArray:
    """(N, C) -> the ids of the labels that hold, a list a row."""
    rows, ids = np.nonzero(holds if null is None else holds & ~null[:, None])
    counts = np.bincount(rows, minlength=len(holds))
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(ids.astype(np.int32)), mask=None if null is None else pa.array(null)
    )


def _constant(value: str, rows: int) -> pa.Array:
    """`value` in every row, which Parquet writes as a dictionary of one."""
    return pa.repeat(pa.scalar(value, pa.string()), rows)


def _row_ids(source_file: str, rows: npt.NDArray[np.int64]) -> pa.Array:
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(pa.scalar(source_file), pa.array(rows).cast(pa.string()), ":")


def _lists(values: npt.NDArray[np.float32]) -> pa.ListArray:
    rows, width = values.shape
    offsets = np.arange(0, rows * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))
