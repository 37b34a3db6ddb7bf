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

    label: int
    exit_layer: int
    """1-based; 0: on the embeddings."""
    logits: tuple[float, ...]
    """Of the off-ramp that answered."""
    entropy: float
    """Nats, of the off-ramp that answered."""
    margin: float
    """Smallest |entropy - threshold| met on the way; a sample within floating-point reach of 0 is a tie."""


@dataclass(frozen=True, kw_only=True)
class WindowedReferenceResult:
    """The answer for one text in windows."""

    label: int
    """The largest of `probabilities`."""
    exit_layer: int
    """1-based, of the deepest window."""
    probabilities: tuple[float, ...]
    """Mean of the windows' distributions."""
    entropy: float
    """Nats, of `probabilities`."""
    windows: tuple[ReferenceResult, ...]


@torch.no_grad()
def classify_one(
    model: DeeBertForSequenceClassification,
    input_ids: Sequence[int],
    thresholds: Sequence[float | None],
    token_type_ids: Sequence[int] | None = None,
    *,
    layer_0: float | None = None,
) -> ReferenceResult:
    """Run one sample until an off-ramp is sure, or to the end.

    Args:
        model: in eval mode, float32.
        input_ids: token ids, special tokens included.
        thresholds: one per layer before the last, nats; None or negative never fires.
        token_type_ids: segment ids, zeros when None.
        layer_0: the threshold of an off-ramp on the embeddings.
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
            return _answer(final(_pooled(hidden, config.off_ramp_pooling, final.query))[0], layer, margin)
        if layer not in config.off_ramp_layers or threshold is None or threshold < 0:
            continue
        ramp: Any = model.off_ramps[config.off_ramp_layers.index(layer)]
        pooled = _pooled(hidden, config.off_ramp_pooling, ramp.query)
        logits = ramp(pooled, model.off_ramp_pooler)[0]
        surprise = _entropy(logits)
        margin = min(margin, abs(surprise - threshold))
        if surprise < threshold:
            return _answer(logits, layer, margin)
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
    results = [classify_one(model, window, thresholds) for window in windows]
    distributions = [torch.tensor(r.logits).double().softmax(-1).tolist() for r in results]
    mean = [sum(column) / len(results) for column in zip(*distributions, strict=True)]
    return WindowedReferenceResult(
        label=max(range(len(mean)), key=lambda i: mean[i]),
        exit_layer=max(r.exit_layer for r in results),
        probabilities=tuple(mean),
        entropy=-sum(p * math.log(p) for p in mean if p > 0),
        windows=tuple(results),
    )


def _pooled(hidden: torch.Tensor, pooling: str, query: torch.Tensor | None) -> torch.Tensor:
    """(1, L, H), no padding -> what an off-ramp reads."""
    cls, mean = hidden[:, 0], hidden.mean(dim=1)
    if query is not None:
        return torch.softmax(hidden[0] @ query, dim=0)[None] @ hidden[0]
    return {"cls": cls, "mean": mean, "both": torch.cat([cls, mean], dim=1)}[pooling]


def _entropy(logits: torch.Tensor) -> float:
    """``-Σ p ln p``, term by term."""
    log_p: list[float] = torch.log_softmax(logits.float(), dim=-1).tolist()
    return -sum(math.exp(x) * x for x in log_p)


def _answer(logits: torch.Tensor, layer: int, margin: float) -> ReferenceResult:
    return ReferenceResult(
        label=int(logits.argmax()),
        exit_layer=layer,
        logits=tuple(logits.float().tolist()),
        entropy=_entropy(logits),
        margin=margin,
    )
