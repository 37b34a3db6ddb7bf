"""Samples on their way through the layers: who they are, where their tokens lie, and the tokens' tensors.

The same form before the embeddings (token ids) and after them (states), so that every buffer works alike.
Knows nothing of layers, policies or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deebert.packing import IntArray, PackedTokens, SequenceLayout, new_rows


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

    def take(self, samples: IntArray) -> SampleBatch:
        """The samples with these indices, in this order (a copy)."""
        index = self.layout.token_index(samples)
        return SampleBatch(
            sample_ids=self.sample_ids[samples],
            layout=SequenceLayout.of(self.layout.lengths[samples], self._device),
            token_rows=tuple(
                torch.index_select(t, 0, index, out=new_rows(t, len(index))) for t in self.token_rows
            ),
        )

    def sorted_by_length(self) -> SampleBatch:
        """The same samples, shortest first: neighbours of equal length share one attention call."""
        lengths = self.layout.lengths
        if bool((lengths[:-1] <= lengths[1:]).all()):
            return self
        return self.take(np.argsort(lengths, kind="stable"))

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
