"""FLOPs of layers and off-ramps, and the expected saving of an exit histogram.

Counts multiply-adds as two operations and nothing but matrix products (GELU, LayerNorm, softmax and
look-ups are bandwidth, not FLOPs). Knows nothing of seconds, prices or runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deebert.config import DeeBertConfig


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers that decide a model's cost."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_labels: int
    off_ramp_pooling: str = "mean"
    """What off-ramps read: `DeeBertConfig.off_ramp_pooling`."""

    @classmethod
    def of(cls, config: DeeBertConfig) -> ModelShape:
        """Those of a model, whatever its family calls them."""
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_labels=len(config.id2label or {}),
            off_ramp_pooling=config.off_ramp_pooling,
        )

    def layer_flops(self, tokens: float, squared_tokens: float) -> float:
        """FLOPs of one transformer layer over packed sequences.

        Args:
            tokens: Σ of sequence lengths.
            squared_tokens: Σ of squared sequence lengths.

        QKV and output projections are 4·H² multiply-adds a token, the feed-forward 2·H·I, attention
        (QKᵀ and the weighted sum) 2·L·H a token.
        """
        h, i = self.hidden_size, self.intermediate_size
        return 2.0 * tokens * (4 * h * h + 2 * h * i) + 4.0 * squared_tokens * h

    def off_ramp_flops(self, samples: float) -> float:
        """FLOPs of one off-ramp (pooler + classifier) for `samples` samples.

        The pooler is H × H, H × 2H where it reads the [CLS] state and the mean. What pooling itself costs is left
        out: attention's two products are 4·H a token, of a layer's 8·H² and more.
        """
        h = self.hidden_size
        read = 2 * h if self.off_ramp_pooling == "both" else h
        return 2.0 * samples * h * (read + self.num_labels)


def mean_exit_layer(exit_histogram: Sequence[int]) -> float:
    """Mean exit layer of a histogram of n + 1 entries: entry i counts samples that left after layer i, entry 0
    those that left after the embeddings. NaN without samples."""
    total = sum(exit_histogram)
    if total == 0:
        return float("nan")
    return sum(i * n for i, n in enumerate(exit_histogram)) / total


def expected_saving(exit_histogram: Sequence[int]) -> float:
    """Share of layer work saved, 1 - Σ i·Nᵢ / (n·Σ Nᵢ) (DeeBERT, Eq. 2), of a histogram as above.

    0 = nothing, 1 = all: everybody left after the embeddings.
    """
    return 1.0 - mean_exit_layer(exit_histogram) / (len(exit_histogram) - 1)
