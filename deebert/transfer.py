"""Copies between host and device that nobody waits for.

A copy is asynchronous only from or to pinned memory; pageable memory makes the host wait for everything that the
device has yet to do. Pinned memory comes from torch's caching allocator, which does not hand it out again before
the copy is done. On CPUs there is nothing to copy. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """The same values on `device`; `value` may be changed or freed at once."""
    if value.is_cuda or torch.device(device).type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def to_host(value: Tensor) -> Tensor:
    """The same values on the host, valid once the device has done what it was asked so far."""
    if not value.is_cuda:
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
