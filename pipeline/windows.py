"""Answers of texts in windows, put together as the windows leave.

Windows exit on their own, in any order; a text is answered when its last one has left. Until then its windows'
distributions are kept, C floats each, where their token ids took hundreds: memory is that of the texts in
flight. What the answer is, is said in `deebert.windows`. Knows nothing of threads, shards or how windows were
cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deebert.packing import IntArray
from deebert.windows import distribution_entropy, first_windows, text_means
from pipeline.engine import Exits

_WINDOW_BITS = 32
_WINDOW_MASK = (1 << _WINDOW_BITS) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """Answers of K samples, or of K texts."""

    prediction: npt.NDArray[np.int32]
    exit_layer: npt.NDArray[np.int16]
    """1-based; of a text, that of its deepest window."""
    entropy: npt.NDArray[np.float32]
    """Nats."""
    probabilities: npt.NDArray[np.float32]
    """(K, C)."""

    @staticmethod
    def of(exits: Exits, chosen: npt.NDArray[np.bool_] | slice = slice(None)) -> Answered:
        """The answers of those of `exits` that are `chosen`: of all, unless said."""
        logits = exits.logits[chosen]
        return Answered(
            prediction=logits.argmax(axis=1).astype(np.int32),
            exit_layer=np.full(len(logits), exits.exit_layer, np.int16),
            entropy=exits.entropy[chosen],
            probabilities=exits.probabilities[chosen],
        )

    @staticmethod
    def blank(samples: int, num_labels: int) -> Answered:
        """Room for the answers of `samples`."""
        return Answered(
            prediction=np.zeros(samples, np.int32),
            exit_layer=np.zeros(samples, np.int16),
            entropy=np.zeros(samples, np.float32),
            probabilities=np.zeros((samples, num_labels), np.float32),
        )

    def put(self, places: IntArray, answers: Answered) -> None:
        """Write `answers` to the rows `places`."""
        for name, column in vars(self).items():
            column[places] = getattr(answers, name)

    def take(self, places: IntArray) -> Answered:
        """The rows `places` (a copy)."""
        return Answered(**{name: column[places] for name, column in vars(self).items()})


class WindowedTexts:
    """N texts whose W windows, text by text, leave one by one."""

    def __init__(self, windows: IntArray, num_labels: int) -> None:
        """Nobody has left yet.

        Args:
            windows: (N,) windows of each text, at least 1.
            num_labels: C.
        """
        self._counts, self._first = windows, first_windows(windows)
        self._text_of = np.repeat(np.arange(len(windows)), windows)
        self._inside = windows.copy()
        self._answers = Answered.blank(len(self._text_of), num_labels)

    @property
    def is_done(self) -> bool:
        """Whether every window has left."""
        return not self._inside.any()

    def leave(self, windows: IntArray, answers: Answered) -> tuple[IntArray, Answered]:
        """Take the answers of windows, none of which has left before.

        Returns:
            The texts that this completes, ascending, and their answers.
        """
        self._answers.put(windows, answers)
        texts, left = np.unique(self._text_of[windows], return_counts=True)
        self._inside[texts] -= left
        complete = texts[self._inside[texts] == 0]
        return complete, self._of(complete)

    def _of(self, texts: IntArray) -> Answered:
        # A text of one window is answered as that window, bit for bit.
        found = self._answers.take(self._first[texts])
        several = np.flatnonzero(self._counts[texts] > 1)
        if len(several):
            found.put(several, self._mean_of(texts[several]))
        return found

    def _mean_of(self, texts: IntArray) -> Answered:
        counts = self._counts[texts]
        starts = first_windows(counts)
        windows = np.repeat(self._first[texts] - starts, counts) + np.arange(int(counts.sum()))
        means = text_means(self._answers.probabilities[windows], counts)
        return Answered(
            prediction=means.argmax(axis=1).astype(np.int32),
            exit_layer=np.maximum.reduceat(self._answers.exit_layer[windows], starts),
            entropy=distribution_entropy(means).astype(np.float32),
            probabilities=means.astype(np.float32),
        )


class TextsInFlight:
    """Texts that arrive in batches, share one engine, and are answered one by one."""

    def __init__(self, num_labels: int) -> None:
        self._num_labels = num_labels
        self._batches: dict[int, tuple[IntArray, WindowedTexts]] = {}
        self._next_slot = 0

    def admit(self, text_ids: IntArray, windows: IntArray) -> IntArray:
        """Expect the windows of a batch of texts.

        Args:
            text_ids: (N,) the caller's names for the texts.
            windows: (N,) windows of each, at least 1.

        Returns:
            (W,) int64 sample ids for the windows, text by text.
        """
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        self._batches[slot] = (text_ids, WindowedTexts(windows, self._num_labels))
        return (slot << _WINDOW_BITS) | np.arange(int(windows.sum()))

    def leave(self, exits: Exits) -> Iterator[tuple[IntArray, Answered]]:
        """Take who left; yields ids of texts that this completes, and their answers."""
        slots, windows = exits.sample_ids >> _WINDOW_BITS, exits.sample_ids & _WINDOW_MASK
        for slot in np.unique(slots).tolist():
            chosen = slots == slot
            text_ids, texts = self._batches[slot]
            complete, answers = texts.leave(windows[chosen], Answered.of(exits, chosen))
            if texts.is_done:
                del self._batches[slot]
            yield text_ids[complete], answers
