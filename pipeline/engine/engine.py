"""The engine: text tokens in, answers out, each in the step in which its sample leaves.

`submit` hands over samples, `step` runs one micro-batch through one segment of layers and returns who left.
Survivors wait in the buffer of their next layer until, with survivors of other micro-batches, they fill one
again: that is regrouping, and why early exits save time in batches at all. Pure torch: knows nothing of
Ray, Arrow, files or text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from deebert.encoder import PackedEncoder
from deebert.exit_policy import ExitPolicy
from deebert.packing import PackedTokens
from pipeline.engine.batch import SampleBatch
from pipeline.engine.budget import is_out_of_memory, micro_batch_tokens, under_way
from pipeline.engine.layer_buffer import LayerBuffer
from pipeline.engine.runner import Exits, Runner, Step
from pipeline.engine.scheduler import next_layer
from pipeline.engine.span import Span
from pipeline.engine.stats import EngineStats, StatsCounter
from pipeline.errors import InvariantError, NotFiniteError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine groups samples."""

    micro_batch_tokens: int | None = None
    """Most tokens in one micro-batch; no sample may be longer. None: as many as suit the device and its free memory.
    Halved when the device runs out of memory."""
    under_way: int | None = None
    """Micro-batches started before the oldest is waited for. None: 2 on a GPU, 1 on a CPU."""


def warm_up(encoder: PackedEncoder, policy: ExitPolicy) -> None:
    """Let a device do what it does once (load kernels, make workspaces), so that it is not the first samples' time.

    On a thread of its own: cuBLAS has a handle and a workspace for each, which one that ends leaves to the next.
    """
    engine = Engine(encoder, policy, EngineConfig(micro_batch_tokens=encoder.longest_input))
    engine.submit(np.arange(2), PackedTokens.pack([[1, 1, 1], [1, 1]]))
    # What a model that has diverged says is no number: its rows will say so.
    with suppress(NotFiniteError), ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: list(engine.drain())).result()


class Engine:
    """Runs samples through a model's layers with early exits and regrouping.

    Not thread-safe: one thread submits and steps.
    """

    def __init__(
        self, encoder: PackedEncoder, policy: ExitPolicy, config: EngineConfig | None = None
    ) -> None:
        config = config or EngineConfig()
        self._runner = Runner(encoder, policy)
        self._most_under_way = config.under_way or under_way(encoder.device)
        self.micro_batch_tokens = config.micro_batch_tokens or self._suitable_tokens(encoder)
        """Most tokens in one micro-batch, as configured or chosen."""
        self._buffers = {first: LayerBuffer(self.micro_batch_tokens) for first in self._runner.segments}
        self._admission = self._buffers[self._runner.admission]
        self._under_way: deque[Step] = deque()
        self._stats = StatsCounter(encoder.num_layers)
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Samples submitted that have not left yet."""
        return self._in_flight

    @property
    def waiting_tokens(self) -> int:
        """Tokens submitted that no layer has seen."""
        return self._admission.tokens

    @property
    def wants_input(self) -> bool:
        """Whether less than a full micro-batch waits to be admitted: submit now, or the device may idle.

        Full as in `step`: 15/16 of its tokens.
        """
        return not self._admission.is_full

    @property
    def stats(self) -> EngineStats:
        """Work done so far."""
        return self._stats.snapshot()

    @property
    def peak_buffer_tokens(self) -> dict[int, int]:
        """The most tokens that ever waited before each layer.

        1-based; 0 is the off-ramp on the embeddings. The first is admission, the caller's.
        """
        return {layer + 1: buffer.peak_tokens for layer, buffer in self._buffers.items()}

    def submit(self, sample_ids: npt.NDArray[np.int64], tokens: PackedTokens) -> None:
        """Hand over samples; they start with the next steps.

        Args:
            sample_ids: (N,) int64, one per sample, returned with its answer.
            tokens: N sequences on the host.

        Raises:
            ValueError: a sample is longer than a micro-batch or has no tokens, or ids and sequences differ in number.
        """
        if len(sample_ids) != len(tokens):
            raise ValueError(f"{len(sample_ids)} ids for {len(tokens)} sequences: give one id per sequence")
        # Its off-ramp would read a neighbour's token.
        if (tokens.layout.lengths < 1).any():
            raise ValueError("a sample has no tokens: give each at least one")
        if tokens.max_seqlen > self.micro_batch_tokens:
            raise ValueError(
                f"a sample has {tokens.max_seqlen} tokens but a micro-batch takes "
                f"{self.micro_batch_tokens}: raise micro_batch_tokens or truncate"
            )
        self._admission.put(SampleBatch.from_tokens(sample_ids, tokens))
        self._in_flight += len(sample_ids)

    def step(self, *, drain: bool = False) -> Exits | None:
        """Run one micro-batch through one segment of layers.

        Args:
            drain: run a partly filled micro-batch when no full one (15/16 of its tokens) waits, because no more
                input is at hand.

        Returns:
            Who left in this step (maybe nobody), or None when there was nothing to run.

        Raises:
            InvariantError: samples were lost or doubled.
            NotFiniteError: answers are not finite numbers.
            torch.OutOfMemoryError, MemoryError, RuntimeError: a single sample does not fit into memory
                (`is_out_of_memory`).
        """
        while True:
            self._start(drain=drain)
            if not self._under_way:
                return None
            if (exits := self._finish()) is not None:
                self._check_conservation()
                return exits

    def drain(self) -> Iterator[Exits]:
        """Step until every sample has left."""
        while (exits := self.step(drain=True)) is not None:
            yield exits

    def _suitable_tokens(self, encoder: PackedEncoder) -> int:
        suitable = micro_batch_tokens(
            encoder.device,
            encoder.dtype,
            hidden_size=encoder.hidden_size,
            intermediate_size=encoder.intermediate_size,
            segments=len(self._runner.segments),
        )
        return max(suitable, encoder.longest_input)

    def _start(self, *, drain: bool) -> None:
        while len(self._under_way) < self._most_under_way:
            # What is under way may have survivors that fill a micro-batch: only without it is input at an end.
            layer = next_layer(self._buffers, drain=drain and not self._under_way)
            if layer is None:
                return
            batch: SampleBatch | None = None
            try:
                with Span(self._runner.device) as forming:
                    batch = self._buffers[layer].take()
                self._under_way.append(self._runner.start(layer, batch, forming))
                continue
            except Exception as error:
                is_hopeless = batch is not None and len(batch) == 1 and not self._under_way
                if is_hopeless or not is_out_of_memory(error):
                    raise
            # Behind the handler: with the error goes what the attempt held.
            if batch is not None:
                self._buffers[layer].put_back(batch)
                if len(batch) == 1:
                    return  # what is under way gives its memory back when it is finished
            tokens = self._buffers[layer].micro_batch_tokens if batch is None else batch.layout.total_tokens
            self._shrink(tokens // 2)

    def _finish(self) -> Exits | None:
        """Who leaves the oldest micro-batch under way; None when there was no memory to tell, and it must run again."""
        step = self._under_way.popleft()
        try:
            exits, survivors = self._runner.finish(step, self._stats)
        except Exception as error:
            if len(step) == 1 or not is_out_of_memory(error):
                raise
            exits = None
        if exits is None:
            first, batch = step.first, step.batch
            del step  # and with it the states that it came to
            self._buffers[first].put_back(batch)
            self._shrink(batch.layout.total_tokens // 2)
            return None
        if survivors is not None:
            # Layers are 0-based in here (-1: the embeddings), 1-based wherever users see them. This segment's last
            # layer plus one is the next segment's first, so its buffer is the survivors'.
            self._buffers[self._runner.segments[step.first] + 1].put(survivors)
        self._in_flight -= len(exits)
        return exits

    def _shrink(self, tokens: int) -> None:
        """Make micro-batches smaller for good.

        What did not fit once will not fit again: without remembering, every full micro-batch would fail first.
        """
        log.warning("out of memory: micro-batches have %d tokens from now on", tokens)
        for buffer in self._buffers.values():
            buffer.shrink(tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _check_conservation(self) -> None:
        found = sum(map(len, self._buffers.values())) + sum(map(len, self._under_way))
        if found != self._in_flight:
            raise InvariantError(f"{self._in_flight} samples are in flight but {found} wait or are under way")
