"""Lines in, answers out, each the moment its sample exits. One process, no Ray.

A reader thread keeps lines coming; the calling thread submits what is there, runs one micro-batch and writes
who left. Partly filled micro-batches run as soon as no line waits, so that a slow input is answered at once
and a fast one in full batches.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np

from deebert.checkpoint import Checkpoint
from deebert.encoder import PackedEncoder
from deebert.exit_policy import ExitPolicy
from deebert.packing import IntArray
from deebert.precision import DTYPES, Precision
from deebert.windows import text_sums
from pipeline.engine import Engine, EngineConfig, Exits
from pipeline.errors import ReadError
from pipeline.tokenization import TextTokenizer
from pipeline.windows import Answered, TextsInFlight

# Lines taken at a time: a few micro-batches of short texts.
_LINES = 256
# And bytes: long lines become many windows.
_LINE_BYTES = 1 << 20
# What the reader may be ahead of the engine.
_QUEUED_LINES = 4096
_QUEUED_BYTES = 8 << 20
_BOM = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How lines are read and answered."""

    text_column: str = "text"
    """Field of the text in JSON lines; any other line is a text itself."""
    text_pair_column: str | None = None
    """Field of the second text of a pair; every line has to be JSON then."""
    id_column: str = "id"
    """Field that names the sample in the answer, where a JSON line has it."""
    max_length: int | None = None
    """Tokens a text is cut to; None: what the model was trained with."""
    window_stride: int | None = None
    """Longer texts are not cut but classified in windows that share so many tokens (`deebert.windows`)."""
    micro_batch_tokens: int | None = None
    """None: as many as suit the device."""
    precision: Precision = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class _Sample:
    """A line that can be classified."""

    index: int
    text: str
    pair: str = ""
    """Empty where no pairs are asked for."""
    names: dict[str, Any] = field(default_factory=dict)
    """The sample's own id, if it has one."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What a stream was made of."""

    lines: int
    unreadable: int
    """Lines that were answered with an error."""
    first_error: str = ""
    """Of the first of them."""


class _BadLineError(ValueError):
    """A line that cannot be classified, and why."""


def stream(
    checkpoint: Checkpoint, policy: ExitPolicy, lines: Iterable[bytes], out: TextIO, config: StreamConfig
) -> Streamed:
    """Classify `lines` until they end; writes one JSON object per line to `out`, in order of exit.

    Args:
        checkpoint: the model and its tokenizer.
        policy: when samples leave.
        lines: texts or JSON objects, UTF-8, with or without line ends.
        out: flushed after each step.
        config: see there.

    A line that cannot be read gives an object with its ``index`` and an ``error``: each line is answered.

    Returns:
        How many lines there were, and how many of them could not be read.

    Raises:
        ReadError: `lines` broke off; those that came before are answered.
    """
    return _Stream(checkpoint, policy, out, config).run(lines)


class _Stream:
    def __init__(self, checkpoint: Checkpoint, policy: ExitPolicy, out: TextIO, config: StreamConfig) -> None:
        encoder = PackedEncoder(checkpoint.fused, device=config.device, dtype=DTYPES[config.precision])
        self._engine = Engine(encoder, policy, EngineConfig(micro_batch_tokens=config.micro_batch_tokens))
        self._tokenizer = TextTokenizer(
            checkpoint.tokenizer,
            max_length=config.max_length or checkpoint.default_max_length,
            has_token_types=encoder.has_token_types,
            window_stride=config.window_stride,
        )
        self._labels = checkpoint.labels
        self._in_windows = (
            None if config.window_stride is None else TextsInFlight(encoder.problem, encoder.num_labels)
        )
        self._out, self._config = out, config
        self._errors, self._first_error = 0, ""
        self._waiting: dict[int, dict[str, Any]] = {}  # what the answer repeats of the sample, by index

    def run(self, lines: Iterable[bytes]) -> Streamed:
        arriving = _Arriving()
        # A daemon: where it waits, for a line or for room, it must not hold the process.
        threading.Thread(target=arriving.read, args=(lines,), daemon=True).start()
        ended = False
        while not ended or self._engine.in_flight:
            if not ended and self._engine.wants_input:
                taken, ended = arriving.take(wait=not self._engine.in_flight)
                self._submit(taken)
            exits = self._engine.step(drain=ended or arriving.is_empty)
            if exits is not None and len(exits):
                for indices, answers in self._answered(exits):
                    self._write(self._spelled(indices, answers))
        arriving.check()
        return Streamed(lines=arriving.num_read, unreadable=self._errors, first_error=self._first_error)

    def _submit(self, lines: list[tuple[int, bytes]]) -> None:
        samples: list[_Sample] = []
        for index, line in lines:
            try:
                samples.append(_parse(index, line, self._config))
            except _BadLineError as error:
                self._errors, self._first_error = self._errors + 1, self._first_error or str(error)
                self._write([{"index": index, "error": str(error)}])
        if not samples:
            return
        pairs = None if self._config.text_pair_column is None else [s.pair for s in samples]
        batch = self._tokenizer([s.text for s in samples], pairs)
        facts = {
            "num_tokens": text_sums(batch.tokens.layout.lengths, batch.windows),
            **({} if self._in_windows is None else {"num_windows": batch.windows}),
            "truncated": batch.truncated,
        }
        for sample, *values in zip(samples, *(column.tolist() for column in facts.values()), strict=True):
            self._waiting[sample.index] = {**sample.names, **dict(zip(facts, values, strict=True))}
        ids = np.array([s.index for s in samples], np.int64)
        if self._in_windows is not None:
            ids = self._in_windows.admit(ids, batch.windows)
        self._engine.submit(ids, batch.tokens)

    def _answered(self, exits: Exits) -> Iterator[tuple[IntArray, Answered]]:
        """Indices of the lines that are answered now, and their answers."""
        if self._in_windows is None:
            return iter([(exits.sample_ids, Answered.of(exits))])
        return self._in_windows.leave(exits)

    def _spelled(self, indices: IntArray, answers: Answered) -> Iterator[dict[str, Any]]:
        columns = (
            indices,
            answers.prediction,
            answers.probabilities,
            answers.exit_layer,
            answers.entropy,
            answers.certainty,
        )
        rows = zip(*(c.tolist() for c in columns), strict=True)
        for index, prediction, probabilities, exit_layer, entropy, certainty in rows:
            yield {
                "index": index,
                **self._waiting.pop(index),
                **self._said(prediction, probabilities),
                "exit_layer": exit_layer,
                "entropy": None if math.isnan(entropy) else round(entropy, 6),
                **({} if math.isnan(certainty) else {"certainty": round(certainty, 6)}),
            }

    def _said(self, prediction: Any, probabilities: list[float]) -> dict[str, Any]:
        """The fields that depend on what the model is asked, as the columns of `pipeline.schema`."""
        if isinstance(prediction, float):
            return {"prediction": round(prediction, 6)}
        if isinstance(prediction, int):
            score = round(max(probabilities), 6)
            return {"prediction": prediction, "label": self._labels[prediction], "score": score}
        chosen = [i for i, holds in enumerate(prediction) if holds]
        return {
            "prediction": chosen,
            "label": [self._labels[i] for i in chosen],
            "score": [round(probabilities[i], 6) for i in chosen],
        }

    def _write(self, answers: Iterable[dict[str, Any]]) -> None:
        for answer in answers:
            self._out.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self._out.flush()


class _Arriving:
    """Lines on their way from the reader thread to the engine: bounded in number and in bytes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lines: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self.num_read = 0
        self._ended = False
        self._error: BaseException | None = None

    def read(self, lines: Iterable[bytes]) -> None:
        """Put each line as soon as there is room for it; what stops that is kept for `check`."""
        error: BaseException | None = None
        try:
            for line in lines:
                self._put(line)
        except BaseException as stopped:  # else an input that broke off would look like one that ended
            error = stopped
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify()

    def _put(self, line: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(len(line)))
            self._lines.append((self.num_read, line))
            self.num_read += 1
            self._bytes += len(line)
            self._changed.notify()

    def _has_room(self, size: int) -> bool:
        if not self._lines:
            return True  # a line longer than the bound has to pass too
        return len(self._lines) < _QUEUED_LINES and self._bytes + size <= _QUEUED_BYTES

    @property
    def is_empty(self) -> bool:
        """Whether no line waits."""
        return not self._lines

    def take(self, *, wait: bool) -> tuple[list[tuple[int, bytes]], bool]:
        """The lines that are there, and whether they were the last; sleeps for the first one if `wait`."""
        taken: list[tuple[int, bytes]] = []
        size = 0
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._lines or self._ended)
            while self._lines and len(taken) < _LINES and size < _LINE_BYTES:
                taken.append(self._lines.popleft())
                size += len(taken[-1][1])
            self._bytes -= size
            self._changed.notify()
            return taken, self._ended and not self._lines

    def check(self) -> None:
        """Say so if the input, which is over, did not end but broke off.

        Raises:
            ReadError: it did; names how many lines came before, and why.
        """
        if self._error is None:
            return
        said = str(getattr(self._error, "strerror", None) or self._error)
        reason = (said.splitlines() or [type(self._error).__name__])[0]
        lines = "1 line" if self.num_read == 1 else f"{self.num_read} lines"
        raise ReadError(
            f"the input broke off after {lines}: {reason}; what was read is answered, send the rest again"
        ) from self._error


def _parse(index: int, line: bytes, config: StreamConfig) -> _Sample:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _BadLineError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    if index == 0:
        text = text.removeprefix(_BOM)
    if not text.lstrip().startswith("{"):
        if config.text_pair_column is not None:
            raise _BadLineError(
                f"a plain line has no field {config.text_pair_column!r}: pairs come as JSON objects"
            )
        return _Sample(index, text)
    try:
        value = json.loads(text)
        if "\\" in text:  # half an escaped surrogate pair is no text: nothing could tokenize or print it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not a JSON object: {error}") from error
    names = {"id": value[config.id_column]} if config.id_column in value else {}
    pair = "" if config.text_pair_column is None else _text(value, config.text_pair_column)
    return _Sample(index, _text(value, config.text_column), pair, names)


def _text(value: dict[str, Any], column: str) -> str:
    found = value.get(column)
    if not isinstance(found, str):
        raise _BadLineError(f"no text in the field {column!r}")
    return found
