"""Exit profiles that are set rather than learned: what share of the samples leaves after each layer.

With them a model of random weights, whose off-ramps know nothing, can be timed at any mean exit layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deebert.exit_policy import OffRampAnswer
from deebert.transfer import to_device

Shares = npt.NDArray[np.float64]


class ScriptedExits:
    """An exit policy that lets a set share of the samples leave after each layer.

    Those who leave are spread evenly over the samples in the order in which the layer meets them, whatever
    the micro-batches: so the histogram is exact to one sample a layer, and no length is favoured. Counts as
    it goes, so that one object serves one run.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        """Script a run.

        Args:
            shares: of all samples, one for each layer; they add up to 1, and the last is whoever is left.
        """
        self.shares: Shares = np.asarray(shares, np.float64)
        if self.shares.min() < 0 or abs(self.shares.sum() - 1) > 1e-9:
            raise ValueError(f"the shares {list(shares)} are not all above 0 with a sum of 1")
        remaining = 1 - np.concatenate(([0.0], np.cumsum(self.shares)[:-1]))
        self._leaving = np.divide(self.shares, remaining, out=np.zeros(len(shares)), where=remaining > 1e-12)
        # By layer: who leaves, of the samples as they come, and how many have come.
        self._script = [torch.zeros(0, dtype=torch.bool)] * len(shares)
        self._met = [0] * len(shares)

    def can_fire(self, layer: int) -> bool:
        """Every off-ramp after a layer is computed, as with a threshold, whether or not anyone leaves."""
        return layer > 0

    @property
    def reads_certainty(self) -> bool:
        """See `ExitPolicy`."""
        return False

    def fires(self, layer: int, answer: OffRampAnswer) -> Tensor:
        """See `ExitPolicy`."""
        first, stop = self._met[layer - 1], self._met[layer - 1] + len(answer)
        if stop > len(self._script[layer - 1]):
            self._write(layer - 1, 2 * stop)
        self._met[layer - 1] = stop
        # Not waited for, or no two micro-batches would ever be under way at once.
        return to_device(self._script[layer - 1][first:stop], answer.logits.device)

    def _write(self, index: int, samples: int) -> None:
        """Ahead, and seldom: what is computed in each step would be counted as the price of exits."""
        # The k-th sample leaves when k·share reaches the next whole number (half a number early, so that
        # a layer's rounding is even-handed).
        reached = np.floor(np.arange(samples + 1) * self._leaving[index] + 0.5)
        self._script[index] = torch.from_numpy(np.diff(reached) > 0)

    def to_dict(self) -> dict[str, Any]:
        """See `ExitPolicy`."""
        return {"type": "scripted", "shares": self.shares.tolist()}


def shares_with_mean(mean_exit_layer: float, num_layers: int) -> Shares:
    """The widest profile with this mean: the maximum-entropy distribution, ``share ∝ ratio^layer``.

    Some leave at the first layer and some never, as in real models; at the middle it is uniform.

    Args:
        mean_exit_layer: between 1 and `num_layers`, both excluded.
        num_layers: the model's depth.

    Raises:
        ValueError: a mean that no profile of this depth has.
    """
    if not 1 < mean_exit_layer < num_layers:
        raise ValueError(f"no profile of {num_layers} layers has the mean exit layer {mean_exit_layer}")
    layers = np.arange(1.0, num_layers + 1)
    low, high = -50.0, 50.0  # logarithms of the ratio; the mean grows with it
    for _ in range(100):
        middle = (low + high) / 2
        if _tilted(layers, middle) @ layers < mean_exit_layer:
            low = middle
        else:
            high = middle
    return _tilted(layers, (low + high) / 2)


def nobody_leaves(num_layers: int) -> Shares:
    """All off-ramps asked, none fires: what early exit costs when it saves nothing."""
    return np.asarray(np.eye(num_layers)[-1])


def _tilted(layers: npt.NDArray[np.float64], log_ratio: float) -> Shares:
    exponents = layers * log_ratio
    weights = np.exp(exponents - exponents.max())
    return np.asarray(weights / weights.sum(), np.float64)
