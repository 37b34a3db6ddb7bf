"""A queue of samples that wait to enter a layer, counted in tokens.

First in, first out, so that no sample starves. Knows nothing of the other layers.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from pipeline.engine.batch import Chosen, SampleBatch

_FULL_SHARE = 15 / 16


class LayerBuffer:
    """Samples waiting before one layer.

    What comes in was started while the buffer was not full: with one micro-batch under way at a time it never holds
    two micro-batches of tokens, with k under way never k + 1. That is the scheduler's rule, and what bounds memory: at
    one micro-batch more, for the oldest chunk is kept whole until the last of it is taken. Chunks that lie in their
    micro-batch still (`SampleBatch.keep`) are at least two thirds of it, so that they take half as much again at most.
    """

    def __init__(self, micro_batch_tokens: int) -> None:
        self._micro_batch_tokens = micro_batch_tokens
        self._chunks: deque[SampleBatch | Chosen] = deque()
        self._taken = 0  # samples of the first chunk that have left already
        self.tokens = 0
        self.samples = 0
        self.peak_tokens = 0

    def __len__(self) -> int:
        return self.samples

    @property
    def is_full(self) -> bool:
        """Whether a micro-batch waits that is worth running: 15/16 of its tokens, for a last sample may not fit.

        Waiting for the rest would cut every micro-batch anew that nobody has left, and copy its states at each layer.
        """
        return self.tokens >= _FULL_SHARE * self._micro_batch_tokens

    def put(self, batch: SampleBatch | Chosen) -> None:
        """Append samples."""
        if not len(batch):
            return
        self._chunks.append(batch)
        self.samples += len(batch)
        self.tokens += batch.layout.total_tokens
        self.peak_tokens = max(self.peak_tokens, self.tokens)

    def put_back(self, batch: SampleBatch) -> None:
        """Return samples that were taken and could not be run: they are the next to be taken."""
        if self._taken:  # the first chunk was left in the middle: split it there
            rest = self._chunks.popleft()
            self._chunks.appendleft(rest.slice(self._taken, len(rest)))
            self._taken = 0
        self._chunks.appendleft(batch)
        self.samples += len(batch)
        self.tokens += batch.layout.total_tokens

    def shrink(self, micro_batch_tokens: int) -> None:
        """From now on, take at most this many tokens at a time, or as few as before."""
        self._micro_batch_tokens = min(self._micro_batch_tokens, micro_batch_tokens)

    @property
    def micro_batch_tokens(self) -> int:
        """Most tokens that are taken at a time, but for a sample that is longer."""
        return self._micro_batch_tokens

    def take(self) -> SampleBatch:
        """Remove the oldest samples that fit into one micro-batch, at least one; returned sorted by length.

        Where there is no memory to put them together, they stay.
        """
        parts: list[SampleBatch | Chosen] = []
        room, start, emptied = max(self._micro_batch_tokens, self._first_length()), self._taken, 0
        for chunk in self._chunks:
            offsets = chunk.layout.offsets
            stop = int(np.searchsorted(offsets, offsets[start] + room, side="right")) - 1
            if stop == start:
                break
            parts.append(chunk.slice(start, stop))
            room -= parts[-1].layout.total_tokens
            if stop < len(chunk):
                start = stop
                break
            start, emptied = 0, emptied + 1
        batch = SampleBatch.form(parts)
        for _ in range(emptied):
            self._chunks.popleft()
        self._taken = start
        self.samples -= len(batch)
        self.tokens -= batch.layout.total_tokens
        return batch

    def _first_length(self) -> int:
        return int(self._chunks[0].layout.lengths[self._taken]) if self._chunks else 0
