"""A model's weights as the inference form multiplies them, and how each part does it.

Plain tensors and numbers: these travel between processes, and a process that only runs a model needs nothing
else, not even the library that trained it. Knows nothing of modules, checkpoints or packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from deebert.config import OffRampPooling
    from deebert.problem import Problem

# The number of rows that oneDNN lays weights out for; any number runs.
_TYPICAL_TOKENS = 2048
_SAMPLES_TOGETHER = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """x · weightᵀ + bias."""

    weight: Tensor  # (out, in), in oneDNN's own order where `is_prepacked`
    bias: Tensor  # (out,)
    is_prepacked: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.is_prepacked:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """Layer normalization."""

    weight: Tensor  # (H,)
    bias: Tensor  # (H,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A transformer layer that normalizes after each of its two blocks."""

    qkv: Linear  # (3H, H): query, key and value in one product
    attention_output: Linear
    attention_norm: Norm
    intermediate: Linear
    output: Linear
    output_norm: Norm


@dataclass(frozen=True, kw_only=True, eq=False)
class OffRamp:
    """Pooler and classifier, of an off-ramp or of full depth."""

    dense: Linear
    activation: Callable[[Tensor], Tensor]
    classifier: Linear
    query: Tensor | None  # (H,), of attention pooling

    def __call__(self, pooled: Tensor) -> Tensor:
        """(N, W) pooled states -> (N, C) float32 logits."""
        samples = len(pooled)
        if self.dense.is_prepacked:
            # Few shapes: oneDNN builds a kernel for each, which takes longer than to run it.
            pooled = F.pad(pooled, (0, 0, 0, -samples % _SAMPLES_TOGETHER))
        return self.classifier(self.activation(self.dense(pooled)))[:samples].float()


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitHead:
    """Learning to exit: how certain an off-ramp's answer is."""

    weight: Tensor  # (1, W)
    bias: Tensor  # (1,)

    def __call__(self, pooled: Tensor) -> Tensor:
        """(N, W) pooled states -> (N,) float32 certainties."""
        return F.linear(pooled, self.weight, self.bias).float().sigmoid().squeeze(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """What a token's state starts from."""

    word: Tensor  # (V, E); E is H but where there is a projection
    position: Tensor  # (P, E)
    token_type: Tensor | None  # (S, E)
    norm: Norm
    projection: Linear | None  # E -> H
    padding_id: int | None
    """RoBERTa's convention (positions count from ``padding_id + 1``, padding stays at it), or None."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedModel:
    """All that `PackedEncoder` needs of a DeeBERT model: see `deebert.fusing.fuse`."""

    hidden_size: int
    pooled_size: int
    num_labels: int
    num_heads: int
    pooling: OffRampPooling
    problem: Problem
    has_token_types: bool
    activation: Callable[[Tensor], Tensor]
    """Of the feed-forward blocks."""
    embeddings: Embeddings
    layers: tuple[Layer, ...]
    off_ramps: Mapping[int, OffRamp]
    """By their 1-based layer, 0 for the embeddings; the final classifier is the last layer's."""
    exit_head: ExitHead | None

    def to(self, device: torch.device, dtype: torch.dtype) -> FusedModel:
        """A copy on a device, in a float dtype; weights laid out as the device's products want them."""
        model: FusedModel = _Cast(device, dtype).part(self)
        return model


class _Cast:
    """Copies weights to a device and dtype; what parts share stays shared."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._prepacks = _onednn_multiplies(device, dtype)
        self._done: dict[int, Any] = {}

    def part(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device, self._dtype, copy=True).contiguous()
        if isinstance(value, tuple):
            return tuple(map(self.part, value))
        if isinstance(value, Mapping):
            return {key: self.part(one) for key, one in value.items()}
        if not is_dataclass(value) or isinstance(value, type):
            return value
        if id(value) not in self._done:
            cast = replace(value, **{f.name: self.part(getattr(value, f.name)) for f in fields(value)})
            self._done[id(value)] = _prepacked(cast) if isinstance(cast, Linear) and self._prepacks else cast
        return self._done[id(value)]


def _prepacked(linear: Linear) -> Linear:
    """On CPUs oneDNN reorders a weight for each product unless it is done once, here."""
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, _TYPICAL_TOKENS)
    return replace(linear, weight=weight, is_prepacked=True)


def _onednn_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """In bfloat16 only: float32 is held to transformers' own products, whose summation order differs."""
    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return bool(on_cpu and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
