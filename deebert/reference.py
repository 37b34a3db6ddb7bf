"""The executable specification: one sample at a time, through the plain Hugging Face modules.

Slow on purpose. Whatever the engine does, its labels and exit layers must be these. Uses no code of the
packed form, and spells out the exit rule instead of calling the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deebert.backbones import family_of
from deebert.modeling import DeeBertForSequenceClassification


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """The answer for one sample."""

    label: int
    exit_layer: int
    """1-based."""
    logits: tuple[float, ...]
    """Of the off-ramp that answered."""
    entropy: float
    """Nats, of the off-ramp that answered."""
    margin: float
    """Smallest |entropy - threshold| met on the way; a sample within floating-point reach of 0 is a tie."""


@torch.no_grad()
def classify_one(
    model: DeeBertForSequenceClassification,
    input_ids: Sequence[int],
    thresholds: Sequence[float | None],
    token_type_ids: Sequence[int] | None = None,
) -> ReferenceResult:
    """Run one sample until an off-ramp is sure, or to the end.

    Args:
        model: in eval mode, float32.
        input_ids: token ids, special tokens included.
        thresholds: one per layer before the last, nats; None or negative never fires.
        token_type_ids: segment ids, zeros when None.
    """
    config, backbone, family = model.config, model.backbone, family_of(model.config.backbone_config)
    types = None if token_type_ids is None else torch.tensor([list(token_type_ids)])
    hidden = family.embed(backbone, torch.tensor([list(input_ids)]), types)
    margin = math.inf
    for layer, module in enumerate(family.layers_of(backbone), start=1):
        hidden = module(hidden, None)
        pooled = hidden[:, 0] if config.off_ramp_pooling == "cls" else hidden.mean(dim=1)
        if layer == config.num_hidden_layers:
            logits = model.final_classifier(pooled)[0]
            return _answer(logits, layer, margin)
        threshold = thresholds[layer - 1]
        if layer not in config.off_ramp_layers or threshold is None or threshold < 0:
            continue
        logits = model.off_ramps[config.off_ramp_layers.index(layer)](pooled)[0]
        surprise = _entropy(logits)
        margin = min(margin, abs(surprise - threshold))
        if surprise < threshold:
            return _answer(logits, layer, margin)
    raise AssertionError("the last layer always answers")


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
