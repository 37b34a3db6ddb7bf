"""Traces as Parquet: every off-ramp's logits, the lengths and the labels of labelled sets.

One row per sample: `set` (MNLI has two), `label` (id), `num_tokens`, `logits_i` for each off-ramp layer i,
and the prediction of each static baseline. Where texts are classified in windows, a sample is a window, `text`
numbers the text that it is of, and what is known of the text stands at each of its windows. The footer says
of what model and data they are, and holds the seconds measured on them, so that a later evaluation runs no
model at all. Knows nothing of texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from deebert.baselines import StaticStyle
from deebert.cost import ModelShape
from deebert.errors import DataError
from deebert.evaluation import LabelledSequences, Trace
from deebert.windows import first_windows
from jobs.timing import Measure, Timing
from pipeline.errors import UsageError

_KEY = b"deebert.trace"
_LOGITS = "logits_"
_TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class TraceOrigin:
    """Of what a trace is."""

    model: str
    """Folder or hub id."""
    model_digest: str
    data_digest: str
    """Over tokens and labels of all sets."""
    task: str | None
    """GLUE task, which decides the metric."""
    labels: tuple[str, ...]
    """Names in the order of the ids."""
    precision: str
    max_length: int
    shape: ModelShape
    window_stride: int | None = None
    """None: longer texts were cut."""


@dataclass(frozen=True, kw_only=True)
class StaticRecord:
    """Which static baseline, and how it was trained."""

    depth: int
    style: StaticStyle
    recipe: Mapping[str, Any]
    """JSON values that say of what and how; another recipe is another baseline."""

    @property
    def name(self) -> str:
        """As tables call it, and as its column is called."""
        return f"static {self.depth} ({self.style})"


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedSet:
    """A labelled set and what every off-ramp said of it."""

    trace: Trace
    labels: Tensor
    """(N,) int64, one for each text."""
    static_predictions: Mapping[str, Tensor] = field(default_factory=dict)
    """By the baseline's name, (N,) int64."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceFile:
    """What one file holds."""

    origin: TraceOrigin
    sets: Mapping[str, TracedSet]
    """By name; a task's only set is called ""."""
    timings: Mapping[str, tuple[Timing, ...]] = field(default_factory=dict)
    """By set; empty where nothing was measured."""
    statics: tuple[StaticRecord, ...] = ()
    """Baselines whose predictions are here."""


def data_digest(sets: Mapping[str, LabelledSequences]) -> str:
    """SHA-256 of names, token ids, lengths and labels."""
    digest = hashlib.sha256()
    for name, data in sets.items():
        digest.update(f"{name} {len(data)}".encode())
        for array in (data.tokens.input_ids, data.tokens.cu_seqlens, data.labels):
            digest.update(array.numpy().tobytes())
        if data.windows is not None:
            digest.update(data.windows.tobytes())
    return digest.hexdigest()


def write_traces(path: Path, file: TraceFile) -> None:
    """Write beside and rename, so that a file that is there is whole.

    Raises:
        UsageError: the path cannot be written.
    """
    table = pa.concat_tables(_table(name, traced) for name, traced in file.sets.items())
    document = {
        "origin": dataclasses.asdict(file.origin),
        "timings": {name: [dataclasses.asdict(t) for t in timings] for name, timings in file.timings.items()},
        "statics": [dataclasses.asdict(record) for record in file.statics],
    }
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(document)}), unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write the trace {str(path)!r}: {error.strerror or error}") from error


def read_traces(path: Path) -> TraceFile:
    """The inverse of `write_traces`, bit for bit.

    Raises:
        DataError: the file is not a trace.
    """
    try:
        table = pq.read_table(path)
        document = json.loads((table.schema.metadata or {})[_KEY])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(
            f"{str(path)!r} is not a trace of `deebert evaluate`: remove it or name another"
        ) from error
    names = np.asarray(table["set"].cast(pa.string()).to_pylist(), dtype=object)
    statics = tuple(StaticRecord(**record) for record in document["statics"])
    return TraceFile(
        origin=_origin(document["origin"]),
        sets={
            name: _traced_set(table.filter(pa.array(names == name)), statics)
            for name in dict.fromkeys(names.tolist())
        },
        timings={name: tuple(map(_timing, all_)) for name, all_ in document["timings"].items()},
        statics=statics,
    )


def _origin(values: dict[str, Any]) -> TraceOrigin:
    shape, labels = ModelShape(**values["shape"]), tuple(values["labels"])
    return TraceOrigin(**{**values, "shape": shape, "labels": labels})


def _timing(values: dict[str, Any]) -> Timing:
    alone, engine = Measure(**values["alone"]), Measure(**values["engine"])
    return Timing(**{**values, "alone": alone, "engine": engine})


def _table(name: str, traced: TracedSet) -> pa.Table:
    trace, samples = traced.trace, len(traced.trace.lengths)
    num_labels = trace.logits.shape[-1]
    texts = np.arange(samples)
    if trace.windows is not None:
        texts = np.repeat(np.arange(len(trace.windows)), trace.windows)
    columns = {
        "set": pa.array([name] * samples).dictionary_encode(),
        **({} if trace.windows is None else {_TEXT: pa.array(texts)}),
        "label": pa.array(traced.labels.numpy().astype(np.int32)[texts]),
        "num_tokens": pa.array(trace.lengths.astype(np.int32)),
    }
    for layer, logits in zip(trace.layers, trace.logits, strict=True):
        flat = pa.array(logits.contiguous().numpy().reshape(-1))
        columns[f"{_LOGITS}{layer}"] = pa.FixedSizeListArray.from_arrays(flat, num_labels)
    for baseline, predictions in traced.static_predictions.items():
        columns[baseline] = pa.array(predictions.numpy().astype(np.int32)[texts])
    return pa.table(columns)


def _traced_set(table: pa.Table, statics: tuple[StaticRecord, ...]) -> TracedSet:
    columns = [name for name in table.column_names if name.startswith(_LOGITS)]
    logits = [np.array(table[name].combine_chunks().flatten()).reshape(len(table), -1) for name in columns]
    windows = np.bincount(table[_TEXT].to_numpy()) if _TEXT in table.column_names else None
    first = np.arange(len(table)) if windows is None else first_windows(windows)
    return TracedSet(
        trace=Trace(
            layers=tuple(int(name.removeprefix(_LOGITS)) for name in columns),
            logits=torch.from_numpy(np.stack(logits)),
            lengths=table["num_tokens"].to_numpy().astype(np.int64),
            windows=windows,
        ),
        labels=_ids(table["label"])[first],
        static_predictions={record.name: _ids(table[record.name])[first] for record in statics},
    )


def _ids(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.int64))
