"""Labelled samples as training reads them: checked, split, in rows, in batches of like lengths, and padded.

Of several processes each reads its share of every batch, rows p, p + P, p + 2P of it: none is read twice, so that a
share may be a row short, or empty. Knows nothing of models or losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from deebert.errors import DataError
from deebert.evaluation import LabelledSequences
from deebert.packing import IntArray
from deebert.problem import SINGLE_LABEL, Problem
from deebert.training.processes import processes


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
    def labels(self) -> Tensor:
        """(N, ...): see `LabelledSequences.labels`."""
        return self._data.labels

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


SAMPLES = "samples"
"""How many rows of a padded batch count: all, but none where a process has no share and gets a row to compute with."""


def own_batches(
    rows: Rows, order: Iterable[int], batch_size: int, tokenizer: PreTrainedTokenizerBase
) -> DataLoader[dict[str, Any]]:
    """This process's share of each batch, padded.

    Args:
        rows: those of all processes.
        order: of their numbers, the same in every process.
        batch_size: rows of a batch, over all processes.
        tokenizer: says what to pad with. Always on the right, wherever it pads otherwise: off-ramps read the first
            token, and positions count from it.
    """

    def padded(share: list[dict[str, Any]]) -> dict[str, Any]:
        batch = pad_without_fast_tokenizer_warning(
            tokenizer, share or [rows[0]], padding=True, padding_side="right", return_tensors="pt"
        )
        return {**batch, SAMPLES: len(share)}

    return DataLoader(rows, batch_sampler=_Shares(order, len(rows), batch_size), collate_fn=padded)


class _Shares(Sampler[list[int]]):
    """Row numbers of this process's share of each batch."""

    def __init__(self, order: Iterable[int], num_rows: int, batch_size: int) -> None:
        self._order = order
        self._num_rows = num_rows
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        world, order = processes(), list(self._order)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            yield batch[world.process_index :: world.num_processes]
