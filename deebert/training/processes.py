"""The processes that train together, as `torchrun` or `accelerate launch` started them; one where nobody did.

Knows nothing of what they train.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor


def processes() -> PartialState:
    """This process among all: rank, their number, its device, and a barrier."""
    return PartialState(cpu=not torch.cuda.is_available())


def summed(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if processes().num_processes > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
