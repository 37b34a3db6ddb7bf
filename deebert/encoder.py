"""The inference form: fused weights, packed tokens, one layer at a time.

`embed`, `layer` and `answer` are the three things an engine does with a model; between them it may
regroup sequences as it likes. No padding anywhere. Knows nothing of thresholds, scheduling or training.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deebert import native
from deebert.attention import varlen_attention
from deebert.exit_policy import OffRampAnswer
from deebert.fused import FusedModel, Linear, state_dtype
from deebert.memory import keep_freed_memory
from deebert.packing import PackedTokens, SequenceLayout, rows_of_few_shapes, with_rows_behind
from deebert.pooling import attended_tokens, mean_of_tokens
from deebert.transfer import to_device

if TYPE_CHECKING:
    from deebert.modeling import DeeBertForSequenceClassification

log = logging.getLogger(__name__)


class PackedEncoder:
    """A DeeBERT model's weights, fused and cast for inference on one device."""

    def __init__(
        self,
        model: FusedModel,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the weights of `model`; the model itself is neither changed nor kept."""
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = dtype
        self.num_layers = len(model.layers)
        self.num_labels = model.num_labels
        self.hidden_size = model.hidden_size
        self.intermediate_size = model.intermediate_size
        self.pooling = model.pooling
        self.pooled_size = model.pooled_size
        self.problem = model.problem
        self.has_token_types = model.has_token_types
        self._model = model.to(self.device, dtype)
        products = self._model.layers[0].qkv if self._model.layers else None
        self._has_kernels_by_shape = not isinstance(products, Linear) or products.is_prepacked
        if self.device.type == "cpu" and state_dtype(dtype) == torch.bfloat16 and native.is_missing():
            log.warning(
                "the kernels for this CPU were not compiled, and bfloat16 is slower without: "
                "install a C compiler (gcc), then this package again"
            )

    @classmethod
    def of(
        cls,
        model: DeeBertForSequenceClassification,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PackedEncoder:
        """The inference form of a model in its training form, which is neither changed nor kept."""
        # Imported here: whoever is given fused weights does without transformers, which takes seconds to import.
        from deebert.fusing import fuse

        return cls(fuse(model.config, model.state_dict()), device=device, dtype=dtype)

    @property
    def off_ramp_layers(self) -> tuple[int, ...]:
        """1-based layers after which `off_ramp` answers, 0 for the embeddings; the last is always among them."""
        return tuple(self._model.off_ramps)

    @property
    def longest_input(self) -> int:
        """Tokens that there are positions for."""
        positions, padding = len(self._model.embeddings.position), self._model.embeddings.padding_id
        return positions if padding is None else positions - padding - 1

    @property
    def learns_to_exit(self) -> bool:
        """Whether `answer` can tell how certain it is."""
        return self._model.exit_head is not None

    @torch.inference_mode()
    def embed(self, packed: PackedTokens) -> Tensor:
        """Token ids on this device -> (total_tokens, H) states."""
        types = packed.token_type_ids if self.has_token_types else None
        return self._model.embeddings(packed.input_ids, self._positions(packed), types)

    @torch.inference_mode()
    def layers(self, first: int, last: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        """Run transformer layers `first` to `last` (0-based, both included): (total_tokens, H) -> (total_tokens, H)."""
        if self._has_kernels_by_shape:
            states = with_rows_behind(states, rows_of_few_shapes(len(states)))
        for index in range(first, last + 1):
            states = self.layer(index, states, layout)
        return states[: layout.total_tokens]

    @torch.inference_mode()
    def layer(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        """Run transformer layer `index` (0-based): (total_tokens, H) -> (total_tokens, H).

        Rows beyond `total_tokens` may follow, no more than `rows_of_few_shapes` has; they come out as no sequence's.
        """
        w = self._model.layers[index]
        tokens, hidden = states.shape
        qkv = w.qkv(states).view(tokens, 3, self._model.num_heads, hidden // self._model.num_heads)
        attended = varlen_attention(qkv, layout).view(tokens, hidden)
        states = w.attention_norm.of_sum_(w.attention_output(attended), states)
        inner = self._model.activate_(w.intermediate(states))
        return w.output_norm.of_sum_(w.output(inner), states)

    @torch.inference_mode()
    def pooled(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        """What the off-ramp after layer `index` (0-based; -1 for the embeddings) reads.

        Args:
            index: of the layer.
            states: (total_tokens, H), after that layer.
            layout: where the N sequences lie.

        Returns:
            (N, `pooled_size`), in the dtype of `states`.
        """
        if self.pooling == "attention":
            query = self._model.off_ramps[index + 1].query
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
        ramp = self._model.off_ramps[index + 1]
        return ramp(self.pooled(index, states, layout))

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
        ramp = self._model.off_ramps[index + 1]
        pooled = self.pooled(index, states, layout)
        logits = ramp(pooled)
        certainty = None
        if with_certainty:
            assert self._model.exit_head is not None
            certainty = self._model.exit_head(pooled)
        return OffRampAnswer(logits=logits, entropy=self.problem.entropy(logits), certainty=certainty)

    def _positions(self, packed: PackedTokens) -> Tensor:
        layout, padding = packed.layout, self._model.embeddings.padding_id
        starts = np.repeat(layout.offsets[:-1], layout.lengths)
        if padding is None:
            return to_device(torch.from_numpy(np.arange(layout.total_tokens) - starts), self.device)
        # Count the tokens that are not padding inside each sequence, as RoBERTa does: a literal "<pad>" in a
        # text is a token that has no position of its own.
        real = packed.input_ids.ne(padding).long()
        counted = F.pad(real.cumsum(0), (1, 0))
        before = counted.index_select(0, to_device(torch.from_numpy(starts), self.device))
        return (counted[1:] - before) * real + padding
