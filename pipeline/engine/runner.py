"""Runs one micro-batch through one segment of layers and asks the policy who leaves.

A segment is a stretch of layers that ends with an off-ramp that can fire, or with the last layer; where the
off-ramp on the embeddings can fire, the embeddings are a segment by themselves, layer -1. Inside a segment
nobody can leave, so nothing is regrouped and no off-ramp is computed. The only part of the engine that
touches the model. Knows nothing of buffers or of what runs next.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deebert.encoder import PackedEncoder
from deebert.exit_policy import ExitPolicy, OffRampAnswer
from deebert.packing import IntArray
from deebert.problem import Problem
from pipeline.engine.batch import SampleBatch
from pipeline.engine.stats import StatsCounter


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


class Runner:
    """The model and the policy, as segments."""

    def __init__(self, encoder: PackedEncoder, policy: ExitPolicy) -> None:
        self._encoder = encoder
        self._policy = policy
        self.segments = _segments(encoder, policy)
        """Last layer of each segment by its first, both 0-based, shallowest first; the embeddings alone are -1."""
        self.admission = next(iter(self.segments))
        """The first of the first segment, 0 or -1: where samples come in as token ids."""

    @torch.inference_mode()
    def run(self, first: int, batch: SampleBatch, stats: StatsCounter) -> tuple[Exits, SampleBatch | None]:
        """Run the segment that begins with layer `first` (0-based).

        Args:
            first: one of `segments`.
            batch: token ids at `admission`, else states.
            stats: counts the work.

        Returns:
            The samples that leave, and the survivors, None when there are none.
        """
        if first == self.admission:
            batch = self._embed(batch, stats)
        started = time.perf_counter()
        last, layout, (states,) = self.segments[first], batch.layout, batch.token_rows
        for index in range(max(first, 0), last + 1):
            states = self._encoder.layer(index, states, layout)
        answer = self._encoder.answer(last, states, layout, with_certainty=self._policy.reads_certainty)
        after = SampleBatch(sample_ids=batch.sample_ids, layout=layout, token_rows=(states,))
        exits, survivors = self._split(last + 1, after, answer)
        stats.count_layers(
            first,
            last,
            samples=len(batch),
            tokens=layout.total_tokens,
            squared_tokens=layout.squared_tokens,
            seconds=time.perf_counter() - started,
        )
        return exits, survivors

    def _embed(self, batch: SampleBatch, stats: StatsCounter) -> SampleBatch:
        started = time.perf_counter()
        tokens = batch.to_tokens().to(self._encoder.device)
        states = self._encoder.embed(tokens)
        stats.count_embedding(time.perf_counter() - started)
        return SampleBatch(sample_ids=batch.sample_ids, layout=tokens.layout, token_rows=(states,))

    def _split(
        self, layer: int, batch: SampleBatch, answer: OffRampAnswer
    ) -> tuple[Exits, SampleBatch | None]:
        """Who leaves after `layer` (1-based, 0: the embeddings), and who goes on."""
        if layer == self._encoder.num_layers:
            return self._exits(layer, batch.sample_ids, answer), None
        leaves = self._policy.fires(layer, answer)
        chosen = leaves.cpu().numpy()  # the step's one wait for the device
        if not chosen.any():
            return self._exits(layer, batch.sample_ids[:0], answer.take(slice(0))), batch
        exits = self._exits(layer, batch.sample_ids[chosen], answer.take(leaves))
        return exits, None if chosen.all() else batch.take(np.flatnonzero(~chosen))

    def _exits(self, layer: int, sample_ids: IntArray, answer: OffRampAnswer) -> Exits:
        certainty = answer.certainty
        return Exits(
            sample_ids=sample_ids,
            exit_layer=layer,
            logits=answer.logits.cpu().numpy(),
            entropy=answer.entropy.cpu().numpy(),
            certainty=None if certainty is None else certainty.cpu().numpy(),
            problem=self._encoder.problem,
        )


def _segments(encoder: PackedEncoder, policy: ExitPolicy) -> dict[int, int]:
    """First -> last layer of each segment, 0-based."""
    n = encoder.num_layers
    ends = sorted(layer for layer in encoder.off_ramp_layers if layer == n or policy.can_fire(layer))
    firsts = [min(0, ends[0] - 1), *ends[:-1]]
    return {first: end - 1 for first, end in zip(firsts, ends, strict=True)}
