"""Samples on their way through the layers: who they are, where their tokens lie, and the tokens' tensors.

The same form before the embeddings (token ids) and after them (states), so that every buffer works alike.
Knows nothing of layers, policies or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deebert import native
from deebert.packing import IntArray, PackedTokens, SequenceLayout, new_rows

# Of a batch's tokens. What stays where it lies keeps the whole batch in memory; copied at once, it is copied twice.
_LEAST_LEFT_IN_PLACE = 2 / 3


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleBatch:
    """N samples, packed."""

    sample_ids: IntArray
    """(N,) int64: the caller's names for the samples."""
    layout: SequenceLayout
    token_rows: tuple[Tensor, ...]
    """Tensors with one row per token: token ids (and types) at admission, states (T, H) after."""

    @classmethod
    def from_tokens(cls, sample_ids: IntArray, tokens: PackedTokens) -> SampleBatch:
        """Samples that no layer has seen."""
        types = () if tokens.token_type_ids is None else (tokens.token_type_ids,)
        return cls(sample_ids=sample_ids, layout=tokens.layout, token_rows=(tokens.input_ids, *types))

    def to_tokens(self) -> PackedTokens:
        """The inverse of `from_tokens`."""
        input_ids, *types = self.token_rows
        return PackedTokens(
            input_ids=input_ids, token_type_ids=types[0] if types else None, layout=self.layout
        )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def slice(self, start: int, stop: int) -> SampleBatch:
        """Samples `start`..`stop` (exclusive), sharing memory with this batch."""
        if start == 0 and stop == len(self):
            return self
        rows = slice(int(self.layout.offsets[start]), int(self.layout.offsets[stop]))
        return SampleBatch(
            sample_ids=self.sample_ids[start:stop],
            layout=SequenceLayout.of(self.layout.lengths[start:stop], self._device),
            token_rows=tuple(t[rows] for t in self.token_rows),
        )

    def keep(self, samples: IntArray) -> SampleBatch | Chosen:
        """The samples with these indices, in this order.

        Where they are most of the batch they stay where they lie, and are copied when their next micro-batch is formed
        (`form`); else now.
        """
        chosen = Chosen(of=self, samples=samples)
        stays = chosen.layout.total_tokens >= _LEAST_LEFT_IN_PLACE * self.layout.total_tokens
        return chosen if stays and _gathers([self]) else chosen.copy()

    @property
    def first_rows(self) -> IntArray:
        """(N,) the first row of each sample."""
        return self.layout.offsets[:-1]

    @staticmethod
    def form(parts: Sequence[SampleBatch | Chosen]) -> SampleBatch:
        """All samples, shortest first: neighbours of equal length share one attention call."""
        if len(parts) == 1 and isinstance(parts[0], SampleBatch) and _is_sorted(parts[0].layout.lengths):
            return parts[0]
        if not _gathers([part.of if isinstance(part, Chosen) else part for part in parts]):
            copies = [part.copy() if isinstance(part, Chosen) else part for part in parts]
            whole = SampleBatch.concat(copies)
            lengths = whole.layout.lengths
            return whole if _is_sorted(lengths) else Chosen(of=whole, samples=_by_length(lengths)).copy()
        lengths = np.concatenate([part.layout.lengths for part in parts])
        return _gathered(parts, lengths, _by_length(lengths))

    @staticmethod
    def concat(batches: Sequence[SampleBatch]) -> SampleBatch:
        """All samples, in order."""
        if len(batches) == 1:
            return batches[0]
        return SampleBatch(
            sample_ids=np.concatenate([b.sample_ids for b in batches]),
            layout=SequenceLayout.of(np.concatenate([b.layout.lengths for b in batches]), batches[0]._device),
            token_rows=tuple(
                torch.cat(rows, out=new_rows(rows[0], sum(map(len, rows))))
                for rows in zip(*(b.token_rows for b in batches), strict=True)
            ),
        )

    @property
    def _device(self) -> torch.device:
        return self.token_rows[0].device


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Some samples of a batch, where they lie in it."""

    of: SampleBatch
    samples: IntArray
    """(N,) which."""

    @cached_property
    def layout(self) -> SequenceLayout:
        """Where they will lie."""
        return SequenceLayout.of(self.of.layout.lengths[self.samples], self.of.layout.device)

    @property
    def sample_ids(self) -> IntArray:
        """(N,) int64."""
        return self.of.sample_ids[self.samples]

    @property
    def first_rows(self) -> IntArray:
        """(N,) the first row of each sample, in the batch."""
        return self.of.layout.offsets[self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def slice(self, start: int, stop: int) -> Chosen:
        """Samples `start`..`stop` (exclusive) of them."""
        return Chosen(of=self.of, samples=self.samples[start:stop])

    def copy(self) -> SampleBatch:
        """The same samples in a batch of their own, in this order."""
        if _gathers([self.of]):
            return _gathered([self], self.layout.lengths, np.arange(len(self)))
        index = self.of.layout.token_index(self.samples)
        return SampleBatch(
            sample_ids=self.sample_ids,
            layout=self.layout,
            token_rows=tuple(
                torch.index_select(t, 0, index, out=new_rows(t, len(index))) for t in self.of.token_rows
            ),
        )


def _gathers(wholes: Sequence[SampleBatch]) -> bool:
    return all(native.gathers(rows) for whole in wholes for rows in whole.token_rows)


def _gathered(parts: Sequence[SampleBatch | Chosen], lengths: IntArray, order: IntArray) -> SampleBatch:
    """All samples of the parts, of these lengths, in this order: one copy."""
    wholes, firsts = [], []
    for part in parts:
        wholes.append(part.of if isinstance(part, Chosen) else part)
        firsts.append(part.first_rows)
    columns = []
    for rows in zip(*(whole.token_rows for whole in wholes), strict=True):
        columns.append(new_rows(rows[0], int(lengths.sum())))
        native.gather(list(zip(rows, firsts, strict=True)), lengths, order, columns[-1])
    return SampleBatch(
        sample_ids=np.concatenate([part.sample_ids for part in parts])[order],
        layout=SequenceLayout.of(lengths[order], wholes[0].layout.device),
        token_rows=tuple(columns),
    )


def _is_sorted(lengths: IntArray) -> bool:
    return bool((lengths[:-1] <= lengths[1:]).all())


def _by_length(lengths: IntArray) -> IntArray:
    return np.argsort(lengths, kind="stable")
