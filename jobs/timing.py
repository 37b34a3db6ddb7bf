"""Seconds that contenders take for the same samples: one sample at a time, and through the engine.

One at a time is how the paper measures. Contenders run in turn, so that all see the same machine in the same
minutes: sample by sample one at a time, pass by pass through the engine. Their order is reversed in every
other round, and the median round counts. Knows nothing of texts, labels or scores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from deebert.cost import mean_exit_layer
from deebert.encoder import PackedEncoder
from deebert.exit_policy import ExitPolicy
from deebert.packing import IntArray, PackedTokens
from pipeline.engine import Engine

WARM_UP_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model and when its samples leave."""

    name: str
    encoder: PackedEncoder
    policy: ExitPolicy


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Seconds of one way of running."""

    samples: int
    seconds: float
    """All samples; the median round."""
    mean_exit_layer: float
    """Of these very samples."""
    full_depth_seconds: float | None = None
    """Full depth's in the same rounds, where those were before the rounds of the other contenders of its set."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one contender took."""

    name: str
    rounds: int
    alone: Measure
    """One sample after the other."""
    engine: Measure
    """All samples handed to the engine at once."""


def choose_samples(tokens: PackedTokens, most: int) -> PackedTokens:
    """At most `most` samples, drawn evenly from all, in their order."""
    if len(tokens) <= most:
        return tokens
    return tokens.take(np.linspace(0, len(tokens) - 1, most).round().astype(np.int64))


def measure(
    contenders: Sequence[Contender],
    alone: PackedTokens,
    engine: PackedTokens,
    *,
    rounds: int,
) -> tuple[Timing, ...]:
    """Run every contender `rounds` times, in turn, after a short warm-up.

    Args:
        contenders: names differ.
        alone: samples to run one by one, on the host.
        engine: samples for the engine: many micro-batches of them, or it has nobody to regroup.
        rounds: at least 1.
    """
    for c in contenders:
        _alone((c,), alone.slice(0, min(WARM_UP_SAMPLES, len(alone))))
        _through_engine(c, engine.slice(0, min(WARM_UP_SAMPLES, len(engine))))
    one_by_one: dict[str, list[_Run]] = {c.name: [] for c in contenders}
    together: dict[str, list[_Run]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        order = tuple(contenders) if number % 2 == 0 else tuple(reversed(contenders))
        for name, run in _alone(order, alone).items():
            one_by_one[name].append(run)
        for c in order:
            together[c.name].append(_through_engine(c, engine))
    return tuple(
        Timing(
            name=c.name,
            rounds=rounds,
            alone=_measure(one_by_one[c.name]),
            engine=_measure(together[c.name]),
        )
        for c in contenders
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    seconds: float
    exit_layers: IntArray
    """(N,), 1-based; 0: after the embeddings."""


def _measure(runs: Sequence[_Run]) -> Measure:
    layers = runs[0].exit_layers
    mean = mean_exit_layer(np.bincount(layers).tolist())
    return Measure(samples=len(layers), seconds=median(run.seconds for run in runs), mean_exit_layer=mean)


@torch.inference_mode()
def _alone(contenders: Sequence[Contender], tokens: PackedTokens) -> dict[str, _Run]:
    """Each sample by every contender before the next sample: a slow moment of the machine meets all alike."""
    seconds = dict.fromkeys((c.name for c in contenders), 0.0)
    layers: dict[str, list[int]] = {c.name: [] for c in contenders}
    for i in range(len(tokens)):
        sample = tokens.sequence(i)
        for c in contenders:
            started = time.perf_counter()
            layers[c.name].append(_exit_layer(c.encoder, c.policy, sample))
            seconds[c.name] += time.perf_counter() - started
    return {
        name: _Run(seconds=seconds[name], exit_layers=np.array(found, np.int64))
        for name, found in layers.items()
    }


def _exit_layer(encoder: PackedEncoder, policy: ExitPolicy, sample: PackedTokens) -> int:
    sample = sample.to(encoder.device)
    states = encoder.embed(sample)
    for layer in range(encoder.num_layers):
        if layer > 0:
            states = encoder.layer(layer - 1, states, sample.layout)
        if layer in encoder.off_ramp_layers and policy.can_fire(layer):
            answer = encoder.answer(layer - 1, states, sample.layout, with_certainty=policy.reads_certainty)
            if bool(policy.fires(layer, answer)):
                return layer
    last = encoder.num_layers
    states = encoder.layer(last - 1, states, sample.layout)
    encoder.off_ramp(last - 1, states, sample.layout).cpu()
    return last


def _through_engine(contender: Contender, tokens: PackedTokens) -> _Run:
    engine = Engine(contender.encoder, contender.policy)
    layers = np.zeros(len(tokens), np.int64)
    started = time.perf_counter()
    engine.submit(np.arange(len(tokens)), tokens)
    for exits in engine.drain():
        layers[exits.sample_ids] = exits.exit_layer
    return _Run(seconds=time.perf_counter() - started, exit_layers=layers)
