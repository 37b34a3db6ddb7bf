"""Ours: the packed engine at full depth, with exits and regrouping, and with exits but without regrouping.

All run the same encoder over the same tokens. Knows nothing of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deebert.cost import ModelShape
from deebert.encoder import PackedEncoder
from deebert.exit_policy import ExitPolicy
from deebert.packing import PackedTokens
from jobs.benchmarks.side_by_side import SideBySide
from pipeline.engine import Engine, EngineConfig, EngineStats, Exits
from pipeline.engine.batch import SampleBatch
from pipeline.engine.budget import under_way
from pipeline.engine.layer_buffer import LayerBuffer
from pipeline.engine.runner import Runner, Step
from pipeline.engine.stats import StatsCounter


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The answers of one pass over the workload, and the work it counted."""

    predictions: npt.NDArray[np.int64]
    """(N,) label ids, in input order."""
    layer_tokens: int
    """Σ over layers of tokens run, padding included."""
    layer_squared_tokens: int
    """Σ over layers and sequences of squared length as run: what attention costs."""
    off_ramp_samples: int
    """Off-ramps (and final classifiers) computed."""
    steps: int
    """Batches run through a layer, summed over layers."""
    exit_layers: npt.NDArray[np.int64] | None = None
    """(N,) 1-based (0: after the embeddings), of contenders that can exit."""

    def encoder_flops(self, shape: ModelShape) -> float:
        """FLOPs of the transformer layers: matrix products and attention."""
        return shape.layer_flops(self.layer_tokens, self.layer_squared_tokens)

    def work(self, shape: ModelShape) -> dict[str, Any]:
        """JSON-ready."""
        flops = self.encoder_flops(shape) + shape.off_ramp_flops(self.off_ramp_samples)
        return {
            "layer_tokens": self.layer_tokens,
            "flops": float(f"{flops:.6g}"),
            "steps": self.steps,
            "off_ramp_samples": self.off_ramp_samples,
            "mean_exit_layer": None if self.exit_layers is None else round(float(self.exit_layers.mean()), 4),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """One way to run the packed encoder over the workload."""

    encoder: PackedEncoder
    tokens: PackedTokens
    micro_batch_tokens: int
    make_policy: Callable[[], ExitPolicy]
    """A policy for one pass: scripted ones count as they go."""
    regroups: bool = True
    under_way: int | None = None
    """Micro-batches started before the oldest is waited for; None: as many as suit the device (`EngineConfig`)."""

    def __call__(self) -> Outcome:
        """Run every sample once."""
        run = self._regrouping if self.regroups else self._shrinking
        predictions = np.empty(len(self.tokens), np.int64)
        exit_layers = np.full(len(self.tokens), -1, np.int64)
        stats = run(_keep_answers(predictions, exit_layers))
        assert (exit_layers >= 0).all()  # every sample left, once
        return Outcome(
            predictions=predictions,
            layer_tokens=stats.layer_tokens,
            layer_squared_tokens=sum(stats.squared_tokens),
            off_ramp_samples=sum(stats.off_ramp_samples),
            steps=sum(stats.steps),
            exit_layers=exit_layers,
        )

    def _regrouping(self, keep: Callable[[Exits], None]) -> EngineStats:
        config = EngineConfig(micro_batch_tokens=self.micro_batch_tokens, under_way=self.under_way)
        engine = Engine(self.encoder, self.make_policy(), config)
        engine.submit(np.arange(len(self.tokens)), self.tokens)
        for exits in engine.drain():
            keep(exits)
        return engine.stats

    def _shrinking(self, keep: Callable[[Exits], None]) -> EngineStats:
        """Each micro-batch runs on alone, smaller after every off-ramp: exits as others do them in batches.

        As many are under way, by turns, as when regrouping: what is gained by that is not regrouping's.
        """
        most = self.under_way or under_way(self.encoder.device)
        runner = Runner(self.encoder, self.make_policy())
        counter = StatsCounter(self.encoder.num_layers)
        waiting = LayerBuffer(self.micro_batch_tokens)
        waiting.put(SampleBatch.from_tokens(np.arange(len(self.tokens)), self.tokens))
        steps: deque[Step] = deque()
        while len(waiting) or steps:
            while len(waiting) and len(steps) < most:
                steps.append(runner.start(runner.admission, waiting.take()))
            step = steps.popleft()
            exits, survivors = runner.finish(step, counter)
            keep(exits)
            if survivors is not None:
                steps.append(runner.start(runner.segments[step.first] + 1, SampleBatch.form([survivors])))
        return counter.snapshot()


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """A contender that shares the workload out among replicas of itself, which run side by side."""

    parts: Sequence[Callable[[], Outcome]]
    """Part i answers every k-th sample from the i-th on."""
    together: SideBySide

    def __call__(self) -> Outcome:
        """Run every sample once."""
        done = self.together(self.parts)
        layers = [one.exit_layers for one in done if one.exit_layers is not None]
        return Outcome(
            predictions=_interleaved([one.predictions for one in done]),
            layer_tokens=sum(one.layer_tokens for one in done),
            layer_squared_tokens=sum(one.layer_squared_tokens for one in done),
            off_ramp_samples=sum(one.off_ramp_samples for one in done),
            steps=sum(one.steps for one in done),
            exit_layers=_interleaved(layers) if layers else None,
        )


def every_kth(tokens: PackedTokens, first: int, k: int) -> PackedTokens:
    """The part of the samples that one of `k` replicas runs."""
    return tokens.take(np.arange(first, len(tokens), k))


def _interleaved(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The inverse of `every_kth`, of answers."""
    whole = np.empty(sum(map(len, parts)), np.int64)
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part
    return whole


def _keep_answers(
    predictions: npt.NDArray[np.int64], exit_layers: npt.NDArray[np.int64]
) -> Callable[[Exits], None]:
    def keep(exits: Exits) -> None:
        predictions[exits.sample_ids] = exits.logits.argmax(axis=1)
        exit_layers[exits.sample_ids] = exits.exit_layer

    return keep
