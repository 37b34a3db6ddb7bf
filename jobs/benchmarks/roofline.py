"""How fast this machine multiplies matrices, in the dtype and with the threads of the run.

The measure for what an encoder reaches: on the layer's own shapes and on one large product, each plain and,
where oneDNN has it, with the weight laid out beforehand. Knows nothing of encoders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.cost import ModelShape
from deebert.fused import quantized_product
from jobs.benchmarks.side_by_side import SideBySide
from jobs.benchmarks.timing import wait_for

# Long enough for a clock, and a square product that no cache holds.
_SECONDS_PER_RUN = 0.1
_LARGE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """A set of matrix products, run over and over for long enough to be timed."""

    multiply: Sequence[Callable[[], Tensor]]
    flops: float
    """Of each product once."""
    times: int

    together: SideBySide
    """Who does so at the same time."""

    def __call__(self) -> float:
        """Run all; returns the FLOPs done."""
        return sum(self.together([self._multiply] * self.together.replicas))

    def _multiply(self) -> float:
        for _ in range(self.times):
            for multiply in self.multiply:
                multiply()
        return self.times * self.flops


def products(
    shape: ModelShape,
    tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    together: SideBySide,
) -> dict[str, Products]:
    """What to time, by name: ``layer`` and ``large``, and the same ``prepacked`` where that exists.

    Args:
        shape: gives the four products of a layer.
        tokens: rows of the left matrices, a micro-batch.
        device: where.
        dtype: of both sides.
        together: who multiplies at the same time.
    """
    h, i, n = shape.hidden_size, shape.intermediate_size, _LARGE[device.type]
    sizes = {
        "layer": [(tokens, h, 3 * h), (tokens, h, h), (tokens, h, i), (tokens, i, h)],
        "large": [(n, n, n)],
    }
    kinds = {"": _plain, " prepacked": _prepacked} if _can_prepack(device, dtype) else {"": _plain}
    if dtype == torch.int8:
        kinds, dtype = {"": _quantized}, torch.float32
    return {
        name + suffix: replace(_repeated(each, kind, device, dtype), together=together)
        for name, each in sizes.items()
        for suffix, kind in kinds.items()
    }


def _repeated(
    sizes: Sequence[tuple[int, int, int]],
    kind: Callable[[Tensor, Tensor], Callable[[], Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> Products:
    flops = float(sum(2 * math.prod(size) for size in sizes))
    multiply = [
        kind(
            torch.randn(rows, inner, device=device, dtype=dtype),
            torch.randn(outer, inner, device=device, dtype=dtype),
        )
        for rows, inner, outer in sizes
    ]
    once = Products(multiply=multiply, flops=flops, times=1, together=SideBySide(1, threads=1))
    return replace(once, times=max(1, math.ceil(_SECONDS_PER_RUN / _seconds(once, device))))


def _seconds(run: Products, device: torch.device) -> float:
    """Of one run, after another that warms up."""
    run()
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def _plain(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return partial(F.linear, x, weight)


def _prepacked(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")


def _quantized(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Of integers, as `deebert.fused.QuantizedLinear` multiplies them, without what is around it."""
    small, outer = x.mul(40).clamp(-127, 127).add(128).to(torch.uint8), len(weight)
    packed = torch.ops.onednn.qlinear_prepack(weight.mul(40).clamp(-127, 127).to(torch.int8), None)
    scale, zero_point = torch.ones(outer), torch.zeros(outer, dtype=torch.int64)
    return partial(quantized_product, small, packed, scale, zero_point)


def _can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    on_cpu = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return bool(on_cpu and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
