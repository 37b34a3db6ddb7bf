"""Exit policies of other papers, on traces: what they would reach where the product has one entropy threshold.

Each says at each off-ramp how much doubt is left; a sample leaves at the first whose doubt is below a threshold.
`python -m jobs.recipes --policies` compares them. Knows nothing of recipes, nor of the engine, which runs none of
these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.evaluation import Metric, Trace
from deebert.exit_policy import entropy

_STEPS = 400

Doubt = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (R, N, C) float32 of all off-ramps, the final classifier last -> doubt (R - 1, N) of those before it, and
what each answers with, (R, N, C)."""


def _entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """DeeBERT's own."""
    return entropy(logits[:-1]), logits


def _rising(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy against a threshold that doubles from the first off-ramp to the last."""
    ramps = len(logits) - 1
    rise = torch.logspace(0, 1, ramps, base=2.0, device=logits.device)
    return entropy(logits[:-1]) / rise[:, None], logits


def _confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """1 - the largest probability; of two labels this orders as entropy does."""
    return 1 - logits[:-1].softmax(-1).amax(-1), logits


def _patience(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As many off-ramps in a row as asked for say the same (Zhou et al., PABEE, 2020): -(how many)."""
    labels = logits.argmax(-1)
    run = torch.ones(labels.shape[1])
    doubt = []
    for place in range(len(labels) - 1):
        if place:
            run = torch.where(labels[place] == labels[place - 1], run + 1, 1.0)
        doubt.append(-run)
    return torch.stack(doubt), logits


def _agreement(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy, and the off-ramp before says the same (in the spirit of Zhang et al., PCEE-BERT, 2022)."""
    doubt, labels = entropy(logits[:-1]), logits.argmax(-1)
    doubt[1:] = doubt[1:].masked_fill(labels[1:-1] != labels[:-2], float("inf"))
    doubt[0] = float("inf")
    return doubt, logits


def _mean_of_two(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the mean of this off-ramp's log-probabilities and those of the one before, which also answers; the
    final classifier answers alone."""
    log_p = F.log_softmax(logits, dim=-1)
    both = torch.cat([log_p[:1], (log_p[1:-1] + log_p[:-2]) / 2, log_p[-1:]])
    return entropy(both[:-1]), both


POLICIES: Mapping[str, Doubt] = MappingProxyType(
    {
        "entropy": _entropy,
        "rising-entropy": _rising,
        "confidence": _confidence,
        "patience": _patience,
        "agreement": _agreement,
        "mean-of-two": _mean_of_two,
    }
)


def points(trace: Trace, labels: Tensor, doubt: Doubt, metric: Metric) -> tuple[tuple[float, float], ...]:
    """(layer speed-up, score) of rising thresholds on the doubt, full depth first.

    Args:
        trace: of N samples, one label each.
        labels: (N,) the right ones.
        doubt: one of `POLICIES`.
        metric: the task's score.
    """
    doubts, answers = doubt(trace.logits)
    said = trace.problem.predict(answers)
    layers, samples = torch.tensor(trace.layers), torch.arange(trace.logits.shape[1])
    found = []
    for threshold in _thresholds(doubts):
        fires = torch.cat([doubts < threshold, torch.ones(1, len(samples), dtype=torch.bool)])
        place = fires.int().argmax(0)  # the first of several
        mean = float(layers[place].float().mean())
        found.append((trace.num_layers / mean, metric(labels, said[place, samples])))
    return tuple(found)


def _thresholds(doubts: Tensor) -> Sequence[float]:
    """From nobody leaves to everybody leaves at once, every way of leaving in between or `_STEPS` of them."""
    finite = doubts[doubts.isfinite()].unique()
    if len(finite) > _STEPS:
        finite = finite[torch.linspace(0, len(finite) - 1, _STEPS).round().long()]
    return [*finite.tolist(), float("inf")]
