"""What a process computes on, by the name that its maker gives it. Knows nothing of how fast that is."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Of this machine's processors."""
    return cpu_info().get("model name") or platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Of what a model on `device`, ``cpu`` or ``cuda``, runs on."""
    if device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)
