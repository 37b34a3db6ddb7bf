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

    label: int | tuple[int, ...] | float
    """The label's id, the ids of all labels that hold, or the number: what the problem asks for."""
    exit_layer: int
    """1-based."""
    logits: tuple[float, ...]
    """Of the off-ramp that answered."""
    entropy: float
    """Nats, of the off-ramp that answered; NaN for a regression."""
    certainty: float | None
    """Between 0 and 1, of the off-ramp that answered; None where the model does not learn to exit."""
    margin: float
    """Smallest |entropy - threshold|, or |certainty - threshold|, met on the way; a sample within floating-point
    reach of 0 is a tie."""


@torch.no_grad()
def classify_one(
    model: DeeBertForSequenceClassification,
    input_ids: Sequence[int],
    thresholds: Sequence[float | None],
    token_type_ids: Sequence[int] | None = None,
    *,
    by_certainty: bool = False,
) -> ReferenceResult:
    """Run one sample until an off-ramp is sure, or to the end.

    Args:
        model: in eval mode, float32.
        input_ids: token ids, special tokens included.
        thresholds: one per layer before the last, nats; None or negative never fires.
        token_type_ids: segment ids, zeros when None.
        by_certainty: thresholds are of the learning-to-exit head's certainty instead: 0 to 1, None never fires.
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
            return _answer(model, pooled, logits, layer, margin)
        threshold = thresholds[layer - 1]
        if layer not in config.off_ramp_layers or threshold is None or threshold < 0:
            continue
        logits = model.off_ramps[config.off_ramp_layers.index(layer)](pooled)[0]
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
