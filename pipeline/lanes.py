"""One thread that runs the engines, fed by many threads that read and tokenize.

The exit lane classifies every row; the audit lane runs a control sample of the same rows at full depth, so
that the saving is measured on the same machine, in the same minutes. The control sample's micro-batches have
the same bound, but are fewer, emptier and mix more lengths, so full depth looks slower than it is (by 8 % in
the demo). Knows nothing of files, Arrow or Ray.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH, ExitPolicy
from deebert.packing import IntArray, PackedTokens
from deebert.problem import Problem
from pipeline.engine import Engine, EngineConfig, EngineStats, Exits
from pipeline.schema import no_predictions
from pipeline.windows import SLOT_BITS, Answered, WindowedTexts, by_slot

# Input queued ahead of the exit lane, in micro-batches: enough that reading never makes it wait.
_QUEUED_MICRO_BATCHES = 16
# How long a partly filled micro-batch waits for a thread that is still reading before it runs as it is.
_PATIENCE_SECONDS = 0.05
_REPORT_SECONDS = 0.5

ProgressCallback = Callable[[int, int], None]
"""Called with rows answered and Σ of their exit layers since the last call."""
Limit = Callable[[str], AbstractContextManager[None]]
"""Holds a block, named by what it does, to a time (`pipeline.watchdog`)."""


class Submission:
    """N rows in the lanes, and their answers as they come.

    A row is a sample, or as many as it has windows: then it is answered when the last of them has left.
    """

    def __init__(
        self,
        tokens: PackedTokens,
        audited: npt.NDArray[np.bool_],
        problem: Problem,
        num_labels: int,
        windows: IntArray | None = None,
    ) -> None:
        samples_audited = audited if windows is None else np.repeat(audited, windows)
        self._input: tuple[PackedTokens, npt.NDArray[np.bool_]] | None = (tokens, samples_audited)
        self.total_tokens = tokens.layout.total_tokens
        self.audited = audited
        rows = len(audited)
        self.prediction = no_predictions(problem, rows, num_labels)
        self.exit_layer = np.zeros(rows, np.int16)
        self.entropy = np.zeros(rows, np.float32)
        self.certainty = np.full(rows, np.nan, np.float32)
        self.probabilities = np.zeros((rows, num_labels), np.float32)
        self.audit_prediction = no_predictions(problem, rows, num_labels)
        self.samples_left: Counter[int] = Counter()
        """Samples (rows, or their windows) that left after each layer, 1-based."""
        self._exit_windows = None if windows is None else WindowedTexts(windows, problem, num_labels)
        self._audit_windows = (
            None if windows is None or not audited.any() else WindowedTexts(windows, problem, num_labels)
        )
        self._outstanding = len(tokens) + int(samples_audited.sum())
        self._done = threading.Event()
        self._error: BaseException | None = None
        if not rows:
            self._done.set()

    def take_input(self) -> tuple[PackedTokens, npt.NDArray[np.bool_]]:
        """The samples, and which of them are audited; let go here, for a shard may be long."""
        assert self._input is not None
        taken, self._input = self._input, None
        return taken

    def wait(self) -> None:
        """Block until every row has its answer.

        Raises:
            Exception: whatever stopped the lanes.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error

    def fail(self, error: BaseException) -> None:
        """Give up waiting."""
        self._error = error
        self._done.set()

    def answer(self, samples: IntArray, left: Answered, *, audit: bool) -> npt.NDArray[np.int16]:
        """Take the answers of `samples`, all of one step; the exit layers of the rows that are now answered."""
        rows, answers = samples, left
        if (texts := self._audit_windows if audit else self._exit_windows) is not None:
            rows, answers = texts.leave(samples, left)
        if audit:
            self.audit_prediction[rows] = answers.prediction
        else:
            self.samples_left[int(left.exit_layer[0])] += len(samples)
            self.prediction[rows] = answers.prediction
            self.exit_layer[rows] = answers.exit_layer
            self.entropy[rows] = answers.entropy
            self.certainty[rows] = answers.certainty
            self.probabilities[rows] = answers.probabilities
        self._outstanding -= len(samples)
        return answers.exit_layer

    @property
    def is_complete(self) -> bool:
        """Whether every row has its answer."""
        return self._outstanding == 0

    def finish(self) -> None:
        """Let those who wait go on; what was kept of windows is let go."""
        self._exit_windows = self._audit_windows = None
        self._done.set()


class Lanes:
    """The exit lane and the audit lane of one replica, on one thread."""

    def __init__(
        self,
        encoder: PackedEncoder,
        policy: ExitPolicy,
        config: EngineConfig,
        *,
        on_progress: ProgressCallback = lambda rows, exit_layers: None,
        limit: Limit = lambda what: nullcontext(),
    ) -> None:
        self._exit_lane = Engine(encoder, policy, config)
        # The same, though it has fewer buffers and finds less memory: it is what the exit lane is compared with.
        same_size = replace(config, micro_batch_tokens=self._exit_lane.micro_batch_tokens)
        self._audit_lane = Engine(encoder, FULL_DEPTH, same_size)
        self._problem, self._num_labels = encoder.problem, encoder.num_labels
        self._most_queued_tokens = _QUEUED_MICRO_BATCHES * self._exit_lane.micro_batch_tokens
        self._on_progress, self._limit = on_progress, limit
        self._changed = threading.Condition()
        self._arrived: deque[tuple[int, Submission]] = deque()
        self._open: dict[int, Submission] = {}
        self._next_slot = 0
        self._queued_tokens = 0  # submitted, not yet admitted to layer 1
        self._feeders = 0
        self._error: BaseException | None = None
        self._unreported = [0, 0]
        self._last_report = time.monotonic()
        self._reported_stats = (self._exit_lane.stats, self._audit_lane.stats)
        threading.Thread(target=self._run, name="lanes", daemon=True).start()

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """While a thread is in here, more input is expected: partly filled micro-batches wait for it."""
        with self._changed:
            self._feeders += 1
        try:
            yield
        finally:
            with self._changed:
                self._feeders -= 1
                self._changed.notify_all()

    def submit(
        self, tokens: PackedTokens, audited: npt.NDArray[np.bool_], windows: IntArray | None = None
    ) -> Submission:
        """Hand over rows; blocks while enough input is queued.

        Args:
            tokens: N sequences, or one for each window of N rows, row by row.
            audited: (N,) which rows also run at full depth.
            windows: (N,) windows of each row; None: a row is a sequence.
        """
        submission = Submission(tokens, audited, self._problem, self._num_labels, windows)
        if not len(tokens):
            return submission
        with self._changed:
            self._changed.wait_for(lambda: self._queued_tokens < self._most_queued_tokens or self._error)
            if self._error is not None:
                raise self._error
            self._arrived.append((self._next_slot, submission))
            self._open[self._next_slot] = submission
            self._next_slot += 1
            self._queued_tokens += tokens.layout.total_tokens
            self._changed.notify_all()
        return submission

    def take_stats(self) -> tuple[EngineStats, EngineStats]:
        """Work of the exit lane and of the audit lane since the last call."""
        with self._changed:
            now = (self._exit_lane.stats, self._audit_lane.stats)
            before, self._reported_stats = self._reported_stats, now
        return now[0] - before[0], now[1] - before[1]

    def _run(self) -> None:
        try:
            while True:
                self._admit()
                with self._limit("a micro-batch"):
                    self._step()
        except BaseException as error:  # the threads that wait must hear of it, whatever it is
            with self._changed:
                self._error = error
                for submission in self._open.values():
                    submission.fail(error)
                self._changed.notify_all()

    def _admit(self) -> None:
        """Hand what has arrived to the engines; sleep while there is nothing at all to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._open)
            arrived = list(self._arrived)
            self._arrived.clear()
        for slot, submission in arrived:
            # Shortest first: neighbours of equal length share attention calls all the way down.
            tokens, audited = submission.take_input()
            order = np.argsort(tokens.layout.lengths, kind="stable")
            self._exit_lane.submit((slot << SLOT_BITS) | order, tokens.take(order))
            control = order[audited[order]]
            if len(control):
                self._audit_lane.submit((slot << SLOT_BITS) | control, tokens.take(control))

    def _step(self) -> None:
        # The control sample is small: served first, it never piles up and never waits for the end.
        if (exits := self._audit_lane.step()) is not None:
            return self._deliver(exits, audit=True)
        if (exits := self._exit_lane.step()) is not None:
            return self._deliver(exits, audit=False)
        if self._more_input_soon():
            return None
        if (exits := self._exit_lane.step(drain=True)) is not None:
            return self._deliver(exits, audit=False)
        if (exits := self._audit_lane.step(drain=True)) is not None:
            return self._deliver(exits, audit=True)
        return None

    def _more_input_soon(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or not self._feeders, timeout=_PATIENCE_SECONDS)
            return bool(self._arrived)

    def _deliver(self, exits: Exits, *, audit: bool) -> None:
        complete: list[int] = []
        for slot, samples, left in by_slot(exits):
            submission = self._open[slot]
            exit_layers = submission.answer(samples, left, audit=audit)
            if not audit:
                self._unreported[0] += len(exit_layers)
                self._unreported[1] += int(exit_layers.sum())
            if submission.is_complete:
                complete.append(slot)
        if not audit:
            self._count()
        # Open until nothing can fail any more: an error reaches those who wait for what is open.
        for slot in complete:
            self._open.pop(slot).finish()

    def _count(self) -> None:
        with self._changed:
            self._queued_tokens = self._exit_lane.waiting_tokens + sum(
                submission.total_tokens for _, submission in self._arrived
            )
            self._changed.notify_all()
        now = time.monotonic()
        if now - self._last_report >= _REPORT_SECONDS or not self._exit_lane.in_flight:
            self._on_progress(*self._unreported)
            self._unreported, self._last_report = [0, 0], now
