"""Weights between two models, layer by layer.

Two models of which one went on training from the other lie in one basin of the loss, so that what lies between them is
a model too: its scores lie between theirs on texts like the training texts, and can lie above both on others (Wortsman
et al., Robust fine-tuning of zero-shot models, 2022). Knows nothing of stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deebert.backbones import family_of
from deebert.modeling import DeeBertForSequenceClassification
from deebert.training.config import Interpolation


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's parameters as they are now, on their device."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def interpolate(
    model: DeeBertForSequenceClassification, before: Mapping[str, Tensor], interpolation: Interpolation
) -> None:
    """Set the model's parameters to (1 - share) · `before` + share · what they are, in place.

    A learning-to-exit head stays as it is: it may have been made for the stage, and moves no answer.

    Args:
        model: the one trained further; of the shape of `before`.
        before: by name, of each of its parameters.
        interpolation: gives the share of each layer.
    """
    num_layers = model.config.num_hidden_layers
    places = {id(p): layer for layer, module in _places(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if (layer := places.get(id(parameter))) is not None:
            share = interpolation.at(layer, num_layers)
            parameter.copy_(torch.lerp(before[name].to(parameter.device), parameter, share))


def _places(model: DeeBertForSequenceClassification) -> Iterator[tuple[float, nn.Module]]:
    """The layer, 1-based, at which each module of the model stands; a later place is the more exact."""
    config = model.config
    yield 1, model.backbone  # the embeddings; its layers follow
    layers = model.backbone.get_submodule(family_of(config.backbone_config).layers)
    yield from enumerate(layers, start=1)
    for layer, ramp in zip(config.off_ramp_layers, model.off_ramps, strict=True):
        yield max(1, layer), ramp
    yield config.num_hidden_layers, model.final_classifier
    if model.off_ramp_pooler is not None:  # serves shallow and deep off-ramps alike
        yield (1 + config.num_hidden_layers) / 2, model.off_ramp_pooler
