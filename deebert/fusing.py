"""From the training form to the weights of the inference form: query, key and value become one product.

Knows nothing of devices, dtypes or packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from deebert import fused
from deebert.backbones import Family, family_of
from deebert.modeling import DeeBertForSequenceClassification

# As functions of torch's own, so that whoever receives the model needs no other library.
_OF_TORCH: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


def fuse(model: DeeBertForSequenceClassification) -> fused.FusedModel:
    """The weights of `model`, in float32 as they are and on its device; most are shared with it."""
    config, backbone = model.config, model.config.backbone_config
    family = family_of(backbone)
    off_ramp_activation = _activation(config.off_ramp_activation)
    shared = None if model.off_ramp_pooler is None else _linear(model.off_ramp_pooler)
    ramps = {
        layer: _off_ramp(ramp, shared, off_ramp_activation)
        for layer, ramp in zip(config.off_ramp_layers, model.off_ramps, strict=True)
    }
    final = _off_ramp(model.final_classifier, None, off_ramp_activation)
    head = model.exit_head
    return fused.FusedModel(
        hidden_size=config.hidden_size,
        pooled_size=config.pooled_size,
        num_labels=len(model.final_classifier.classifier.weight),
        num_heads=backbone.num_attention_heads,
        pooling=config.off_ramp_pooling,
        problem=config.problem,
        has_token_types=config.has_token_types,
        activation=_activation(getattr(backbone, family.activation)),
        embeddings=_embeddings(model, family),
        layers=tuple(_layer(layer, family) for layer in family.layers_of(model.backbone)),
        off_ramps={**ramps, config.num_hidden_layers: final},
        exit_head=None
        if head is None
        else fused.ExitHead(weight=head.linear.weight.detach(), bias=head.linear.bias.detach()),
    )


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = _OF_TORCH.get(name) or ACT2FN[name]
    return function


def _linear(*modules: Any) -> fused.Linear:
    if len(modules) == 1:
        return fused.Linear(weight=modules[0].weight.detach(), bias=modules[0].bias.detach())
    return fused.Linear(
        weight=torch.cat([m.weight.detach() for m in modules]),
        bias=torch.cat([m.bias.detach() for m in modules]),
    )


def _norm(module: Any) -> fused.Norm:
    return fused.Norm(weight=module.weight.detach(), bias=module.bias.detach(), eps=module.eps)


def _layer(module: nn.Module, names: Family) -> fused.Layer:
    at = module.get_submodule
    return fused.Layer(
        qkv=_linear(at(names.query), at(names.key), at(names.value)),
        attention_output=_linear(at(names.attention_output)),
        attention_norm=_norm(at(names.attention_norm)),
        intermediate=_linear(at(names.intermediate)),
        output=_linear(at(names.output)),
        output_norm=_norm(at(names.output_norm)),
    )


def _off_ramp(
    module: Any, shared_dense: fused.Linear | None, activation: Callable[[Tensor], Tensor]
) -> fused.OffRamp:
    return fused.OffRamp(
        dense=_linear(module.dense) if shared_dense is None else shared_dense,
        activation=activation,
        classifier=_linear(module.classifier),
        query=None if module.query is None else module.query.detach(),
    )


def _embeddings(model: DeeBertForSequenceClassification, family: Family) -> fused.Embeddings:
    module, projection = model.backbone.embeddings, family.projection_of(model.backbone)
    types = module.token_type_embeddings.weight.detach() if family.has_token_types else None
    follows = family.positions_follow_padding
    return fused.Embeddings(
        word=module.word_embeddings.weight.detach(),
        position=module.position_embeddings.weight.detach(),
        token_type=types,
        norm=_norm(module.LayerNorm),
        projection=None if projection is None else _linear(projection),
        padding_id=model.config.backbone_config.pad_token_id if follows else None,
    )
