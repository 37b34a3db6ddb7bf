"""When a sample may leave: entropy, and the policies that decide on it.

The rule of the paper (Xin et al., 2020, section 2.2 and Eq. for entropy): a sample leaves at the first
off-ramp whose output entropy is strictly below the threshold S. Layers are counted from 1; an off-ramp on
the embeddings is layer 0. The last layer
is not a policy's business: it always answers. Knows nothing of models, batches or engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.errors import PolicyError


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, ``-Σ p ln p``; (N, C) any float -> (N,) float32.

    Through float32 `log_softmax`: the original's ``-Σ p·log(p)`` is NaN once a probability underflows, so
    that its surest samples never left.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


class ExitPolicy(Protocol):
    """Decides, at an off-ramp, which samples leave."""

    def can_fire(self, layer: int) -> bool:
        """Whether any sample could leave after `layer` (1-based, 0: the embeddings); else its off-ramp is not
        computed."""
        ...

    def fires(self, layer: int, logits: Tensor, entropy: Tensor) -> Tensor:
        """Which samples leave after `layer`.

        Args:
            layer: 1-based, 0 for the embeddings.
            logits: (N, C) float32, of this layer's off-ramp.
            entropy: (N,) float32, nats.

        Returns:
            (N,) bool.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `policy_from_dict`."""
        ...


@dataclass(frozen=True)
class EntropyThreshold:
    """Leave when the entropy is strictly below the threshold: one for all layers, or one per layer."""

    thresholds: float | tuple[float | None, ...] | None
    """Nats. None or a negative number never fires. Entry 0 of a tuple is layer 1's."""
    layer_0: float | None = None
    """Of an off-ramp on the embeddings. None: what `thresholds` says of all layers; a tuple says nothing of it."""

    def __post_init__(self) -> None:
        for value in self._values:
            if value is not None and not math.isfinite(value):
                raise PolicyError(
                    f"the entropy threshold {value} is not a number: give nats between 0 and ln(labels)"
                )

    def at(self, layer: int) -> float | None:
        """The threshold after `layer` (1-based, 0: the embeddings), None where it cannot fire."""
        if layer == 0 and (self.layer_0 is not None or isinstance(self.thresholds, tuple)):
            value = self.layer_0
        else:
            value = self.thresholds[layer - 1] if isinstance(self.thresholds, tuple) else self.thresholds
        # Entropy is never negative, so that 0 cannot fire under a strict `<` either.
        return None if value is None or value <= 0 else value

    def can_fire(self, layer: int) -> bool:
        """See `ExitPolicy`."""
        if isinstance(self.thresholds, tuple) and layer > len(self.thresholds):
            return False
        return self.at(layer) is not None

    def fires(self, layer: int, logits: Tensor, entropy: Tensor) -> Tensor:
        """See `ExitPolicy`."""
        threshold = self.at(layer)
        if threshold is None:
            return torch.zeros(len(entropy), dtype=torch.bool, device=entropy.device)
        return entropy < threshold

    def to_dict(self) -> dict[str, Any]:
        """See `ExitPolicy`."""
        values = list(self.thresholds) if isinstance(self.thresholds, tuple) else self.thresholds
        # Left out where it says nothing: operating points without it keep their form, and their digest.
        return {
            "type": "entropy",
            "thresholds": values,
            **({} if self.layer_0 is None else {"layer_0": self.layer_0}),
        }

    def check(self, *, num_labels: int, num_layers: int) -> None:
        """Refuse what cannot be meant for this model.

        Raises:
            PolicyError: a threshold above ln(num_labels), the largest entropy there is, or a number of
                thresholds that is not the number of layers that can exit.
        """
        values = self.thresholds
        if isinstance(values, tuple) and len(values) != num_layers - 1:
            raise PolicyError(
                f"{len(values)} entropy thresholds for {num_layers} layers: give one, or one for each of the "
                f"{num_layers - 1} layers before the last"
            )
        most = math.log(num_labels)
        for value in self._values:
            if value is not None and value > most:
                raise PolicyError(
                    f"the entropy threshold {value:g} is above ln({num_labels}) = {most:.4g}, the largest entropy "
                    f"of {num_labels} labels: give at most that, or leave it out to run at full depth"
                )

    @property
    def _values(self) -> tuple[float | None, ...]:
        values = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        return (self.layer_0, *values)


FULL_DEPTH = EntropyThreshold(None)
"""No exits: every sample runs through all layers."""


def policy_from_dict(values: dict[str, Any]) -> EntropyThreshold:
    """The policy whose `to_dict` gave `values`.

    Raises:
        PolicyError: an unknown type.
    """
    if values.get("type") != "entropy":
        raise PolicyError(f"unknown exit policy {values.get('type')!r}: this version knows 'entropy'")
    thresholds = values.get("thresholds")
    return EntropyThreshold(
        tuple(thresholds) if isinstance(thresholds, Sequence) else thresholds, values.get("layer_0")
    )
