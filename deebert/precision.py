"""Which number format to compute in: what ``auto`` means on this machine, and what the machine can do.

Knows nothing of models: only what the hardware multiplies fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from deebert.errors import PrecisionError

Precision = Literal["float32", "bfloat16", "float16", "int8"]
DTYPES: Mapping[Precision, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.int8,
    }
)
"""int8: a model's layers multiply integers; what lies between them is float32 (`deebert.fused`)."""
TRAINING_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")


def resolve_precision(asked: str, *, has_gpu: bool | None = None) -> Precision:
    """``auto`` is bfloat16 on GPUs and on CPUs that multiply it natively, else float32.

    int8 is never chosen unasked: how many labels it changes depends on the model, which `deebert bench` measures.

    Args:
        asked: ``auto`` or a precision.
        has_gpu: whether the work runs on GPUs, perhaps of other machines; None asks this one.

    Raises:
        ValueError: neither ``auto`` nor a precision.
        PrecisionError: int8 on a GPU, or on a CPU that would round its sums.
    """
    on_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
    if asked == "int8":
        if on_gpu:
            raise PrecisionError("int8 is for CPUs and this runs on GPUs: give bfloat16")
        if not torch.cpu._is_vnni_supported():
            raise PrecisionError(
                "int8 needs a CPU with VNNI, which this one has not: give bfloat16 or float32"
            )
    if asked == "auto":
        return "bfloat16" if on_gpu or _cpu_multiplies_bfloat16() else "float32"
    for precision in DTYPES:
        if asked == precision:
            return precision
    raise ValueError(f"unknown precision {asked!r}: choose auto, {', '.join(DTYPES)}")


def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
