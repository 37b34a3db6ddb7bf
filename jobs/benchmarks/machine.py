"""The machine and the software that a result was measured with. Knows nothing of what was measured."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from deebert import native
from deebert.version import __version__
from pipeline.hardware import cpu_info, cpu_name

_LIBRARIES = ("torch", "transformers", "numpy", "ray", "pyarrow", "onnxruntime", "openvino")
_DECISIVE_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """CPU, memory, GPU, system and library versions, JSON-ready."""
    info = cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "isa": [flag for flag in _DECISIVE_FLAGS if flag in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": native.is_available(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "deebert": __version__,
    }


def now() -> str:
    """The time, to the second, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
