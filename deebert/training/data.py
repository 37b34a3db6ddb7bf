"""Labelled samples as training reads them: checked, split, in rows, and in batches of like lengths.

Knows nothing of models or losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from deebert.errors import DataError
from deebert.evaluation import LabelledSequences
from deebert.packing import IntArray
from deebert.problem import SINGLE_LABEL, Problem


def check_labels(data: LabelledSequences, num_labels: int, problem: Problem = SINGLE_LABEL) -> None:
    """Refuse data that the model cannot be trained on.

    Raises:
        DataError: no samples, or labels that the model does not have or that are of another problem.
    """
    if len(data) == 0:
        raise DataError("the training data has no rows: give a file with at least one labelled text")
    if (wrong := problem.misfit(data.labels, num_labels)) is not None:
        raise DataError(wrong)


def hold_out(data: LabelledSequences, share: float, seed: int) -> tuple[LabelledSequences, LabelledSequences]:
    """A random split: (rows to train on, rows held out).

    Raises:
        DataError: too few rows for both to have one.
    """
    order = np.random.default_rng(seed).permutation(len(data))
    held = round(share * len(data))
    if not 0 < held < len(data):
        raise DataError(
            f"a held-out share of {share:g} of {len(data)} rows leaves {held} of them held out: give more rows or "
            "another share"
        )
    return data.take(np.sort(order[held:])), data.take(np.sort(order[:held]))


class Rows(Dataset[dict[str, Any]]):
    """Packed samples, one dictionary of lists per row, as collators want them."""

    def __init__(self, data: LabelledSequences, target_logits: Tensor | None = None) -> None:
        """Rows of `data`; each with its row of `target_logits`, (N, C) float32, if there are any."""
        self._data = data
        self._targets = target_logits

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        one = self._data.tokens.sequence(i)
        row: dict[str, Any] = {"input_ids": one.input_ids.tolist(), "labels": self._data.labels[i].tolist()}
        if one.token_type_ids is not None:
            row["token_type_ids"] = one.token_type_ids.tolist()
        if self._targets is not None:
            row["target_logits"] = self._targets[i].tolist()
        return row

    @property
    def lengths(self) -> IntArray:
        """(N,) tokens of each row."""
        return self._data.tokens.layout.lengths


class LengthGrouped(Sampler[int]):
    """Row numbers in an order whose batches have like lengths: on short texts half a random batch is padding.

    Rows are shuffled, sorted within windows of 50 batches, and the batches shuffled again, so that long and short
    ones mix. The order follows from seed and epoch alone: a resumed training, and every process of many, draws
    the same one.
    """

    _WINDOW_BATCHES = 50

    def __init__(self, lengths: IntArray, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self._seed, self.epoch))
        order = rng.permutation(len(self))
        window = self._WINDOW_BATCHES * self._batch_size
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            order[start : start + window] = rows[np.argsort(self._lengths[rows], kind="stable")]
        # A batch that is not full comes last, or the batches after it would straddle two.
        full = len(order) - len(order) % self._batch_size
        batches = rng.permutation(order[:full].reshape(-1, self._batch_size))
        yield from batches.ravel().tolist()
        yield from order[full:].tolist()
