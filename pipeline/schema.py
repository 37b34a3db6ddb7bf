"""The columns of a part and the metadata of its footer.

Turns arrays of answers into an Arrow table. Knows nothing of where it is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
    "num_tokens",
    "num_windows",
    "truncated",
    "audit_prediction",
    "probabilities",
)
NOT_AUDITED = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The engine's answers for N rows, in input order; every array has N rows."""

    source_rows: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int32]
    """As run: a token that two windows of a text share counts twice."""
    num_windows: npt.NDArray[np.int32]
    """1 but for texts that were longer than the model reads at once."""
    truncated: npt.NDArray[np.bool_]
    prediction: npt.NDArray[np.int32]
    exit_layer: npt.NDArray[np.int16]
    """1-based; of a text in windows, that of the deepest (`deebert.windows`)."""
    entropy: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    """(N, C)."""
    audit_prediction: npt.NDArray[np.int32]
    """`NOT_AUDITED` where the row did not run at full depth."""

    @staticmethod
    def concat(parts: list[Answers], num_labels: int) -> Answers:
        """All rows, in order; no parts give zero rows."""
        empty = Answers.empty(num_labels)
        parts = [empty, *parts]
        return Answers(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(empty)})

    @staticmethod
    def empty(num_labels: int) -> Answers:
        """Zero rows."""
        return Answers(
            source_rows=np.zeros(0, np.int64),
            num_tokens=np.zeros(0, np.int32),
            num_windows=np.zeros(0, np.int32),
            truncated=np.zeros(0, np.bool_),
            prediction=np.zeros(0, np.int32),
            exit_layer=np.zeros(0, np.int16),
            entropy=np.zeros(0, np.float32),
            probabilities=np.zeros((0, num_labels), np.float32),
            audit_prediction=np.zeros(0, np.int32),
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
) -> pa.Table:
    """The rows of a part.

    Args:
        answers: N rows.
        source_file: path or URL of the input file.
        kept: N rows of the id and kept columns.
        id_column: the column of `kept` that becomes ``row_id``, or None.
        keep_columns: the columns of `kept` that are copied.
        labels: label names, in the order of their ids.
        with_probabilities: whether to add ``probabilities``.
        with_windows: whether to add ``num_windows``.
    """
    rows = len(answers.source_rows)
    source = _constant(source_file, rows)
    audited = answers.audit_prediction != NOT_AUDITED
    columns = {
        "row_id": _row_ids(source_file, answers.source_rows) if id_column is None else kept[id_column],
        "source_file": source,
        "source_row": pa.array(answers.source_rows),
        **{name: kept[name] for name in keep_columns},
        "prediction": pa.array(answers.prediction),
        "label": pa.DictionaryArray.from_arrays(pa.array(answers.prediction), pa.array(labels, pa.string())),
        "score": pa.array(answers.probabilities.max(axis=1, initial=0.0)),
        "exit_layer": pa.array(answers.exit_layer),
        "entropy": pa.array(answers.entropy),
        "num_tokens": pa.array(answers.num_tokens),
        **({"num_windows": pa.array(answers.num_windows)} if with_windows else {}),
        "truncated": pa.array(answers.truncated),
        "audit_prediction": pa.array(answers.audit_prediction, mask=~audited),
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


def _constant(value: str, rows: int) -> pa.Array:
    """`value` in every row; dictionary-encoded in memory and on disk, a plain string to readers."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value])).cast(
        pa.string()
    )


def _row_ids(source_file: str, rows: npt.NDArray[np.int64]) -> pa.Array:
    import pyarrow.compute as pc

    return pc.binary_join_element_wise(pa.scalar(source_file), pa.array(rows).cast(pa.string()), ":")


def _lists(values: npt.NDArray[np.float32]) -> pa.ListArray:
    rows, width = values.shape
    offsets = np.arange(0, rows * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))
