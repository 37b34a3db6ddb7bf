"""Which number format to compute in: what ``auto`` means on this machine.

Knows nothing of models: only what the hardware multiplies fast.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_precision(asked: str, *, has_gpu: bool | None = None) -> Precision:
    """``auto`` is bfloat16 on GPUs and on CPUs that multiply it natively, else float32.

    Args:
        asked: ``auto`` or a precision.
        has_gpu: whether the work runs on GPUs, perhaps of other machines; None asks this one.

    Raises:
        ValueError: neither ``auto`` nor a precision.
    """
    if asked == "auto":
        on_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
        return "bfloat16" if on_gpu or _cpu_multiplies_bfloat16() else "float32"
    if asked not in DTYPES:
        raise ValueError(f"unknown precision {asked!r}: choose auto, {', '.join(DTYPES)}")
    return asked


def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
