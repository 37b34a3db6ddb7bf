"""A model's weights as the inference form multiplies them, and how each part does it.

Plain tensors and numbers: these travel between processes, and a process that only runs a model needs nothing
else, not even the library that trained it. Knows nothing of modules, checkpoints or sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert import native
from deebert.packing import samples_of_few_shapes, with_rows_behind
from deebert.precision import cpu_multiplies_bfloat16

if TYPE_CHECKING:
    from deebert.config import OffRampPooling
    from deebert.problem import Problem

# The number of rows that oneDNN lays weights out for; any number runs.
_TYPICAL_TOKENS = 2048
# Whose product, float32, is still in a cache when it is scaled.
_TOKENS_TOGETHER = 1024
# Of a weight to the root mean square of its output's; in BERTs the second product of the feed-forward block has such.
_OUTLIER_RATIO = 16.0
_MOST_OUTLIERS = 32
# Within so many standard deviations lies nearly all that a normalization makes.
_DEVIATIONS = 3.0
_TINY = 1e-12


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
class QuantizedLinear:
    """x · weightᵀ + bias, quantized: int8 weights with a scale for each output, and x in uint8 with a scale and a
    minimum for each token, taken as it comes.

    Input channels of a large range would leave the others few steps. How far each ranges is read off the normalization
    that they come from, and half of the difference, as a power, is moved into the weights (SmoothQuant, Xiao et al.,
    2023, which measures the ranges on data). Outliers, input channels with a weight far above the usual, would spoil
    the scale of every output that they feed: those A stay float32, in a product of their own (as in LLM.int8(),
    Dettmers et al., 2022, where activations choose them).
    """

    weight: Tensor  # (out, in) int8, in oneDNN's own order; 0 for outliers
    scale: Tensor  # (out,) float32
    zero_point: Tensor  # (out,) int64, all 0: the weights' range is symmetric
    weight_sum: Tensor  # (out,) float32, over the inputs: what a minimum of 1 adds to each output
    bias: Tensor  # (out,) float32
    smoothing: Tensor | None  # (in,) float32: what x is multiplied by first
    outliers: Tensor  # (A,) int64: which input channels
    outlier_weight: Tensor  # (A, out) float32, of x as it is

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) float32 or bfloat16 -> (T, out), the same."""
        if not native.quantizes(x, len(self.bias)):
            return self._of_float32(x.float()).to(x.dtype)
        bytes_, scale, minimum = native.quantize(x, self.smoothing)
        out = x.new_empty(len(x), len(self.bias))
        for first in range(0, len(x), _TOKENS_TOGETHER):
            rows = slice(first, first + _TOKENS_TOGETHER)
            product = quantized_product(bytes_[rows], self.weight, self.scale, self.zero_point)
            if len(self.outliers):
                apart = x[rows].index_select(1, self.outliers).float()
                product.addmm_(apart.div_(scale[rows, None]), self.outlier_weight)
            native.rescale(product, scale[rows], minimum[rows], self.weight_sum, self.bias, out[rows])
        return out

    def _of_float32(self, x: Tensor) -> Tensor:
        smooth = x if self.smoothing is None else x * self.smoothing
        # One pass: the quantized row, then its scale and its minimum as two float32. Made for embeddings, it is the
        # only kernel of torch's that quantizes row by row at the speed of memory.
        rows = torch.ops.quantized.embedding_bag_byte_prepack(smooth)
        width = x.shape[1]
        scale, minimum = rows[:, width:].contiguous().view(torch.float32).split(1, dim=1)
        # It takes what is no number for one: such a row must have no answer.
        scale = torch.addcmul(scale, smooth.sum(1, keepdim=True), scale.new_zeros(1))
        out = quantized_product(rows[:, :width].contiguous(), self.weight, self.scale, self.zero_point)
        out = torch.addcmul(self.bias, out, scale, out=out).addcmul_(minimum, self.weight_sum)
        if len(self.outliers):
            out.addmm_(x.index_select(1, self.outliers), self.outlier_weight)
        return out

    @classmethod
    def of(cls, linear: Linear, after: Norm | None = None) -> QuantizedLinear:
        """From float32, on the CPU.

        Args:
            linear: the product.
            after: what its inputs come from, if that is a normalization.
        """
        weight, smoothing = linear.weight, None
        if after is not None:
            of_inputs = after.bias.abs() + _DEVIATIONS * after.weight.abs()
            ranges = of_inputs.clamp(min=_TINY) / weight.abs().amax(0).clamp(min=_TINY)
            smoothing = (ranges.median() / ranges).sqrt()
            weight = weight / smoothing
        usual = weight.square().mean(1, keepdim=True).sqrt().clamp(min=_TINY)
        ratio = (weight.abs() / usual).amax(0)
        largest = ratio.argsort(descending=True)[:_MOST_OUTLIERS]
        outliers = largest[ratio[largest] > _OUTLIER_RATIO]
        others = weight.index_fill(1, outliers, 0.0)
        scale = others.abs().amax(dim=1).clamp(min=_TINY) / 127
        rounded = (others / scale[:, None]).round_()
        return cls(
            weight=torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None),
            scale=scale,
            zero_point=torch.zeros(len(scale), dtype=torch.int64),
            weight_sum=rounded.sum(dim=1) * scale,
            bias=linear.bias,
            smoothing=smoothing,
            outliers=outliers,
            outlier_weight=linear.weight[:, outliers].t().contiguous(),
        )


def quantized_product(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """oneDNN's: (T, in) uint8 · (out, in) int8, prepacked, times a scale for each output -> (T, out) float32."""
    multiply = torch.ops.onednn.qlinear_pointwise
    out: Tensor = multiply(x, 1.0, 0, weight, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], "")
    return out


Product = Linear | QuantizedLinear


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """Layer normalization."""

    weight: Tensor  # (H,)
    bias: Tensor  # (H,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def of_sum_(self, x: Tensor, residual: Tensor) -> Tensor:
        """(T, H), (T, H) -> (T, H); `x` is no longer what it was."""
        if native.takes_rows(x):
            return native.add_norm_(x, residual, self.weight, self.bias, self.eps)
        return self(x.add_(residual))


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A transformer layer that normalizes after each of its two blocks."""

    qkv: Product  # (3H, H): query, key and value in one product
    attention_output: Product
    attention_norm: Norm
    intermediate: Product
    output: Product
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
        samples, pooled = len(pooled), pooled.to(self.classifier.bias.dtype)
        if self.dense.is_prepacked:
            # oneDNN builds a kernel for each shape, which takes longer than to run it.
            pooled = with_rows_behind(pooled, samples_of_few_shapes(samples))
        dense, weight, bias = self.dense(pooled), self.classifier.weight, self.classifier.bias
        if self.activation is torch.tanh and native.classifies(dense, len(bias)):
            return native.classify(dense[:samples], weight, bias)
        return self.classifier(self.activation(dense))[:samples].float()


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

    def __call__(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """(T,) int32 ids, (T,) int64 positions, (T,) int32 types, None where all are 0 -> (T, H)."""
        states = self._normalized(ids, positions, types)
        return states if self.projection is None else self.projection(states)

    def _normalized(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        norm = self.norm
        if native.embeds(ids, self.word):
            return native.embed(
                ids,
                positions,
                types,
                word=self.word,
                position=self.position,
                token_type=self.token_type,
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
            )
        states = F.embedding(ids, self.word)
        if self.token_type is not None:
            states += self.token_type[0] if types is None else F.embedding(types, self.token_type)
        states += F.embedding(positions, self.position)
        return norm(states)


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

    def activate_(self, x: Tensor) -> Tensor:
        """`activation` of `x`, which is no longer what it was."""
        if self.activation is F.gelu and native.activates(x):
            return native.gelu_(x)
        return self.activation(x)

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward blocks."""
        return len(self.layers[0].intermediate.bias)

    def to(self, device: torch.device, dtype: torch.dtype) -> FusedModel:
        """A copy on a device; weights laid out as the device's products want them.

        Args:
            device: where to.
            dtype: of the layers' products; all else is in `state_dtype` of it.
        """
        others = _Cast(device, state_dtype(dtype))
        if dtype != torch.int8:
            model: FusedModel = others.part(self)
            return model
        beside: FusedModel = others.part(replace(self, layers=()))
        first = self.embeddings.norm if self.embeddings.projection is None else None
        return replace(
            beside, layers=_quantized(_Cast(device, torch.float32).part(self.layers), first, others)
        )


_PARTS = (FusedModel, Embeddings, Layer, OffRamp, ExitHead, Linear, Norm)


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
        if not isinstance(value, _PARTS):
            return value
        if id(value) not in self._done:
            cast = replace(value, **{f.name: self.part(getattr(value, f.name)) for f in fields(value)})
            self._done[id(value)] = _prepacked(cast) if isinstance(cast, Linear) and self._prepacks else cast
        return self._done[id(value)]


def _quantized(layers: Sequence[Layer], first: Norm | None, others: _Cast) -> tuple[Layer, ...]:
    """Layers whose products are int8, of float32; `first` normalizes what the first one reads."""
    norms = (first, *(layer.output_norm for layer in layers))
    return tuple(
        Layer(
            qkv=QuantizedLinear.of(_float(layer.qkv), after=before),
            attention_output=QuantizedLinear.of(_float(layer.attention_output)),
            attention_norm=others.part(layer.attention_norm),
            intermediate=QuantizedLinear.of(_float(layer.intermediate), after=layer.attention_norm),
            output=QuantizedLinear.of(_float(layer.output)),
            output_norm=others.part(layer.output_norm),
        )
        for layer, before in zip(layers, norms, strict=False)
    )


def _float(product: Product) -> Linear:
    assert isinstance(product, Linear)  # a fused model is quantized once
    return product


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tokens' states are in, and all that is not a layer's product, where those are in `dtype`.

    Beside int8 that is bfloat16 on CPUs that have it, else float32.
    """
    if dtype != torch.int8:
        return dtype
    has_bfloat16 = cpu_multiplies_bfloat16() and _onednn_multiplies(torch.device("cpu"), torch.bfloat16)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _prepacked(linear: Linear) -> Linear:
    """On CPUs oneDNN reorders a weight for each product unless it is done once, here; few classes' stay as they are."""
    if len(linear.bias) <= native.MOST_CLASSES:
        return linear
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, _TYPICAL_TOKENS)
    return replace(linear, weight=weight, is_prepacked=True)


def _onednn_multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """In bfloat16 only: float32 is held to transformers' own products, whose summation order differs."""
    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return bool(on_cpu and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
