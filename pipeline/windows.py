"""Answers of texts in windows, put together as the windows leave.

Windows exit on their own, in any order; a text is answered when its last one has left. Until then its windows'
distributions are kept, C floats each, where their token ids took hundreds: memory is that of the texts in
flight. What the answer is, is said in `deebert.windows`. Knows nothing of threads, shards or how windows were
cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deebert.packing import IntArray
from deebert.problem import Problem
from deebert.windows import first_windows, text_means
from pipeline.engine import Exits
from pipeline.schema import no_predictions

SLOT_BITS = 32
"""A sample's id: who brought it, above these bits, and where among theirs it is."""
_PLACE_MASK = (1 << SLOT_BITS) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """Answers of K samples, or of K texts."""

    prediction: npt.NDArray[Any]
    """As `Problem.predict` has it, ids in 32 bits."""
    exit_layer: npt.NDArray[np.int16]
    """1-based; of a text, that of its deepest window."""
    entropy: npt.NDArray[np.float32]
    """Nats; NaN where the problem has none."""
    certainty: npt.NDArray[np.float32]
    """Of a learning-to-exit head, of a text the mean of its windows'; NaN where the policy does not read it."""
    probabilities: npt.NDArray[np.float32]
    """(K, C); the value itself of a regression."""

    @staticmethod
    def of(exits: Exits) -> Answered:
        """The answers of those who left."""
        unread = np.full(len(exits), np.nan, np.float32)
        return Answered(
            prediction=_narrow(exits.predictions),
            exit_layer=np.full(len(exits), exits.exit_layer, np.int16),
            entropy=exits.entropy,
            certainty=unread if exits.certainty is None else exits.certainty,
            probabilities=exits.probabilities,
        )

    @staticmethod
    def blank(samples: int, problem: Problem, num_labels: int) -> Answered:
        """Room for the answers of `samples`."""
        return Answered(
            prediction=no_predictions(problem, samples, num_labels),
            exit_layer=np.zeros(samples, np.int16),
            entropy=np.zeros(samples, np.float32),
            certainty=np.zeros(samples, np.float32),
            probabilities=np.zeros((samples, num_labels), np.float32),
        )

    def put(self, places: IntArray, answers: Answered) -> None:
        """Write `answers` to the rows `places`."""
        for name, column in vars(self).items():
            column[places] = getattr(answers, name)

    def take(self, places: IntArray | slice) -> Answered:
        """The rows `places`: a copy, but of a slice a view."""
        return Answered(**{name: column[places] for name, column in vars(self).items()})


def by_slot(exits: Exits) -> Iterator[tuple[int, IntArray, Answered]]:
    """Those who left, parted by who brought them: the slot, the places of its samples, and their answers.

    Sorted once: to look for each slot among all takes as many times as long as there are slots.
    """
    if not len(exits):
        return
    slots = exits.sample_ids >> SLOT_BITS
    order = np.argsort(slots, kind="stable")
    slots, places = slots[order], exits.sample_ids[order] & _PLACE_MASK
    answers = Answered.of(exits).take(order)
    start = 0
    for stop in (*(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)):
        yield int(slots[start]), places[start:stop], answers.take(slice(start, stop))
        start = stop


class WindowedTexts:
    """N texts whose W windows, text by text, leave one by one."""

    def __init__(self, windows: IntArray, problem: Problem, num_labels: int) -> None:
        """Nobody has left yet.

        Args:
            windows: (N,) windows of each text, at least 1.
            problem: what the windows answer.
            num_labels: C.
        """
        self._counts, self._first = windows, first_windows(windows)
        self._text_of = np.repeat(np.arange(len(windows)), windows)
        self._inside = windows.copy()
        self._problem = problem
        self._answers = Answered.blank(len(self._text_of), problem, num_labels)

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
        scores, certainty = (
            text_means(values[windows], counts)
            for values in (self._answers.probabilities, self._answers.certainty[:, None])
        )
        means = torch.from_numpy(scores)
        return Answered(
            prediction=_narrow(self._problem.predict_scores(means).numpy()),
            exit_layer=np.maximum.reduceat(self._answers.exit_layer[windows], starts),
            entropy=self._problem.entropy_of_scores(means).numpy().astype(np.float32),
            certainty=certainty[:, 0].astype(np.float32),
            probabilities=scores.astype(np.float32),
        )


class TextsInFlight:
    """Texts that arrive in batches, share one engine, and are answered one by one."""

    def __init__(self, problem: Problem, num_labels: int) -> None:
        self._problem, self._num_labels = problem, num_labels
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
        self._batches[slot] = (text_ids, WindowedTexts(windows, self._problem, self._num_labels))
        return (slot << SLOT_BITS) | np.arange(int(windows.sum()))

    def leave(self, exits: Exits) -> Iterator[tuple[IntArray, Answered]]:
        """Take who left; yields ids of texts that this completes, and their answers."""
        for slot, windows, left in by_slot(exits):
            text_ids, texts = self._batches[slot]
            complete, answers = texts.leave(windows, left)
            if texts.is_done:
                del self._batches[slot]
            yield text_ids[complete], answers


def _narrow(predictions: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Label ids in 32 bits, as Parquet has them; other answers as they are."""
    return predictions.astype(np.int32) if predictions.dtype == np.int64 else predictions
