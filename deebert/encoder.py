"""The inference form: fused weights, packed tokens, one layer at a time.

`embed`, `layer` and `answer` are the three things an engine does with a model; between them it may
regroup sequences as it likes. No padding anywhere. Knows nothing of thresholds, scheduling or training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from deebert.attention import varlen_attention
from deebert.backbones import Family, family_of
from deebert.exit_policy import OffRampAnswer
from deebert.memory import keep_freed_memory
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens, SequenceLayout
from deebert.pooling import attended_tokens, mean_of_tokens

# The number of rows that oneDNN lays weights out for; any number runs.
_TYPICAL_TOKENS = 2048
_SAMPLES_TOGETHER = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class _Linear:
    weight: Tensor  # (out, in), in oneDNN's own order where `is_prepacked`
    bias: Tensor  # (out,)
    is_prepacked: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.is_prepacked:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Norm:
    weight: Tensor  # (H,)
    bias: Tensor  # (H,)
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer:
    qkv: _Linear  # (3H, H): query, key and value in one product
    attention_output: _Linear
    attention_norm: _Norm
    intermediate: _Linear
    output: _Linear
    output_norm: _Norm


@dataclass(frozen=True, kw_only=True, eq=False)
class _OffRamp:
    dense: _Linear
    activation: Callable[[Tensor], Tensor]
    classifier: _Linear
    query: Tensor | None  # (H,), of attention pooling

    def __call__(self, pooled: Tensor) -> Tensor:
        samples = len(pooled)
        if self.dense.is_prepacked:
            # Few shapes: oneDNN builds a kernel for each, which takes longer than to run it.
            pooled = F.pad(pooled, (0, 0, 0, -samples % _SAMPLES_TOGETHER))
        return self.classifier(self.activation(self.dense(pooled)))[:samples].float()


@dataclass(frozen=True, kw_only=True, eq=False)
class _ExitHead:
    weight: Tensor  # (1, H)
    bias: Tensor  # (1,)

    def __call__(self, pooled: Tensor) -> Tensor:
        return F.linear(pooled, self.weight, self.bias).float().sigmoid().squeeze(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Embeddings:
    word: Tensor  # (V, E); E is H but where there is a projection
    position: Tensor  # (P, E)
    token_type: Tensor | None  # (S, E)
    norm: _Norm
    projection: _Linear | None  # E -> H
    padding_id: int | None
    """RoBERTa's convention (positions count from ``padding_id + 1``, padding stays at it), or None."""


class PackedEncoder:
    """A DeeBERT model's weights, fused and cast for inference on one device."""

    def __init__(
        self,
        model: DeeBertForSequenceClassification,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the weights of `model`; the model itself is neither changed nor kept."""
        config, backbone = model.config, model.config.backbone_config
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = dtype
        self.num_layers: int = config.num_hidden_layers
        self.num_labels = len(model.final_classifier.classifier.weight)
        self.hidden_size: int = config.hidden_size
        self.pooling = config.off_ramp_pooling
        self.pooled_size: int = config.pooled_size
        self.problem = config.problem
        self.has_token_types = config.has_token_types
        self._heads: int = backbone.num_attention_heads
        cast = _Cast(self.device, dtype, family := family_of(backbone))
        self._activation = ACT2FN[getattr(backbone, family.activation)]
        self._embeddings = cast.embeddings(model)
        self._layers = [cast.layer(layer) for layer in family.layers_of(model.backbone)]
        shared = None if model.off_ramp_pooler is None else cast.linear(model.off_ramp_pooler)
        self._off_ramps = {
            layer: cast.off_ramp(ramp, shared)
            for layer, ramp in zip(config.off_ramp_layers, model.off_ramps, strict=True)
        }
        self._off_ramps[self.num_layers] = cast.off_ramp(model.final_classifier, None)
        self._exit_head = None if model.exit_head is None else cast.exit_head(model.exit_head)

    @property
    def off_ramp_layers(self) -> tuple[int, ...]:
        """1-based layers after which `off_ramp` answers, 0 for the embeddings; the last is always among them."""
        return tuple(self._off_ramps)

    @property
    def learns_to_exit(self) -> bool:
        """Whether `answer` can tell how certain it is."""
        return self._exit_head is not None

    @torch.inference_mode()
    def embed(self, packed: PackedTokens) -> Tensor:
        """Token ids on this device -> (total_tokens, H) states."""
        e = self._embeddings
        states = F.embedding(packed.input_ids, e.word)
        if e.token_type is not None:
            if packed.token_type_ids is None or not self.has_token_types:
                states += e.token_type[0]
            else:
                states += F.embedding(packed.token_type_ids, e.token_type)
        states += F.embedding(self._positions(packed), e.position)
        states = e.norm(states)
        return states if e.projection is None else e.projection(states)

    @torch.inference_mode()
    def layer(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        """Run transformer layer `index` (0-based): (total_tokens, H) -> (total_tokens, H)."""
        w = self._layers[index]
        tokens, hidden = states.shape
        qkv = w.qkv(states).view(tokens, 3, self._heads, hidden // self._heads)
        attended = varlen_attention(qkv, layout).view(tokens, hidden)
        states = w.attention_norm(w.attention_output(attended).add_(states))
        inner = self._activation(w.intermediate(states))
        return w.output_norm(w.output(inner).add_(states))

    @torch.inference_mode()
    def pooled(self, states: Tensor, layout: SequenceLayout, query: Tensor | None = None) -> Tensor:
        """What the off-ramps read: (total_tokens, H) -> (N, `pooled_size`), in the dtype of `states`.

        Args:
            states: after a layer, or the embeddings.
            layout: where the sequences lie.
            query: (H,), the off-ramp's own, where pooling is ``attention``.
        """
        if self.pooling == "attention":
            assert query is not None
            return attended_tokens(states, query, layout)
        if self.pooling == "mean":
            return mean_of_tokens(states, layout)
        cls = states.index_select(0, layout.cu_seqlens[:-1])
        return cls if self.pooling == "cls" else torch.cat([cls, mean_of_tokens(states, layout)], dim=1)

    @torch.inference_mode()
    def off_ramp(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        """Logits of the off-ramp after layer `index` (0-based): (total_tokens, H) -> (N, C) float32.

        Index -1 is the off-ramp on the embeddings.
        """
        ramp = self._off_ramps[index + 1]
        return ramp(self.pooled(states, layout, ramp.query))

    @torch.inference_mode()
    def answer(
        self, index: int, states: Tensor, layout: SequenceLayout, *, with_certainty: bool = False
    ) -> OffRampAnswer:
        """What the off-ramp after layer `index` (0-based) says of N sequences, and how sure it is.

        Args:
            index: of the layer; -1 for the embeddings.
            states: (total_tokens, H).
            layout: where the N sequences lie.
            with_certainty: whether to ask the learning-to-exit head, which the model then has.
        """
        ramp = self._off_ramps[index + 1]
        pooled = self.pooled(states, layout, ramp.query)
        logits = ramp(pooled)
        certainty = None
        if with_certainty:
            assert self._exit_head is not None
            certainty = self._exit_head(pooled)
        return OffRampAnswer(logits=logits, entropy=self.problem.entropy(logits), certainty=certainty)

    def _positions(self, packed: PackedTokens) -> Tensor:
        layout, padding = packed.layout, self._embeddings.padding_id
        starts = np.repeat(layout.offsets[:-1], layout.lengths)
        if padding is None:
            return torch.from_numpy(np.arange(layout.total_tokens) - starts).to(
                self.device, non_blocking=True
            )
        # Count the tokens that are not padding inside each sequence, as RoBERTa does: a literal "<pad>" in a
        # text is a token that has no position of its own.
        real = packed.input_ids.ne(padding).long()
        counted = F.pad(real.cumsum(0), (1, 0))
        before = counted.index_select(0, torch.from_numpy(starts).to(self.device, non_blocking=True))
        return (counted[1:] - before) * real + padding


@dataclass(frozen=True)
class _Cast:
    """Copies modules' weights to a device and dtype."""

    device: torch.device
    dtype: torch.dtype
    family: Family

    def tensor(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, self.dtype, copy=True).contiguous()

    def linear(self, *modules: Any) -> _Linear:
        weight = self.tensor(torch.cat([m.weight for m in modules]))
        prepack = self._onednn_multiplies()
        return _Linear(
            # On CPUs oneDNN reorders a weight for each product unless it is done once, here.
            weight=torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_TOKENS) if prepack else weight,
            bias=self.tensor(torch.cat([m.bias for m in modules])),
            is_prepacked=prepack,
        )

    def _onednn_multiplies(self) -> bool:
        """In bfloat16 only: float32 is held to transformers' own products, whose summation order differs."""
        on_cpu = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return bool(on_cpu and self.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def norm(self, module: Any) -> _Norm:
        return _Norm(weight=self.tensor(module.weight), bias=self.tensor(module.bias), eps=module.eps)

    def layer(self, module: nn.Module) -> _Layer:
        names, at = self.family, module.get_submodule
        return _Layer(
            qkv=self.linear(at(names.query), at(names.key), at(names.value)),
            attention_output=self.linear(at(names.attention_output)),
            attention_norm=self.norm(at(names.attention_norm)),
            intermediate=self.linear(at(names.intermediate)),
            output=self.linear(at(names.output)),
            output_norm=self.norm(at(names.output_norm)),
        )

    def off_ramp(self, module: Any, shared_dense: _Linear | None) -> _OffRamp:
        return _OffRamp(
            dense=self.linear(module.dense) if shared_dense is None else shared_dense,
            activation=module.activation,
            classifier=self.linear(module.classifier),
            query=None if module.query is None else self.tensor(module.query),
        )

    def exit_head(self, module: Any) -> _ExitHead:
        return _ExitHead(weight=self.tensor(module.linear.weight), bias=self.tensor(module.linear.bias))

    def embeddings(self, model: DeeBertForSequenceClassification) -> _Embeddings:
        module, family = model.backbone.embeddings, self.family
        projection = family.projection_of(model.backbone)
        return _Embeddings(
            word=self.tensor(module.word_embeddings.weight),
            position=self.tensor(module.position_embeddings.weight),
            token_type=self.tensor(module.token_type_embeddings.weight) if family.has_token_types else None,
            norm=self.norm(module.LayerNorm),
            projection=None if projection is None else self.linear(projection),
            padding_id=model.config.backbone_config.pad_token_id if family.positions_follow_padding else None,
        )
