"""Traces: what every off-ramp says of every sample of a labelled set, and what follows from it.

A trace is computed once at full depth; every threshold's accuracy, mean exit layer and saving can then be
read off it without running the model again. Knows nothing of files, commands or pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deebert.cost import ModelShape, expected_saving, mean_exit_layer
from deebert.encoder import PackedEncoder
from deebert.exit_policy import EntropyThreshold, ExitPolicy, entropy
from deebert.packing import IntArray, PackedTokens
from deebert.windows import first_windows, text_means

Metric = Callable[[Tensor, Tensor], float]
"""Labels (N,) int64 and predictions (N,) int64 -> a score between 0 and 1; larger is better."""


def accuracy(labels: Tensor, predictions: Tensor) -> float:
    """Share of predictions that are right."""
    return float((predictions == labels).float().mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSequences:
    """Tokenized samples and their labels."""

    tokens: PackedTokens
    labels: Tensor
    """(N,) int64; (M,) with `windows`."""
    windows: IntArray | None = None
    """(M,) windows of each of M texts, whose N sequences lie text by text; None: a text is a sequence."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: npt.ArrayLike) -> LabelledSequences:
        """The samples with these indices; not of texts in windows."""
        assert self.windows is None
        chosen = np.asarray(rows, dtype=np.int64)
        return LabelledSequences(
            tokens=self.tokens.take(chosen), labels=self.labels[torch.from_numpy(chosen)]
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Every off-ramp's logits for a sample set; the final classifier is the last."""

    layers: tuple[int, ...]
    """1-based layers of the off-ramps, 0 for the embeddings; the last one is the model's depth."""
    logits: Tensor
    """(R, N, C) float32."""
    lengths: IntArray
    """(N,) tokens."""
    windows: IntArray | None = None
    """(M,) where the N samples are the windows of M texts, text by text: of how many each text is the mean."""

    @property
    def num_layers(self) -> int:
        """The model's depth."""
        return self.layers[-1]


@dataclass(frozen=True, kw_only=True)
class OperatingPointScore:
    """One policy on one labelled trace."""

    policy: ExitPolicy
    score: float
    """By the task's metric; accuracy where none was named."""
    accuracy: float
    mean_exit_layer: float
    """Of samples: each window counts by itself."""
    saving: float
    """Share of layer work saved (paper, Eq. 2)."""
    exit_histogram: tuple[int, ...]
    """n + 1 entries: entry i counts samples that left after layer i, entry 0 after the embeddings."""

    @property
    def speed_up(self) -> float:
        """Layer speed-up: depth over mean exit layer; infinite where everybody left after the embeddings."""
        depth = len(self.exit_histogram) - 1
        return depth / self.mean_exit_layer if self.mean_exit_layer else float("inf")


def length_sorted_batches(
    tokens: PackedTokens, micro_batch_tokens: int
) -> Iterator[tuple[Tensor, PackedTokens]]:
    """Micro-batches of like lengths: (their rows' indices, the packed rows), each within the budget.

    A sequence longer than the budget is a micro-batch of its own.
    """
    lengths = tokens.layout.lengths
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        # Sorted ascending: the first k sequences fit when their sum does; at least one always goes.
        total = np.cumsum(lengths[order[start : start + micro_batch_tokens]])
        stop = start + max(1, int(np.searchsorted(total, micro_batch_tokens, side="right")))
        rows = order[start:stop]
        yield torch.from_numpy(rows), tokens.take(rows)
        start = stop


def trace(
    encoder: PackedEncoder,
    tokens: PackedTokens,
    *,
    windows: IntArray | None = None,
    micro_batch_tokens: int = 4096,
) -> Trace:
    """Run all samples at full depth and keep what every off-ramp said; `windows` as in `Trace`."""
    layers = tuple(sorted(encoder.off_ramp_layers))
    place = {layer: i for i, layer in enumerate(layers)}
    logits = torch.empty(len(layers), len(tokens), encoder.num_labels)
    for rows, batch in length_sorted_batches(tokens, micro_batch_tokens):
        batch = batch.to(encoder.device)
        states = encoder.embed(batch)
        for layer in range(encoder.num_layers + 1):
            if layer > 0:
                states = encoder.layer(layer - 1, states, batch.layout)
            if layer in place:
                logits[place[layer], rows] = encoder.off_ramp(layer - 1, states, batch.layout).cpu()
    return Trace(layers=layers, logits=logits, lengths=tokens.layout.lengths, windows=windows)


def off_ramp_accuracy(trace: Trace, labels: Tensor) -> tuple[float, ...]:
    """Accuracy of each off-ramp alone, in the order of `trace.layers`."""
    return off_ramp_scores(trace, labels)


def off_ramp_scores(trace: Trace, labels: Tensor, metric: Metric = accuracy) -> tuple[float, ...]:
    """`metric` of each off-ramp alone, in the order of `trace.layers`."""
    return tuple(metric(labels, _of_texts(trace, logits)) for logits in trace.logits)


def predictions(trace: Trace, policy: ExitPolicy) -> Tensor:
    """What is said of each text under `policy`: (N,) int64, or (M,) where texts are the means of windows."""
    exit_layer, prediction = exits(trace, policy)
    if trace.windows is None:
        return prediction
    places = torch.searchsorted(torch.tensor(trace.layers), exit_layer)
    return _of_texts(trace, trace.logits[places, torch.arange(len(exit_layer))])


def _of_texts(trace: Trace, logits: Tensor) -> Tensor:
    """Predictions from the logits (N, C) that answered for each sample."""
    prediction = logits.argmax(-1)
    if trace.windows is None:
        return prediction
    means = text_means(logits.softmax(-1).numpy(), trace.windows).argmax(axis=1)
    alone = trace.windows == 1
    means[alone] = prediction.numpy()[first_windows(trace.windows)[alone]]
    return torch.from_numpy(means)


def exits(trace: Trace, policy: ExitPolicy) -> tuple[Tensor, Tensor]:
    """Exit layers (N,) int64, 1-based, and predictions (N,) int64 of the samples under `policy`."""
    num_samples = trace.logits.shape[1]
    exit_layer = torch.full((num_samples,), -1)  # not left yet
    prediction = torch.zeros(num_samples, dtype=torch.long)
    for layer, logits in zip(trace.layers, trace.logits, strict=True):
        leaves = exit_layer < 0
        if layer != trace.num_layers:
            if not policy.can_fire(layer):
                continue
            leaves &= policy.fires(layer, logits, entropy(logits))
        exit_layer[leaves] = layer
        prediction[leaves] = logits[leaves].argmax(-1)
    return exit_layer, prediction


def flop_saving(trace: Trace, policy: ExitPolicy, shape: ModelShape) -> float:
    """Share of full depth's FLOPs that `policy` saves on a trace.

    Counts what Eq. 2 leaves out: long samples cost more than short ones, attention grows with the square of
    their length, and every sample pays for the off-ramps that it passes. Negative where those cost more than
    the exits save.
    """
    exit_layer, _ = exits(trace, policy)
    full = torch.full_like(exit_layer, trace.num_layers)
    passed = [layer for layer in trace.layers if layer == trace.num_layers or policy.can_fire(layer)]
    executed = _flops(trace, exit_layer, passed, shape)
    return 1.0 - executed / _flops(trace, full, [trace.num_layers], shape)


def static_flop_saving(trace: Trace, depth: int, shape: ModelShape) -> float:
    """Share of full depth's FLOPs that a model of `depth` layers without off-ramps saves on the same samples."""
    full = torch.full((len(trace.lengths),), trace.num_layers)
    executed = _flops(trace, torch.full_like(full, depth), [depth], shape)
    return 1.0 - executed / _flops(trace, full, [trace.num_layers], shape)


def _flops(trace: Trace, exit_layer: Tensor, off_ramps: Sequence[int], shape: ModelShape) -> float:
    """FLOPs of samples that run to `exit_layer` and through those of `off_ramps` on their way."""
    left, lengths = exit_layer.numpy(), trace.lengths
    layers = sum(
        shape.layer_flops(float(run.sum()), float(np.square(run).sum()))
        for layer in range(1, trace.num_layers + 1)
        if len(run := lengths[left >= layer])
    )
    return layers + sum(shape.off_ramp_flops(int((left >= layer).sum())) for layer in off_ramps)


def score(trace: Trace, labels: Tensor, policy: ExitPolicy, metric: Metric = accuracy) -> OperatingPointScore:
    """Score and saving of `policy` on a labelled trace."""
    exit_layer, _ = exits(trace, policy)
    prediction = predictions(trace, policy)
    histogram = torch.bincount(exit_layer, minlength=trace.num_layers + 1).tolist()
    return OperatingPointScore(
        policy=policy,
        score=metric(labels, prediction),
        accuracy=accuracy(labels, prediction),
        mean_exit_layer=mean_exit_layer(histogram),
        saving=expected_saving(histogram),
        exit_histogram=tuple(histogram),
    )


def sweep(
    trace: Trace, labels: Tensor, thresholds: Sequence[float | None], metric: Metric = accuracy
) -> tuple[OperatingPointScore, ...]:
    """`score` for one entropy threshold after another."""
    return tuple(score(trace, labels, EntropyThreshold(t), metric) for t in thresholds)
