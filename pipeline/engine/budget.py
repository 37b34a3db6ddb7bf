"""How many tokens a micro-batch takes when nobody says, and how to tell that they were too many.

Enough that what a step costs beside its products hardly counts, few enough that the device's memory serves
them well. Knows nothing of samples.
"""

from __future__ import annotations

import torch

from deebert.fused import state_dtype
from deebert.memory import LARGEST_KEPT_BYTES

_MOST_ON_CPU, _LEAST = 4096, 512
_LEAST_ON_GPU = 2048
# With exits most steps run one layer. FLOPs of one that take a GPU of 600 TFLOP/s 1.6 ms, where a step takes the host
# about 1 (`DECISIONS.md`).
_LAYER_FLOPS = 1e12
# Nothing leaves before so many tokens wait, or input is at an end.
_MOST_ON_GPU = 1 << 18
# Of the memory that is free once the weights are there: the audit lane's engine has as much again.
_MEMORY_SHARE = 0.4
# Input, query, key and value, what attention gives, and the output.
_STATES_OF_A_LAYER = 6
# The last is what CUDA itself says, of kernels that it loads when they are first run and of pinned memory.
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def under_way(device: torch.device) -> int:
    """How many micro-batches to start before the oldest is waited for.

    A GPU works on one while the host learns who leaves the other; on a CPU nothing would overlap.
    """
    return 2 if device.type == "cuda" else 1


def most_held(at_once: int) -> int:
    """How many micro-batches of states a `LayerBuffer` may hold in memory, with so many under way.

    One more than it has waiting: of the oldest chunk all is kept until the last of it is taken.
    """
    return at_once + 2


def micro_batch_tokens(
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden_size: int,
    intermediate_size: int,
    segments: int,
) -> int:
    """Most tokens in a micro-batch on `device`: a power of two.

    Args:
        device: as it is now, with the model's weights on it.
        dtype: of the layers' products.
        hidden_size: width of a token's state.
        intermediate_size: of the feed-forward block.
        segments: between which samples wait, as states; before the first they are token ids, on the host.
    """
    value_bytes = state_dtype(dtype).itemsize
    if device.type != "cuda":
        return on_cpu(intermediate_size=intermediate_size, value_bytes=value_bytes)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch keeps for reuse is not in use.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    at_once = under_way(device)
    return on_gpu(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        states=(segments - 1) * most_held(at_once) + 2 * at_once + _STATES_OF_A_LAYER,
        value_bytes=value_bytes,
        free_bytes=free,
    )


def on_cpu(*, intermediate_size: int, value_bytes: int) -> int:
    """As many as the C library still keeps the feed-forward block's activations for, its largest tensor.

    Arguments as of `on_gpu`.
    """
    kept = (LARGEST_KEPT_BYTES - 1) // (intermediate_size * value_bytes)
    return max(_LEAST, min(_MOST_ON_CPU, _power_of_two(kept)))


def on_gpu(
    *, hidden_size: int, intermediate_size: int, states: int, value_bytes: int, free_bytes: int
) -> int:
    """As many as keep the device busy for longer than it takes to queue them, or as fit.

    Args:
        hidden_size: width of a token's state.
        intermediate_size: of the feed-forward block, which is there twice: before and after its activation.
        states: how many of a micro-batch's size there may be at a time.
        value_bytes: of one number of a state.
        free_bytes: memory to share.
    """
    token_bytes = value_bytes * (states * hidden_size + 2 * intermediate_size)
    layer_flops = 2 * (4 * hidden_size * hidden_size + 2 * hidden_size * intermediate_size)
    budget = min(_MEMORY_SHARE * free_bytes / token_bytes, _LAYER_FLOPS / layer_flops)
    return max(_LEAST_ON_GPU, min(_MOST_ON_GPU, _power_of_two(int(budget))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: a GPU's, or the process's.

    torch's allocator on CPUs has no type of its own for that, nor have cuBLAS and CUDA: they raise a RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _power_of_two(most: int) -> int:
    return 1 << max(0, most.bit_length() - 1)
