"""The recipes that `python -m jobs.recipes` compares, by name. Knows nothing of how a variant is trained or judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Flags of `deebert train`, and models of other variants that it builds on."""

    flags: Mapping[str, Any]
    start: str | None = None
    """The variant whose model it goes on with, instead of the backbone."""
    teacher: str | None = None
    """The variant whose model teaches it."""
    share: float = 1.0
    """Of the budget's epochs of stage 1."""

    @property
    def builds_on(self) -> frozenset[str]:
        """The variants that are trained before it."""
        return frozenset(name for name in (self.start, self.teacher) if name is not None)


@dataclass(frozen=True, kw_only=True)
class Static:
    """The backbone cut after so many layers and fine-tuned with the budget of stage 1."""

    depth: int
    like: str
    """The variant that it is compared with: its tokenizer, pooling and labels."""

    @property
    def builds_on(self) -> frozenset[str]:
        """See `Trained.builds_on`."""
        return frozenset({self.like})


@dataclass(frozen=True, kw_only=True)
class Between:
    """Nothing is trained: weights on the line between two models, of which the second began as the first."""

    start: str
    towards: str
    shares: tuple[float, float]
    """How far from the one, 0, to the other, 1: the first layer, and the last."""

    @property
    def builds_on(self) -> frozenset[str]:
        """See `Trained.builds_on`."""
        return frozenset({self.towards})


Variant = Trained | Static | Between

BASE = "two-stage"
_JOINT = {"recipe": "joint", "self_distillation": 0.5}
_JOINT_FAST = {**_JOINT, "off_ramp_learning_rate": 5e-4}
_ALTERNATING = {"recipe": "alternating", "self_distillation": 0.5, "off_ramp_learning_rate": 5e-4}
_REFRESH = {"recipe": "off-ramps", "self_distillation": 0.7}
_UNIFORM = {**_JOINT_FAST, "weighting": "uniform"}
_BEST_FAST = {"recipe": "best", "stage_2": "fast"}
_BETWEEN = {
    "25": (0.25, 0.25),
    "40": (0.4, 0.4),
    "50": (0.5, 0.5),
    "75": (0.75, 0.75),
    "60-0": (0.6, 0.0),
    "70-0": (0.7, 0.0),
    "80-0": (0.8, 0.0),
    "90-0": (0.9, 0.0),
    "100-0": (1.0, 0.0),
    "100-40": (1.0, 0.4),
    "0-100": (0.0, 1.0),
}


def _other_poolings() -> Mapping[str, Variant]:
    """Two stages, three, and ever less of the third further down, for each pooling but the mean."""
    variants: dict[str, Variant] = {}
    for pooling in ("cls", "both", "attention"):
        stage_2 = {"stage_2": "exact"} if pooling == "attention" else {}
        start, towards = f"{BASE}-{pooling}", f"continued-{pooling}"
        variants[start] = Trained(flags={"off_ramp_pooling": pooling, **stage_2})
        variants[towards] = Trained(flags=_UNIFORM, start=start, teacher=start)
        variants[f"continued-100-0-{pooling}"] = Between(start=start, towards=towards, shares=(1.0, 0.0))
    return variants


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        BASE: Trained(flags={}),
        "two-stage-exact": Trained(flags={"recipe": "off-ramps", "stage_2": "exact"}, start=BASE),
        "two-stage-distilled": Trained(flags=_REFRESH, start=BASE),
        "static-6": Static(depth=6, like=BASE),
        "static-4": Static(depth=4, like=BASE),
        "joint": Trained(flags={"recipe": "joint"}),
        "joint-distilled": Trained(flags=_JOINT),
        "joint-uniform": Trained(flags={**_JOINT, "weighting": "uniform"}),
        "joint-equilibrium": Trained(flags={**_JOINT, "weighting": "equilibrium"}),
        "joint-fast-off-ramps": Trained(flags=_JOINT_FAST),
        "joint-refreshed": Trained(flags=_REFRESH, start="joint-fast-off-ramps"),
        "alternating": Trained(flags=_ALTERNATING),
        "alternating-refreshed": Trained(flags=_REFRESH, start="alternating"),
        "taught": Trained(flags=_JOINT_FAST, teacher=BASE),
        "taught-refreshed": Trained(flags=_REFRESH, start="taught"),
        "taught-hidden": Trained(flags={**_JOINT_FAST, "teacher_hidden_weight": 1.0}, teacher=BASE),
        "longer": Trained(flags={"recipe": "two-stage"}, start=BASE),
        "continued": Trained(flags=_UNIFORM, start=BASE, teacher=BASE),
        "continued-third": Trained(flags=_UNIFORM, start=BASE, teacher=BASE, share=1 / 3),
        "continued-third-linear": Trained(flags=_JOINT_FAST, start=BASE, teacher=BASE, share=1 / 3),
        "continued-linear": Trained(flags=_JOINT_FAST, start=BASE, teacher=BASE),
        "continued-alone": Trained(flags=_UNIFORM, start=BASE),
        "continued-labels": Trained(flags={**_UNIFORM, "self_distillation": 0.0}, start=BASE, teacher=BASE),
        "continued-refreshed": Trained(flags=_REFRESH, start="continued"),
        **{
            f"continued-{name}": Between(start=BASE, towards="continued", shares=shares)
            for name, shares in _BETWEEN.items()
        },
        "continued-100-0-refreshed": Trained(flags=_REFRESH, start="continued-100-0"),
        "continued-100-0-both-refreshed": Trained(flags=_REFRESH, start="continued-100-0-both"),
        **_other_poolings(),
        # Stage 2 fast: attention starts as the mean and is learned by the third stage alone.
        "best-attention": Trained(flags={**_BEST_FAST, "interpolation": (1.0, 0.0)}),
        "best-attention-whole": Trained(flags=_BEST_FAST),
    }
)
"""``continued-attention`` is what `--recipe best` makes, ``continued-cls`` with [CLS] states instead of attention."""
