"""Recounts the parts, independently of everything that wrote them, and compares with the run record.

Reads with fastparquet because the pipeline writes with pyarrow: a mistake of the writing library, or of
ours, shows up here instead of being read back the way it was written. Holds one row group of each part that
is being read. Knows nothing of how findings are shown.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from fastparquet import ParquetFile

from pipeline.errors import PipelineError
from pipeline.inputs import file_system
from pipeline.records import ModelRecord, RunRecord
from pipeline.report.said import said_by

COLUMNS = ("exit_layer", "num_tokens", "truncated", "audit_prediction")
"""Of every part, whatever its rows say."""
WINDOWS_COLUMN = "num_windows"
"""Beside them, where longer texts were classified in windows."""
SCORE_BINS = 200
# Parts may be far away: on object stores, waiting for them one by one is all the time.
READING_THREADS = 16

Watch = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""Told how many parts there are; its block's function hears of parts as they have been read."""
Ints = npt.NDArray[np.int64]
T = TypeVar("T")


class EvidenceError(PipelineError):
    """The parts do not hold what the run recorded, or cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One quantity on which the parts and the run record disagree."""

    quantity: str
    recorded: str
    recounted: str


@dataclass(frozen=True, kw_only=True)
class ScoreRange:
    """Scores of the rows that left after one layer, to 1/200."""

    layer: int
    """1-based; 0: the embeddings."""
    rows: int
    low: float
    """10th percentile."""
    median: float
    high: float
    """90th percentile."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the parts themselves say. Tuples over layers have n + 1 entries; entry 0 is the embeddings."""

    parts: int
    rows: int
    tokens: int
    squared_tokens: int
    truncated_rows: int
    windows: int
    """Of all rows; a row that was not cut is one."""
    exit_rows: tuple[int, ...]
    exit_tokens: tuple[int, ...]
    impossible_exit_rows: int
    """Rows whose exit layer the model does not have."""
    label_rows: tuple[int, ...]
    """Rows per label, by the label's name, in the model's order; a row of a multi-label model counts for each."""
    unknown_label_rows: int
    """Rows whose label the model does not have."""
    mislabelled_rows: int
    """Rows whose `label` is not the name of their `prediction`."""
    audited_rows: tuple[int, ...]
    """Rows that also ran at full depth, per exit layer."""
    agreeing_rows: tuple[int, ...]
    """Audited rows whose full-depth answer is their prediction, per exit layer."""
    score_ranges: tuple[ScoreRange, ...]
    """Layers after which no row left are absent; empty where rows have not one score each."""
    findings: tuple[Finding, ...]
    """Empty when parts and record agree."""


def unwatched(total: int) -> AbstractContextManager[Callable[[int], object]]:
    """A `Watch` that shows nothing."""
    return nullcontext(lambda parts: None)


def gather_evidence(paths: Sequence[str], record: RunRecord, *, watch: Watch = unwatched) -> Evidence:
    """Reads the needed columns of every part, counts, and compares with `record`.

    Args:
        paths: Local paths or URLs of the parts.
        record: The run they belong to.
        watch: Shows how far the reading is.

    Raises:
        EvidenceError: A part cannot be read.
    """
    has_windows = record.identity.window_stride is not None
    recount = _Recount(record.model, record.identity.max_length)
    columns = (*recount.columns, WINDOWS_COLUMN) if has_windows else recount.columns
    counting = threading.Lock()

    def count(path: str) -> None:
        for frame in _row_groups(path, columns):
            with counting:
                recount.add(frame)

    with watch(len(paths)) as seen:
        for _ in _in_threads(count, paths):
            seen(1)
    return recount.conclude(len(paths), record)


def verify_parts(expected_rows: Mapping[str, int]) -> None:
    """Count the rows of parts from their footers alone.

    Args:
        expected_rows: Rows that were committed, by the part's path or URL.

    Raises:
        EvidenceError: A part is missing or unreadable, or holds another number of rows.
    """
    counts = _in_threads(_footer_rows, expected_rows)
    for (path, expected), rows in zip(expected_rows.items(), counts, strict=True):
        if rows != expected:
            raise EvidenceError(
                f"the part {path!r} holds {rows:,} rows, but {expected:,} were committed: it was changed; "
                "delete it and run the same command again"
            )


def _in_threads(read: Callable[[str], T], paths: Iterable[str]) -> Iterator[T]:
    """What `read` gives for each path, in order; the first that fails ends it."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        try:
            yield from pool.map(read, paths)
        finally:
            pool.shutdown(cancel_futures=True)


def _open(path: str) -> Any:
    fs, plain_path = file_system(path)
    try:
        return ParquetFile(plain_path, fs=fs)
    except Exception as error:  # fastparquet raises whatever its parser trips over
        raise EvidenceError(
            f"the part {path} cannot be read ({type(error).__name__}: {error}): "
            "delete it and run the same command again, which redoes its shard."
        ) from error


def _footer_rows(path: str) -> int:
    return int(_open(path).fmd.num_rows)


def _row_groups(path: str, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    part = _open(path)
    missing = [column for column in columns if column not in part.columns]
    if missing:
        raise EvidenceError(f"the part {path} lacks the column {missing[0]}: it is not a part of such a run.")
    try:
        yield from part.iter_row_groups(columns=list(columns))
    except Exception as error:  # a damaged page: the footer was sound, the data are not
        raise EvidenceError(
            f"the part {path} is damaged ({type(error).__name__}: {error}): "
            "delete it and run the same command again, which redoes its shard."
        ) from error


class _Recount:
    """The counters; the last index of per-layer counters takes exit layers that the model does not have."""

    def __init__(self, model: ModelRecord, max_length: int) -> None:
        self._model, self._max_length = model, max_length
        size = model.num_layers + 2
        self._sums: Ints = np.zeros(5, np.int64)  # rows, tokens, squared tokens, truncated, windows
        self._layers: Ints = np.zeros((4, size), np.int64)  # rows, tokens, audited, agreeing
        self._said = said_by(model.problem_type, model.labels)
        self._scores: Ints = np.zeros((size, SCORE_BINS), np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        """That are read of every part."""
        return (*self._said.columns, *COLUMNS)

    def add(self, frame: pd.DataFrame) -> None:
        """Counts one row group."""
        exit_layers, tokens = self._exit_layers(frame), frame["num_tokens"].to_numpy(np.int64)
        audited = frame["audit_prediction"].notna().to_numpy(bool)
        agreeing, scores = self._said.add(frame)
        truncated = int(frame["truncated"].to_numpy(bool).sum())
        windows = self._windows(frame)
        squared = self._squared_tokens(tokens, windows)
        self._sums += [len(frame), tokens.sum(), squared, truncated, windows.sum()]
        self._add_layers(exit_layers, tokens, audited, agreeing)
        if scores is not None:
            self._add_scores(exit_layers, scores)

    @staticmethod
    def _windows(frame: pd.DataFrame) -> Ints:
        return (
            frame[WINDOWS_COLUMN].to_numpy(np.int64)
            if WINDOWS_COLUMN in frame
            else np.ones(len(frame), np.int64)
        )

    def _squared_tokens(self, tokens: Ints, windows: Ints) -> int:
        # All windows of a row but its last are full.
        full = (windows - 1) * self._max_length
        return int((full * self._max_length + (tokens - full) ** 2).sum())

    def _exit_layers(self, frame: pd.DataFrame) -> Ints:
        layers, n = frame["exit_layer"].to_numpy(np.int64), self._model.num_layers
        first = 0 if 0 in self._model.off_ramp_layers else 1
        return np.where((layers >= first) & (layers <= n), layers, n + 1)

    def _add_layers(self, exit_layers: Ints, tokens: Ints, audited: Any, agreeing: Any) -> None:
        size = self._layers.shape[1]
        for row, weights in enumerate((None, tokens, audited, agreeing)):
            # bincount sums weights in float64: exact for whole numbers below 2**53
            self._layers[row] += np.bincount(exit_layers, weights, size).astype(np.int64)

    def _add_scores(self, exit_layers: Ints, scores: npt.NDArray[np.float64]) -> None:
        bins = np.clip(np.nan_to_num(scores) * SCORE_BINS, 0, SCORE_BINS - 1).astype(np.int64)
        flat = np.bincount(exit_layers * SCORE_BINS + bins, minlength=self._scores.size)
        self._scores += flat.reshape(self._scores.shape)

    def conclude(self, parts: int, record: RunRecord) -> Evidence:
        """The counts, and where they differ from `record`."""
        rows, tokens, squared_tokens, truncated, windows = self._sums.tolist()
        exit_rows, exit_tokens, audited, agreeing = (tuple(row) for row in self._layers[:, :-1].tolist())
        counted: dict[str, Any] = {
            "parts": parts,
            "rows": rows,
            "tokens": tokens,
            "squared_tokens": squared_tokens,
            "truncated_rows": truncated,
            "windows": windows,
            "exit_rows": exit_rows,
            "exit_tokens": exit_tokens,
            "impossible_exit_rows": int(self._layers[0, -1]),
            "unknown_label_rows": self._said.unknown_label_rows,
            "mislabelled_rows": self._said.mislabelled_rows,
            "audited_rows": audited,
            "agreeing_rows": agreeing,
        }
        return Evidence(
            **counted,
            label_rows=tuple(self._said.label_rows.tolist()),
            score_ranges=tuple(self._score_ranges()),
            findings=tuple(_findings(counted, record)),
        )

    def _score_ranges(self) -> Iterator[ScoreRange]:
        for layer in range(self._scores.shape[0] - 1):
            cumulative = np.cumsum(self._scores[layer])
            rows = int(cumulative[-1])
            if rows:
                low, median, high = (_quantile(cumulative, share) for share in (0.1, 0.5, 0.9))
                yield ScoreRange(layer=layer, rows=rows, low=low, median=median, high=high)


def _quantile(cumulative: Ints, share: float) -> float:
    """The middle of the bin that holds the quantile."""
    rank = math.ceil(share * int(cumulative[-1]))
    return (int(np.searchsorted(cumulative, rank)) + 0.5) / SCORE_BINS


def _findings(counted: dict[str, Any], record: RunRecord) -> Iterator[Finding]:
    totals = record.totals
    comparisons: list[tuple[str, Any, Any]] = [
        ("parts", totals.shards, counted["parts"]),
        ("rows", totals.rows, counted["rows"]),
        ("tokens", totals.tokens, counted["tokens"]),
        ("squared tokens", totals.squared_tokens, counted["squared_tokens"]),
        ("truncated rows", totals.truncated_rows, counted["truncated_rows"]),
        ("windows", sum(totals.exit_windows), counted["windows"]),
        ("rows per exit layer", totals.exit_rows, counted["exit_rows"]),
        ("tokens per exit layer", totals.exit_tokens, counted["exit_tokens"]),
        ("control rows", totals.audited_rows, sum(counted["audited_rows"])),
        ("control rows that agree", totals.audit_agreements, sum(counted["agreeing_rows"])),
        ("rows with an exit layer that the model does not have", 0, counted["impossible_exit_rows"]),
        ("rows with a label that the model does not have", 0, counted["unknown_label_rows"]),
        ("rows whose label is not the name of their prediction", 0, counted["mislabelled_rows"]),
    ]
    for quantity, recorded, recounted in comparisons:
        if recorded != recounted:
            yield Finding(quantity=quantity, recorded=_spell(recorded), recounted=_spell(recounted))


def _spell(value: int | tuple[int, ...]) -> str:
    return ", ".join(f"{v:,}" for v in value) if isinstance(value, tuple) else f"{value:,}"
