"""The executable specification: one sample at a time, through the plain Hugging Face modules.

Slow on purpose. Whatever the engine does, its labels and exit layers must be these. Uses no code of the
packed form, and spells out the exit rule instead of calling the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deebert.backbones import family_of
from deebert.modeling import DeeBertForSequenceClassification


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """The answer for one sample."""

    label: int | tuple[int, ...] | float
    """The label's id, the ids of all labels that hold, or the number: what the problem asks for."""
    exit_layer: int
    """1-based; 0: on the embeddings."""
    logits: tuple[float, ...]
    """Of the off-ramp that answered."""
    entropy: float
    """Nats, of the off-ramp that answered; NaN for a regression."""
    certainty: float | None
    """Between 0 and 1, of the off-ramp that answered; None where the model does not learn to exit."""
    margin: float
    """Smallest |entropy - threshold|, or |certainty - threshold|, met on the way; a sample within floating-point
    reach of 0 is a tie."""


@dataclass(frozen=True, kw_only=True)
class WindowedReferenceResult:
    """The answer for one text in windows."""

    label: int | tuple[int, ...] | float
    """What `probabilities` say: the largest, all above one half, or the number itself."""
    exit_layer: int
    """1-based, of the deepest window."""
    probabilities: tuple[float, ...]
    """Mean of the windows' distributions, of the labels' probabilities, or of the numbers."""
    entropy: float
    """Nats, of `probabilities`; NaN for a regression."""
    windows: tuple[ReferenceResult, ...]


@torch.no_grad()
def classify_one(
    model: DeeBertForSequenceClassification,
    input_ids: Sequence[int],
    thresholds: Sequence[float | None],
    token_type_ids: Sequence[int] | None = None,
    *,
    layer_0: float | None = None,
    by_certainty: bool = False,
) -> ReferenceResult:
    """Run one sample until an off-ramp is sure, or to the end.

    Args:
        model: in eval mode, float32.
        input_ids: token ids, special tokens included.
        thresholds: one per layer before the last, nats; None or negative never fires.
        token_type_ids: segment ids, zeros when None.
        layer_0: the threshold of an off-ramp on the embeddings.
        by_certainty: thresholds are of the learning-to-exit head's certainty instead: 0 to 1, None never fires.
    """
    config, backbone, family = model.config, model.backbone, family_of(model.config.backbone_config)
    types = None if token_type_ids is None else torch.tensor([list(token_type_ids)])
    hidden = family.embed(backbone, torch.tensor([list(input_ids)]), types)
    margin = math.inf
    for layer, threshold in enumerate((layer_0, *thresholds, None)):
        if layer > 0:
            hidden = family.layers_of(backbone)[layer - 1](hidden, None)
        if layer == config.num_hidden_layers:
            final = model.final_classifier
            pooled = _pooled(hidden, config.off_ramp_pooling, final.query)
            return _answer(model, pooled, final(pooled)[0], layer, margin)
        if layer not in config.off_ramp_layers or threshold is None or threshold < 0:
            continue
        ramp: Any = model.off_ramps[config.off_ramp_layers.index(layer)]
        pooled = _pooled(hidden, config.off_ramp_pooling, ramp.query)
        logits = ramp(pooled, model.off_ramp_pooler)[0]
        if by_certainty:
            certainty = _certainty(model, pooled)
            assert certainty is not None
            margin = min(margin, abs(certainty - threshold))
            leaves = certainty > threshold
        else:
            surprise = _entropy(logits, config.problem_type)
            margin = min(margin, abs(surprise - threshold))
            leaves = surprise < threshold
        if leaves:
            return _answer(model, pooled, logits, layer, margin)
    raise AssertionError("the last layer always answers")


def windows_of(tokens: Sequence[int], *, room: int, stride: int) -> list[list[int]]:
    """Cut the tokens of a text, special tokens aside, into windows.

    Args:
        tokens: of the whole text.
        room: most tokens of the text in a window: the maximal length less the special tokens.
        stride: tokens that neighbouring windows share.

    Returns:
        Windows from the beginning on, each full but the last, which ends with the text.
    """
    windows = [list(tokens[:room])]
    start = 0
    while start + room < len(tokens):
        start += room - stride
        windows.append(list(tokens[start : start + room]))
    return windows


def classify_windows(
    model: DeeBertForSequenceClassification,
    windows: Sequence[Sequence[int]],
    thresholds: Sequence[float | None],
) -> WindowedReferenceResult:
    """Run each window of a text on its own, and answer with the mean.

    Args:
        model: in eval mode, float32.
        windows: token ids of each, special tokens included.
        thresholds: those of `classify_one`, for every window.
    """
    problem = model.config.problem_type
    results = [classify_one(model, window, thresholds) for window in windows]
    scores = [_scores(torch.tensor(r.logits).double(), problem) for r in results]
    mean = [sum(column) / len(results) for column in zip(*scores, strict=True)]
    surprise = -sum(p * math.log(p) for p in mean if p > 0) if problem != "regression" else math.nan
    label: int | tuple[int, ...] | float = max(range(len(mean)), key=lambda i: mean[i])
    if problem == "regression":
        label = mean[0]
    elif problem == "multi_label_classification":
        label = tuple(i for i, p in enumerate(mean) if p > 0.5)
        surprise = max(-sum(q * math.log(q) for q in (p, 1 - p) if q > 0) for p in mean)
    return WindowedReferenceResult(
        label=label,
        exit_layer=max(r.exit_layer for r in results),
        probabilities=tuple(mean),
        entropy=surprise,
        windows=tuple(results),
    )


def _scores(logits: torch.Tensor, problem: str | None) -> list[float]:
    if problem == "regression":
        return list(logits.tolist())
    by_problem = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
    return list(by_problem.tolist())


def _pooled(hidden: torch.Tensor, pooling: str, query: torch.Tensor | None) -> torch.Tensor:
    """(1, L, H), no padding -> what an off-ramp reads."""
    cls, mean = hidden[:, 0], hidden.mean(dim=1)
    if query is not None:
        return torch.softmax(hidden[0] @ query, dim=0)[None] @ hidden[0]
    return {"cls": cls, "mean": mean, "both": torch.cat([cls, mean], dim=1)}[pooling]


def _entropy(logits: torch.Tensor, problem: str | None) -> float:
    """``-Σ p ln p``, term by term; of the least sure label where each is a question of its own."""
    if problem == "regression":
        return math.nan
    if problem == "multi_label_classification":
        yes_or_no = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
        return max(_entropy(one, None) for one in yes_or_no)
    log_p: list[float] = torch.log_softmax(logits.float(), dim=-1).tolist()
    return -sum(math.exp(x) * x for x in log_p)


def _certainty(model: DeeBertForSequenceClassification, pooled: torch.Tensor) -> float | None:
    """``1 / (1 + e^-(c·h + b))`` (BERxiT, section 4)."""
    if model.exit_head is None:
        return None
    return 1 / (1 + math.exp(-float(model.exit_head.linear(pooled))))


def _label(logits: torch.Tensor, problem: str | None) -> int | tuple[int, ...] | float:
    if problem == "regression":
        return float(logits[0])
    if problem == "multi_label_classification":
        return tuple(i for i, logit in enumerate(logits.tolist()) if logit > 0)
    return int(logits.argmax())


def _answer(
    model: DeeBertForSequenceClassification,
    pooled: torch.Tensor,
    logits: torch.Tensor,
    layer: int,
    margin: float,
) -> ReferenceResult:
    problem = model.config.problem_type
    return ReferenceResult(
        label=_label(logits, problem),
        exit_layer=layer,
        logits=tuple(logits.float().tolist()),
        entropy=_entropy(logits, problem),
        certainty=_certainty(model, pooled),
        margin=margin,
    )
