"""Traces: what every off-ramp says of every sample of a labelled set, and what follows from it.

A trace is computed once at full depth; every threshold's accuracy, mean exit layer and saving can then be
read off it without running the model again. Knows nothing of files, commands or pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deebert.cost import ModelShape, expected_saving, mean_exit_layer
from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, ExitPolicy, OffRampAnswer
from deebert.packing import IntArray, PackedTokens
from deebert.problem import SINGLE_LABEL, Problem
from deebert.windows import first_windows, text_means

Metric = Callable[[Tensor, Tensor], float]
"""Labels and predictions, in the form that the problem gives both -> a score; larger is better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledSequences:
    """Tokenized samples and their labels."""

    tokens: PackedTokens
    labels: Tensor
    """(N,) int64 ids; (N, C) float32, 0 or 1, of multi-label data; (N,) float32 numbers of a regression; of M
    texts instead of N samples with `windows`."""
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
    problem: Problem = SINGLE_LABEL
    certainties: Tensor | None = None
    """(R, N) float32, of the learning-to-exit head where there is one."""

    @property
    def num_layers(self) -> int:
        """The model's depth."""
        return self.layers[-1]

    @property
    def num_texts(self) -> int:
        """N, or M where texts are in windows."""
        return len(self.lengths) if self.windows is None else len(self.windows)

    def answer(self, place: int) -> OffRampAnswer:
        """What the off-ramp at `place` (0-based, in the order of `layers`) said of all samples."""
        return OffRampAnswer(
            logits=self.logits[place],
            entropy=self._entropies[place],
            certainty=None if self.certainties is None else self.certainties[place],
        )

    @cached_property
    def _entropies(self) -> tuple[Tensor, ...]:
        """Of each off-ramp, (N,): every policy that is tried on the trace asks for the same."""
        return tuple(map(self.problem.entropy, self.logits))

    @cached_property
    def _samples_said(self) -> Tensor:
        """(R, N, …): what each off-ramp says of every sample, as `Problem.predict` gives it."""
        return torch.stack([self.problem.predict(logits) for logits in self.logits])

    @cached_property
    def full_depth_predictions(self) -> Tensor:
        """`predictions` at full depth, which others are held against."""
        return predictions(self, FULL_DEPTH)

    def mean_agreement(self, labels: Tensor, predictions: Tensor) -> float:
        """Mean agreement of predictions with labels: accuracy, or 1 - tanh|a - b| of a regression."""
        return float(self.problem.agreement(predictions, labels).mean())


@dataclass(frozen=True, kw_only=True)
class OperatingPointScore:
    """One policy on one labelled trace."""

    policy: ExitPolicy
    score: float
    """By the task's metric; `accuracy` where none was named."""
    accuracy: float
    """Mean agreement with the labels: see `Trace.mean_agreement`."""
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
    on_tokens: Callable[[int], object] | None = None,
) -> Trace:
    """Run all samples at full depth and keep what every off-ramp said.

    Args:
        encoder: the model.
        tokens: N samples.
        windows: as in `Trace`.
        micro_batch_tokens: most tokens that run at once, but for a sample that is longer.
        on_tokens: told after each micro-batch how many tokens it had, the shortest samples first.
    """
    layers = tuple(sorted(encoder.off_ramp_layers))
    place = {layer: i for i, layer in enumerate(layers)}
    logits = torch.empty(len(layers), len(tokens), encoder.num_labels)
    certainties = torch.empty(len(layers), len(tokens)) if encoder.learns_to_exit else None
    for rows, batch in length_sorted_batches(tokens, micro_batch_tokens):
        batch = batch.to(encoder.device)
        states = encoder.embed(batch)
        for layer in range(encoder.num_layers + 1):
            if layer > 0:
                states = encoder.layer(layer - 1, states, batch.layout)
            if layer not in place:
                continue
            answer = encoder.answer(layer - 1, states, batch.layout, with_certainty=encoder.learns_to_exit)
            logits[place[layer], rows] = answer.logits.cpu()
            if certainties is not None and answer.certainty is not None:
                certainties[place[layer], rows] = answer.certainty.cpu()
        if on_tokens is not None:
            on_tokens(batch.layout.total_tokens)
    return Trace(
        layers=layers,
        logits=logits,
        lengths=tokens.layout.lengths,
        windows=windows,
        problem=encoder.problem,
        certainties=certainties,
    )


def off_ramp_scores(trace: Trace, labels: Tensor, metric: Metric | None = None) -> tuple[float, ...]:
    """`metric` of each off-ramp alone, in the order of `trace.layers`; mean agreement where none is named."""
    judge = metric or trace.mean_agreement
    return tuple(judge(labels, _of_texts(trace, logits)) for logits in trace.logits)


def predictions(trace: Trace, policy: ExitPolicy) -> Tensor:
    """What is said of each of N samples under `policy`, or of M texts where they are the means of windows."""
    return _said(trace, *exits(trace, policy))


def _said(trace: Trace, exit_layer: Tensor, prediction: Tensor) -> Tensor:
    """What samples that left so, and said so, say of the texts."""
    if trace.windows is None:
        return prediction
    places = torch.searchsorted(torch.tensor(trace.layers), exit_layer)
    return _of_texts(trace, trace.logits[places, torch.arange(len(exit_layer))])


def _of_texts(trace: Trace, logits: Tensor) -> Tensor:
    """Predictions from the logits (N, C) that answered for each sample."""
    prediction = trace.problem.predict(logits)
    if trace.windows is None:
        return prediction
    means = text_means(trace.problem.scores(logits).numpy(), trace.windows)
    said = trace.problem.predict_scores(torch.from_numpy(means))
    alone = torch.from_numpy(trace.windows == 1)
    said[alone] = prediction[torch.from_numpy(first_windows(trace.windows))[alone]]
    return said


def exits(trace: Trace, policy: ExitPolicy) -> tuple[Tensor, Tensor]:
    """Exit layers (N,) int64, 1-based, and predictions of the samples, as `Problem.predict` gives them."""
    exit_layer = torch.full((trace.logits.shape[1],), -1)  # not left yet
    prediction = torch.empty_like(trace._samples_said[-1])  # everybody leaves at the last layer at the latest
    for place, layer in enumerate(trace.layers):
        leaves = exit_layer < 0
        if layer != trace.num_layers:
            if not policy.can_fire(layer):
                continue
            leaves &= policy.fires(layer, trace.answer(place))
        exit_layer[leaves] = layer
        prediction[leaves] = trace._samples_said[place, leaves]
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


def score(
    trace: Trace, labels: Tensor, policy: ExitPolicy, metric: Metric | None = None
) -> OperatingPointScore:
    """Score and saving of `policy` on a labelled trace."""
    exit_layer, of_samples = exits(trace, policy)
    prediction = _said(trace, exit_layer, of_samples)
    histogram = torch.bincount(exit_layer, minlength=trace.num_layers + 1).tolist()
    agreement = trace.mean_agreement(labels, prediction)
    return OperatingPointScore(
        policy=policy,
        score=agreement if metric is None else metric(labels, prediction),
        accuracy=agreement,
        mean_exit_layer=mean_exit_layer(histogram),
        saving=expected_saving(histogram),
        exit_histogram=tuple(histogram),
    )


def sweep(
    trace: Trace, labels: Tensor, thresholds: Sequence[float | None], metric: Metric | None = None
) -> tuple[OperatingPointScore, ...]:
    """`score` for one entropy threshold after another."""
    return tuple(score(trace, labels, EntropyThreshold(t), metric) for t in thresholds)
