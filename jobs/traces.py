"""Traces as Parquet: every off-ramp's logits, the lengths and the labels of labelled sets.

One row per sample: `set` (MNLI has two), `label` (id, a 0 or 1 for each label, or a number), `num_tokens`,
`logits_i` for each off-ramp layer i, `certainty_i` where the model learns to exit, and the prediction of each static
baseline. Where texts are classified in windows, a sample is a window, `text` numbers the text that it is of, and what
is known of the text stands at each of its windows. The footer says of what model and data they are, and holds the
seconds measured on them, so that a later evaluation runs no model at all. Knows nothing of texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from deebert.exit_policy import EntropyThreshold, LearningToExit, StoredPolicy
from deebert.problem import SINGLE_LABEL, problem_of
from deebert.windows import first_windows
from jobs.timing import Measure, Timing
from pipeline.errors import UsageError

_KEY = b"deebert.trace"
_LOGITS = "logits_"
_TEXT = "text"
_CERTAINTY = "certainty_"


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
    problem_type: str = SINGLE_LABEL.name
    """Hugging Face's; traces from before there were several do not say."""
    precision: str
    max_length: int
    shape: ModelShape
    window_stride: int | None = None
    """None: longer texts were cut."""

    @property
    def read_as(self) -> str:
        """One line on precision and length, without which no share of answers says much."""
        if self.window_stride is None:
            return f"{self.precision}, texts cut to {self.max_length} tokens"
        windows = f"windows of {self.max_length} tokens that share {self.window_stride}"
        return f"{self.precision}, texts in {windows}"


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
    """One for each text, in the form that the problem gives them: see `LabelledSequences.labels`."""
    static_predictions: Mapping[str, Tensor] = field(default_factory=dict)
    """By the baseline's name, N: see `Problem.predict`."""


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
    agreeing: int | None = None
    """Texts of all sets that float32 labels at full depth as the traced precision does; None where it was not run."""


def traced_policies(
    file: TraceFile, *, thresholds: Sequence[float], certainty_thresholds: Sequence[float]
) -> dict[str, StoredPolicy]:
    """Those that the traced model knows, by the name that tables give them."""
    policies: dict[str, StoredPolicy] = {}
    if problem_of(file.origin.problem_type).outcomes(len(file.origin.labels)) is not None:
        policies |= {f"{t:g}": EntropyThreshold(t) for t in thresholds}
    if all(traced.trace.certainties is not None for traced in file.sets.values()):
        policies |= {f"certainty {t:g}": LearningToExit(t) for t in certainty_thresholds}
    return policies


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
        "agreeing": file.agreeing,
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
    with _refusing_others(path):
        return _parse(pq.read_table(path))


def read_origin(path: Path) -> TraceOrigin:
    """Of what a trace is, of which nothing else is read.

    Raises:
        DataError: the file is not a trace.
    """
    with _refusing_others(path):
        return _origin(_document(pq.read_schema(path))["origin"])


@contextmanager
def _refusing_others(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{str(path)!r} is not a trace of `deebert evaluate`: remove it or name another"
        ) from error


def _document(schema: pa.Schema) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((schema.metadata or {})[_KEY])
    return document


def _parse(table: pa.Table) -> TraceFile:
    document = _document(table.schema)
    names = np.asarray(table["set"].cast(pa.string()).to_pylist(), dtype=object)
    statics = tuple(StaticRecord(**record) for record in document["statics"])
    origin = _origin(document["origin"])
    return TraceFile(
        origin=origin,
        sets={
            name: _traced_set(table.filter(pa.array(names == name)), origin, statics)
            for name in dict.fromkeys(names.tolist())
        },
        timings={name: tuple(map(_timing, all_)) for name, all_ in document["timings"].items()},
        statics=statics,
        agreeing=document.get("agreeing"),
    )


def _origin(values: dict[str, Any]) -> TraceOrigin:
    shape, labels = ModelShape(**values["shape"]), tuple(values["labels"])
    return TraceOrigin(**{**values, "shape": shape, "labels": labels})


def _timing(values: dict[str, Any]) -> Timing:
    alone, engine = Measure(**values["alone"]), Measure(**values["engine"])
    return Timing(**{**values, "alone": alone, "engine": engine})


def _table(name: str, traced: TracedSet) -> pa.Table:
    trace, samples = traced.trace, len(traced.trace.lengths)
    texts = torch.arange(samples)
    if trace.windows is not None:
        texts = torch.arange(len(trace.windows)).repeat_interleave(torch.from_numpy(trace.windows))
    columns = {
        "set": pa.array([name] * samples).dictionary_encode(),
        **({} if trace.windows is None else {_TEXT: pa.array(texts.numpy())}),
        "label": _column(traced.labels[texts]),
        "num_tokens": pa.array(trace.lengths.astype(np.int32)),
    }
    for layer, logits in zip(trace.layers, trace.logits, strict=True):
        columns[f"{_LOGITS}{layer}"] = _column(logits)
    if trace.certainties is not None:
        for layer, certainties in zip(trace.layers, trace.certainties, strict=True):
            columns[f"{_CERTAINTY}{layer}"] = _column(certainties)
    for baseline, predictions in traced.static_predictions.items():
        columns[baseline] = _column(predictions[texts])
    return pa.table(columns)


def _traced_set(table: pa.Table, origin: TraceOrigin, statics: tuple[StaticRecord, ...]) -> TracedSet:
    names = [name for name in table.column_names if name.startswith(_LOGITS)]
    layers = tuple(int(name.removeprefix(_LOGITS)) for name in names)
    certain = [table[name] for layer in layers if (name := f"{_CERTAINTY}{layer}") in table.column_names]
    windows = np.bincount(table[_TEXT].to_numpy()) if _TEXT in table.column_names else None
    first = torch.from_numpy(np.arange(len(table)) if windows is None else first_windows(windows))
    return TracedSet(
        trace=Trace(
            layers=layers,
            logits=torch.stack([_tensor(table[name]) for name in names]),
            lengths=table["num_tokens"].to_numpy().astype(np.int64),
            windows=windows,
            problem=problem_of(origin.problem_type),
            certainties=torch.stack([_tensor(column) for column in certain]) if certain else None,
        ),
        labels=_tensor(table["label"])[first],
        static_predictions={record.name: _tensor(table[record.name])[first] for record in statics},
    )


def _column(values: Tensor) -> pa.Array:
    """(N,) or (N, C) -> a column of numbers or of lists; ids take 32 bits."""
    array = values.contiguous().numpy()
    flat = pa.array((array.astype(np.int32) if array.dtype == np.int64 else array).reshape(-1))
    return flat if values.dim() == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _tensor(column: pa.ChunkedArray) -> Tensor:
    """The inverse of `_column`."""
    if pa.types.is_fixed_size_list(column.type):
        rows = column.combine_chunks()
        return torch.from_numpy(rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1).copy())
    array = column.to_numpy()
    return torch.from_numpy(array.astype(np.int64 if array.dtype == np.int32 else array.dtype))
