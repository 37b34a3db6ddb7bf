"""Runs micro-batches through segments of layers and asks the policy who leaves.

A segment is a stretch of layers that ends with an off-ramp that can fire, or with the last layer; where the
off-ramp on the embeddings can fire, the embeddings are a segment by themselves, layer -1. Inside a segment
nobody can leave, so nothing is regrouped and no off-ramp is computed. A GPU works on while the host does
something else, so a step has two halves: `start` queues the work, `finish` waits for it. Layers are counted from
0 in here and -1 are the embeddings; the policy and `Exits` count from 1, where 0 are the embeddings. The only part
of the engine that touches the model. Knows nothing of buffers or of what runs next.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deebert.encoder import PackedEncoder
from deebert.exit_policy import ExitPolicy, OffRampAnswer
from deebert.packing import IntArray
from deebert.problem import Problem
from deebert.transfer import to_host
from pipeline.engine.batch import Chosen, SampleBatch
from pipeline.engine.span import Span
from pipeline.engine.stats import StatsCounter
from pipeline.errors import NotFiniteError


@dataclass(frozen=True, kw_only=True, eq=False)
class Exits:
    """Samples that left in one step, all after the same layer. Arrays are on the host."""

    sample_ids: IntArray
    """(K,) int64."""
    exit_layer: int
    """1-based; 0: after the embeddings."""
    logits: npt.NDArray[np.float32]
    """(K, C), of the off-ramp that answered."""
    entropy: npt.NDArray[np.float32]
    """(K,), nats; NaN where the problem has none."""
    certainty: npt.NDArray[np.float32] | None
    """(K,), between 0 and 1, where the policy reads it."""
    problem: Problem

    @cached_property
    def predictions(self) -> npt.NDArray[Any]:
        """What the logits say: (K,) ids, (K, C) bool, or (K,) numbers; see `Problem.predict`."""
        return np.asarray(self.problem.predict(torch.from_numpy(self.logits)))

    @cached_property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """(K, C): of the labels, or the value itself of a regression; see `Problem.scores`."""
        return np.asarray(self.problem.scores(torch.from_numpy(self.logits)))

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A micro-batch under way through a segment; the device may not have done it yet."""

    first: int
    """First layer of the segment, 0-based."""
    batch: SampleBatch
    """What went in."""
    after: SampleBatch
    """The same samples with their states behind the segment's last layer."""
    answer: OffRampAnswer
    """Of that layer's off-ramp, on the host, valid when `spans` are over; so is `leaves`."""
    leaves: Tensor | None
    """(N,) bool; None behind the last layer, where all leave."""
    embedding: Span | None
    """Time spent in the embeddings, where the segment begins with them."""
    spans: tuple[Span, ...]
    """Time spent putting the micro-batch together, and in the layers."""

    def __len__(self) -> int:
        return len(self.batch)


class Runner:
    """The model and the policy, as segments."""

    def __init__(self, encoder: PackedEncoder, policy: ExitPolicy) -> None:
        self._encoder = encoder
        self._policy = policy
        self._gathers: deque[tuple[int, int, Span]] = deque()
        """Of survivors, by first and last layer of their segment: on a GPU not over yet."""
        self.segments = _segments(encoder, policy)
        """Last layer of each segment by its first, both 0-based, shallowest first; the embeddings alone are -1."""
        self.admission = next(iter(self.segments))
        """The first of the first segment, 0 or -1: where samples come in as token ids."""

    @property
    def device(self) -> torch.device:
        """That runs the model."""
        return self._encoder.device

    @torch.inference_mode()
    def start(self, first: int, batch: SampleBatch, forming: Span | None = None) -> Step:
        """Send a micro-batch through the segment that begins with layer `first` (0-based); wait for nothing.

        Args:
            first: one of `segments`.
            batch: token ids at `admission`, else states.
            forming: time spent putting it together, where it counts.
        """
        embedding, went_in = None, batch
        if first == self.admission:
            with Span(self.device) as embedding:
                batch = self._embed(batch)
        last, layout, (states,) = self.segments[first], batch.layout, batch.token_rows
        with Span(self.device) as layers:
            states = self._encoder.layers(max(first, 0), last, states, layout)
            answer = self._encoder.answer(last, states, layout, with_certainty=self._policy.reads_certainty)
            is_last = last + 1 == self._encoder.num_layers
            leaves = None if is_last else to_host(self._policy.fires(last + 1, answer))
            answer = answer.to_host()
        return Step(
            first=first,
            batch=went_in,
            after=SampleBatch(sample_ids=batch.sample_ids, layout=layout, token_rows=(states,)),
            answer=answer,
            leaves=leaves,
            embedding=embedding,
            spans=(layers,) if forming is None else (forming, layers),
        )

    @torch.inference_mode()
    def finish(self, step: Step, stats: StatsCounter) -> tuple[Exits, SampleBatch | Chosen | None]:
        """Wait for a micro-batch and learn who leaves.

        Args:
            step: what `start` gave.
            stats: counts the work.

        Returns:
            The samples that leave, and the survivors, None when there are none.

        Raises:
            NotFiniteError: those that leave have answers that are not finite numbers.
        """
        seconds = sum(span.seconds() for span in step.spans)
        started = time.perf_counter()
        last, after, layout = self.segments[step.first], step.after, step.after.layout
        leaves = None if step.leaves is None else step.leaves.numpy()
        leaving = len(after) if leaves is None else np.count_nonzero(leaves)
        survivors: SampleBatch | Chosen | None = None
        if leaving == len(after):
            exits = self._exits(last + 1, after, step.answer, slice(None))
        elif not leaving:
            exits = self._exits(last + 1, after, step.answer, slice(0))
            survivors = after
        else:
            assert leaves is not None
            exits = self._exits(last + 1, after, step.answer, np.flatnonzero(leaves))
            with Span(self.device) as gather:
                survivors = after.keep(np.flatnonzero(~leaves))
            self._gathers.append((step.first, last, gather))
        # A GPU meanwhile is at the next micro-batch: the host's time is not its own.
        if self.device.type == "cuda":
            self._count_gathers(stats)
        else:
            self._gathers.clear()
            seconds += time.perf_counter() - started
        if step.embedding is not None:
            stats.count_embedding(step.embedding.seconds())
        stats.count_layers(
            step.first,
            last,
            samples=len(after),
            tokens=layout.total_tokens,
            squared_tokens=layout.squared_tokens,
            seconds=seconds,
        )
        return exits, survivors

    def _count_gathers(self, stats: StatsCounter) -> None:
        """Those that the device has come to the end of: nobody waits for them."""
        while self._gathers and self._gathers[0][2].is_over():
            first, last, gather = self._gathers.popleft()
            stats.count_seconds(first, last, gather.seconds())

    def _embed(self, batch: SampleBatch) -> SampleBatch:
        tokens = batch.to_tokens().to(self.device)
        states = self._encoder.embed(tokens)
        return SampleBatch(sample_ids=batch.sample_ids, layout=tokens.layout, token_rows=(states,))

    def _exits(self, layer: int, batch: SampleBatch, answer: OffRampAnswer, who: IntArray | slice) -> Exits:
        certainty, logits = answer.certainty, answer.logits.numpy()[who]
        # The largest of numbers that are none is the first: a label like any other.
        if not np.isfinite(logits).all():
            raise NotFiniteError(_not_finite(layer, self._encoder.dtype))
        return Exits(
            sample_ids=batch.sample_ids[who],
            exit_layer=layer,
            logits=logits,
            entropy=answer.entropy.numpy()[who],
            certainty=None if certainty is None else certainty.numpy()[who],
            problem=self._encoder.problem,
        )


def _not_finite(layer: int, dtype: torch.dtype) -> str:
    where = f"layer {layer}" if layer else "the embeddings"
    # bfloat16 reaches as far as float32: what is too large for one of them is so for the other.
    remedy = "" if dtype in (torch.float32, torch.bfloat16) else "classify in float32 or bfloat16, or "
    name = str(dtype).removeprefix("torch.")
    return f"the model's answers after {where} are not finite numbers in {name}: {remedy}train it again"


def _segments(encoder: PackedEncoder, policy: ExitPolicy) -> dict[int, int]:
    """First -> last layer of each segment, 0-based."""
    n = encoder.num_layers
    ends = sorted(layer for layer in encoder.off_ramp_layers if layer == n or policy.can_fire(layer))
    firsts = [min(0, ends[0] - 1), *ends[:-1]]
    return {first: end - 1 for first, end in zip(firsts, ends, strict=True)}
