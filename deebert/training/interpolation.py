"""Weights between two models.

Two models of which one went on training from the other lie in one basin of the loss, so that what lies between them is
a model too: its scores lie between theirs on texts like the training texts, and can lie above both on others (Wortsman
et al., Robust fine-tuning of zero-shot models, 2022). Knows nothing of stages.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters as they are now, on their device."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def interpolate(model: nn.Module, before: Mapping[str, Tensor], share: float) -> None:
    """Set the model's parameters to (1 - share) · `before` + share · what they are, in place.

    Args:
        model: the one trained further; of the shape of `before`.
        before: by name, of each of its parameters.
        share: from 0 to 1.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(before[name].to(parameter.device), parameter, share))
