"""From a model's weights by name to those of the inference form: query, key and value become one product.

Knows nothing of devices, dtypes or packing, nor of the modules that trained the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert import fused
from deebert.backbones import Family, family_of
from deebert.config import DeeBertConfig
from deebert.inventory import layer_name

# As functions of torch's own, so that whoever receives the model needs no other library.
_OF_TORCH: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}
_USUAL_EPS = 1e-12


def fuse(config: DeeBertConfig, weights: Mapping[str, Tensor]) -> fused.FusedModel:
    """The weights of a model in float32 as they are and on their device; most are shared.

    Args:
        config: the model's.
        weights: all that `deebert.inventory.weight_shapes` names; a training form's `state_dict()` is that.
    """
    backbone, family = config.backbone_config, family_of(config.backbone_config)
    parts = _Parts(weights, _eps(config))
    shares = config.shares_off_ramp_pooler and bool(config.off_ramp_layers)
    shared = parts.linear("off_ramp_pooler") if shares else None
    ramps = {
        layer: _off_ramp(parts, f"off_ramps.{i}", config, shared)
        for i, layer in enumerate(config.off_ramp_layers)
    }
    final = _off_ramp(parts, "final_classifier", config, None)
    return fused.FusedModel(
        hidden_size=config.hidden_size,
        pooled_size=config.pooled_size,
        num_labels=len(final.classifier.bias),
        num_heads=backbone.num_attention_heads,
        pooling=config.off_ramp_pooling,
        problem=config.problem,
        has_token_types=config.has_token_types,
        activation=activation(getattr(backbone, family.activation)),
        embeddings=_embeddings(parts, config, family),
        layers=tuple(
            _layer(parts, layer_name(family, index), family) for index in range(config.num_hidden_layers)
        ),
        off_ramps={**ramps, config.num_hidden_layers: final},
        exit_head=_exit_head(parts) if config.learns_to_exit else None,
    )


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that transformers calls by this name.

    Raises:
        KeyError: there is none.
    """
    if name in _OF_TORCH:
        return _OF_TORCH[name]
    # Imported here: it brings much of transformers and of torch along.
    from transformers.activations import ACT2FN

    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def _eps(config: DeeBertConfig) -> float:
    field = family_of(config.backbone_config).layer_norm_eps
    return _USUAL_EPS if field is None else float(getattr(config.backbone_config, field))


@dataclass(frozen=True)
class _Parts:
    """A model's parts by their dotted names."""

    weights: Mapping[str, Tensor]
    eps: float

    def linear(self, *names: str) -> fused.Linear:
        """One product of all that are named."""
        weight = [self.weights[f"{name}.weight"] for name in names]
        bias = [self.weights[f"{name}.bias"] for name in names]
        if len(names) == 1:
            return fused.Linear(weight=weight[0], bias=bias[0])
        return fused.Linear(weight=torch.cat(weight), bias=torch.cat(bias))

    def norm(self, name: str) -> fused.Norm:
        return fused.Norm(
            weight=self.weights[f"{name}.weight"], bias=self.weights[f"{name}.bias"], eps=self.eps
        )


def _layer(parts: _Parts, inside: str, names: Family) -> fused.Layer:
    return fused.Layer(
        qkv=parts.linear(inside + names.query, inside + names.key, inside + names.value),
        attention_output=parts.linear(inside + names.attention_output),
        attention_norm=parts.norm(inside + names.attention_norm),
        intermediate=parts.linear(inside + names.intermediate),
        output=parts.linear(inside + names.output),
        output_norm=parts.norm(inside + names.output_norm),
    )


def _off_ramp(
    parts: _Parts, name: str, config: DeeBertConfig, shared_dense: fused.Linear | None
) -> fused.OffRamp:
    return fused.OffRamp(
        dense=parts.linear(f"{name}.dense") if shared_dense is None else shared_dense,
        activation=activation(config.off_ramp_activation),
        classifier=parts.linear(f"{name}.classifier"),
        query=parts.weights.get(f"{name}.query"),
    )


def _exit_head(parts: _Parts) -> fused.ExitHead:
    linear = parts.linear("exit_head.linear")
    return fused.ExitHead(weight=linear.weight, bias=linear.bias)


def _embeddings(parts: _Parts, config: DeeBertConfig, family: Family) -> fused.Embeddings:
    inside, projection = "backbone.embeddings.", f"backbone.{family.projection}"
    follows = family.positions_follow_padding
    return fused.Embeddings(
        word=parts.weights[f"{inside}word_embeddings.weight"],
        position=parts.weights[f"{inside}position_embeddings.weight"],
        token_type=parts.weights.get(f"{inside}token_type_embeddings.weight"),
        norm=parts.norm(f"{inside}LayerNorm"),
        projection=parts.linear(projection) if f"{projection}.weight" in parts.weights else None,
        padding_id=config.backbone_config.pad_token_id if follows else None,
    )
