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


def resolve_precision(asked: str) -> Precision:
    """``auto`` is bfloat16 on GPUs and CPUs that multiply it natively, else float32.

    Raises:
        ValueError: neither ``auto`` nor a precision.
    """
    if asked == "auto":
        return "bfloat16" if _multiplies_bfloat16() else "float32"
    if asked not in DTYPES:
        raise ValueError(f"unknown precision {asked!r}: choose auto, {', '.join(DTYPES)}")
    return asked  # type: ignore[return-value]


def _multiplies_bfloat16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
