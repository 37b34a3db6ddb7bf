"""Which number format to compute in: what ``auto`` means on this machine, and what the machine can do.

Knows nothing of models: only what the hardware multiplies fast.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch

from deebert.errors import PrecisionError

log = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16", "int8"]
DTYPES: Mapping[Precision, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.int8,
    }
)
"""int8: a model's layers multiply integers; what lies between them is `deebert.fused.state_dtype`."""
TRAINING_PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")


LEAST_INT8_AGREEMENT = 0.995
"""Share of labels that int8 must leave as float32 has them to be chosen unasked."""


def resolve_precision(
    asked: str, *, has_gpu: bool | None = None, int8_agreement: float | None = None
) -> Precision:
    """``auto`` is the fastest that keeps the labels.

    On GPUs that is bfloat16, or float16 where those of this machine emulate it (before Ampere); on CPUs int8 where they
    have VNNI and the model was found to keep its labels, else bfloat16 where they multiply it natively, else float32.

    Args:
        asked: ``auto`` or a precision.
        has_gpu: whether the work runs on GPUs, perhaps of other machines; None asks this one.
        int8_agreement: `DeeBertConfig.int8_agreement`. How many labels int8 changes depends on the model: it is not
            chosen where nobody has measured.

    Raises:
        ValueError: neither ``auto`` nor a precision.
        PrecisionError: int8 on a GPU, or on a CPU that would round its sums.
    """
    on_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
    if asked == "int8":
        if on_gpu:
            raise PrecisionError("int8 is for CPUs and this runs on GPUs: give bfloat16")
        if not _cpu_multiplies_int8():
            raise PrecisionError(
                "int8 needs a CPU with VNNI, which this one has not: give bfloat16 or float32"
            )
    if asked == "auto":
        keeps_labels = int8_agreement is not None and int8_agreement >= LEAST_INT8_AGREEMENT
        if keeps_labels and not on_gpu and _cpu_multiplies_int8():
            return "int8"
        if on_gpu:
            return "float16" if _gpu_emulates_bfloat16() else "bfloat16"
        return "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    if asked == "bfloat16" and not on_gpu and not cpu_multiplies_bfloat16():
        log.warning("this CPU emulates bfloat16, which takes longer than float32: give auto")
    # Said by name: auto is bfloat16 too where a driver without a GPU resolved it.
    if asked == "bfloat16" and on_gpu and _gpu_emulates_bfloat16():
        log.warning("this GPU emulates bfloat16, which takes longer than float16: give float16")
    for precision in DTYPES:
        if asked == precision:
            return precision
    raise ValueError(f"unknown precision {asked!r}: choose auto, {', '.join(DTYPES)}")


def _gpu_emulates_bfloat16() -> bool:
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_multiplies_int8() -> bool:
    return bool(torch.cpu._is_vnni_supported())


def cpu_multiplies_bfloat16() -> bool:
    """Natively: oneDNN takes bfloat16 on any CPU with AVX-512, but elsewhere it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
