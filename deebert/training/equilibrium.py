"""Gradient equilibrium (Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019).

The paper rescales the gradient where each of k classifiers branches off: what comes from classifier i by
1 / (k - i + 1), what comes from above by (k - i) / (k - i + 1). Multiplied out along the way down, every
classifier that a layer feeds counts with the same factor, one over their number: a layer's gradient is the
mean, not the sum, over the classifiers at or above it, and its size no longer grows with their number. So it
is done here where it ends up, on the parameters' gradients. A classifier's own parameters keep theirs.

AdamW divides a constant factor out again, but for its epsilon: what is left is its effect on the clipped norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from deebert.backbones import family_of
from deebert.modeling import DeeBertForSequenceClassification


def gradient_scales(model: DeeBertForSequenceClassification) -> dict[str, float]:
    """One over the number of classifiers that each of the backbone's parameters feeds, by parameter name."""
    layers = (*model.config.off_ramp_layers, model.config.num_hidden_layers)
    inside = f"backbone.{family_of(model.config.backbone_config).layers}."
    return {
        name: 1 / sum(at >= _depth(name, inside) for at in layers)
        for name, _ in model.named_parameters()
        if name.startswith("backbone.")
    }


@contextmanager
def gradient_equilibrium(model: DeeBertForSequenceClassification) -> Iterator[None]:
    """While the block runs, every gradient that reaches the backbone's parameters is scaled."""
    scales = gradient_scales(model)
    handles = [
        parameter.register_hook(_times(scales[name]))
        for name, parameter in model.named_parameters()
        if name in scales and parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _depth(name: str, inside: str) -> int:
    """1-based layer of a backbone parameter, whose name then begins with `inside`; the embeddings lie at 0."""
    return int(name.removeprefix(inside).split(".")[0]) + 1 if name.startswith(inside) else 0


def _times(scale: float) -> Callable[[Tensor], Tensor]:
    def scaled(gradient: Tensor) -> Tensor:
        return gradient * scale

    return scaled
