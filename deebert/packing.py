"""Packed sequences: many sequences laid end to end, with no padding between them.

A `SequenceLayout` says where each sequence lies; `PackedTokens` adds token ids. Both keep the lengths on
the host, where scheduling happens, and `cu_seqlens` on the device, where attention reads it, so that
nobody waits for the device to learn a shape. Knows nothing of models, tokenizers or exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.transfer import to_device

IntArray = npt.NDArray[np.int64]
# Of 1, 4, 8 and 16, the fastest for attention on sentences and level on long texts.
_PADDED_TO = 8
_MOST_ROWS_TOGETHER, _SHAPES_AN_OCTAVE = 64, 32
_SAMPLES_TOGETHER = 32


def rows_of_few_shapes(rows: int) -> int:
    """`rows`, rounded up so that few numbers occur: 3 % more at most, to a multiple of 64 rows at most.

    oneDNN builds a kernel for each shape of a product, and survivors regrouped come in ever new numbers.
    """
    together = min(_MOST_ROWS_TOGETHER, 1 << max(0, (rows // _SHAPES_AN_OCTAVE).bit_length() - 1))
    return -(-rows // together) * together


def new_rows(like: Tensor, rows: int) -> Tensor:
    """So many rows as those of `like`, not filled, with room behind them for `rows_of_few_shapes`."""
    return like.new_empty(rows_of_few_shapes(rows), *like.shape[1:])[:rows]


def samples_of_few_shapes(samples: int) -> int:
    """As `rows_of_few_shapes`, of pooled states: those are fewer, and a row costs less than another shape."""
    return -(-samples // _SAMPLES_TOGETHER) * _SAMPLES_TOGETHER


def with_rows_behind(states: Tensor, rows: int) -> Tensor:
    """`states`, (T, H), and behind them rows of anything, so that there are `rows`.

    Where something lies behind them in memory it is that, to be read and not written; else they are copied.
    """
    width = states.shape[1]
    numbers = states.untyped_storage().nbytes() // states.itemsize - states.storage_offset()
    if states.is_contiguous() and numbers >= rows * width:
        return states.as_strided((rows, width), (width, 1))
    return F.pad(states, (0, 0, 0, rows - len(states)))


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceLayout:
    """Where each of N packed sequences lies among `total_tokens` rows."""

    lengths: IntArray
    """(N,) int64, on the host; every length is at least 1."""
    device: torch.device
    """Where the tokens are."""

    @classmethod
    def of(cls, lengths: npt.ArrayLike, device: torch.device | str = "cpu") -> SequenceLayout:
        """The layout of sequences with these lengths, in this order."""
        return cls(lengths=np.asarray(lengths, dtype=np.int64), device=torch.device(device))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32, on the device: sequence i is rows ``cu_seqlens[i]:cu_seqlens[i + 1]``.

        Made when it is first read: most layouts are of slices and concatenations that no layer ever sees.
        """
        with torch.inference_mode(False):  # whoever trains on it may not be the first to read it
            return to_device(torch.from_numpy(self.offsets.astype(np.int32)), self.device)

    @cached_property
    def offsets(self) -> IntArray:
        """(N + 1,) int64: `cu_seqlens` on the host."""
        return _offsets(self.lengths)

    @property
    def total_tokens(self) -> int:
        """Σ of the lengths."""
        return int(self.offsets[-1])

    @cached_property
    def squared_tokens(self) -> int:
        """Σ of the squared lengths: what attention costs."""
        return int(np.square(self.lengths).sum())

    @cached_property
    def max_seqlen(self) -> int:
        """The longest sequence; 0 when there is none."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Maximal runs of neighbours of equal length: (first sequence, number of sequences, length).

        A run is a dense (number, length, …) tensor without a copy.
        """
        return _runs(self.lengths)

    @cached_property
    def padded(self) -> PaddedLayout:
        """The same sequences, each padded to a multiple of a few tokens, so that neighbours of about equal
        length are one dense tensor."""
        return PaddedLayout.of(self)

    def token_index(self, sequences: IntArray) -> Tensor:
        """Row numbers of the tokens of `sequences` (indices), in the order given; (T',) int64, on the device."""
        lengths = self.lengths[sequences]
        ends = np.cumsum(lengths)
        shift = self.offsets[sequences] - (ends - lengths)
        return (_count_there if self.device.type == "cuda" else _count_here)(shift, lengths, self.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedLayout:
    """Where the tokens of packed sequences go when each sequence is padded a little; tensors on the host."""

    runs: tuple[tuple[int, int, int], ...]
    """Like `SequenceLayout.runs`, of the padded lengths."""
    source: Tensor
    """(padded_tokens,) int64: the packed row of each padded row; padding repeats row 0."""
    padding: Tensor
    """int64: the padded rows that are padding."""
    target: Tensor
    """int64: the padded row of each packed row, and row 0 for those that may follow (`rows_of_few_shapes`)."""

    @classmethod
    def of(cls, layout: SequenceLayout) -> PaddedLayout:
        """Pad each sequence of `layout` to a multiple of `_PADDED_TO` tokens."""
        lengths = -(-layout.lengths // _PADDED_TO) * _PADDED_TO
        offsets = _offsets(lengths)
        target = np.repeat(offsets[:-1] - layout.offsets[:-1], layout.lengths) + np.arange(
            layout.total_tokens
        )
        source, is_padding = np.zeros(offsets[-1], np.int64), np.ones(offsets[-1], np.bool_)
        source[target], is_padding[target] = np.arange(layout.total_tokens), False
        return cls(
            runs=_runs(lengths),
            source=torch.from_numpy(source),
            padding=torch.from_numpy(np.flatnonzero(is_padding)),
            target=F.pad(torch.from_numpy(target), (0, rows_of_few_shapes(len(target)) - len(target))),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """Token ids of N sequences, end to end."""

    input_ids: Tensor
    """(total_tokens,) int32."""
    token_type_ids: Tensor | None
    """(total_tokens,) int32, or None where the model has one segment only (all zeros)."""
    layout: SequenceLayout

    @classmethod
    def pack(
        cls, sequences: Sequence[Sequence[int]], token_type_ids: Sequence[Sequence[int]] | None = None
    ) -> PackedTokens:
        """Pack lists of token ids. For small inputs: large ones come packed from the tokenizer."""
        return cls(
            input_ids=_flat(sequences),
            token_type_ids=None if token_type_ids is None else _flat(token_type_ids),
            layout=SequenceLayout.of([len(s) for s in sequences]),
        )

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32."""
        return self.layout.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        """The longest sequence, in tokens."""
        return self.layout.max_seqlen

    def take(self, sequences: npt.ArrayLike) -> PackedTokens:
        """The sequences with these indices, in this order (a copy)."""
        chosen = np.asarray(sequences, dtype=np.int64)
        index = self.layout.token_index(chosen)
        return PackedTokens(
            input_ids=self.input_ids.index_select(0, index),
            token_type_ids=None
            if self.token_type_ids is None
            else self.token_type_ids.index_select(0, index),
            layout=SequenceLayout.of(self.layout.lengths[chosen], self.input_ids.device),
        )

    def slice(self, start: int, stop: int) -> PackedTokens:
        """Sequences `start`..`stop` (exclusive), sharing memory with this one."""
        rows = slice(int(self.layout.offsets[start]), int(self.layout.offsets[stop]))
        return PackedTokens(
            input_ids=self.input_ids[rows],
            token_type_ids=None if self.token_type_ids is None else self.token_type_ids[rows],
            layout=SequenceLayout.of(self.layout.lengths[start:stop], self.input_ids.device),
        )

    def sequence(self, i: int) -> PackedTokens:
        """Sequence `i` alone."""
        return self.slice(i, i + 1)

    @staticmethod
    def concat(parts: Sequence[PackedTokens]) -> PackedTokens:
        """All sequences of `parts`, in order. Parts with and without token types do not mix."""
        if len(parts) == 1:
            return parts[0]
        types = [p.token_type_ids for p in parts if p.token_type_ids is not None]
        if types and len(types) != len(parts):
            raise ValueError("some parts have token_type_ids and others have none: tokenize them alike")
        return PackedTokens(
            input_ids=torch.cat([p.input_ids for p in parts]),
            token_type_ids=torch.cat(types) if types else None,
            layout=SequenceLayout.of(
                np.concatenate([p.layout.lengths for p in parts]), parts[0].input_ids.device
            ),
        )

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same on `device`; copies are asynchronous."""
        types, layout = self.token_type_ids, self.layout
        return PackedTokens(
            input_ids=to_device(self.input_ids, device),
            token_type_ids=None if types is None else to_device(types, device),
            layout=SequenceLayout.of(layout.lengths, device),
        )


def _count_here(shift: IntArray, lengths: IntArray, device: torch.device) -> Tensor:
    """0, 1, 2 …, one for each token, each sequence's shifted by its own number: (Σ lengths,) int64."""
    return torch.from_numpy(np.repeat(shift, lengths) + np.arange(int(lengths.sum()))).to(device)


def _count_there(shift: IntArray, lengths: IntArray, device: torch.device) -> Tensor:
    """The same, counted by the device: the host makes and sends two numbers for each sequence, not one for each token.

    On CPUs it takes three times as long.
    """
    shifts, times = to_device(torch.from_numpy(np.stack((shift, lengths))), device)
    total = int(lengths.sum())  # said, so that nobody waits for the device to count
    shifted = torch.repeat_interleave(shifts, times, output_size=total)
    return shifted.add_(torch.arange(total, device=device))


def _runs(lengths: IntArray) -> tuple[tuple[int, int, int], ...]:
    if not len(lengths):
        return ()
    first = np.concatenate(([0], np.flatnonzero(np.diff(lengths)) + 1))
    count = np.diff(np.append(first, len(lengths)))
    return tuple(zip(first.tolist(), count.tolist(), lengths[first].tolist(), strict=True))


def _offsets(lengths: IntArray) -> IntArray:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))


def _flat(sequences: Sequence[Sequence[int]]) -> Tensor:
    arrays = [np.asarray(s, dtype=np.int32) for s in sequences]
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, np.int32))
