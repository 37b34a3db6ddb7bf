"""How many tokens a micro-batch takes when nobody says.

Enough that the device computes longer than the host takes to queue it, few enough that what waits between
the layers fits into memory. Knows nothing of samples.
"""

from __future__ import annotations

import torch

from deebert.encoder import PackedEncoder

ON_CPU = 2048
"""1,024 to 4,096 are level: a core is busy with far less."""
_LEAST_ON_GPU = 2048
# FLOPs of a layer that take a GPU of 600 TFLOP/s 0.4 ms, where queueing it takes the host 0.1 to 0.2.
_LAYER_FLOPS = 2.4e11
# Of the memory that is free once the weights are there: the audit lane's engine has as much again.
_MEMORY_SHARE = 0.4
# Input, query, key and value, what attention gives, and the output.
_STATES_OF_A_LAYER = 6


def micro_batch_tokens(encoder: PackedEncoder, *, segments: int, under_way: int) -> int:
    """Most tokens in a micro-batch on the encoder's device, at least its longest input.

    Args:
        encoder: on the device that it will run on.
        segments: between which samples wait.
        under_way: micro-batches started before the oldest is waited for.
    """
    budget = ON_CPU
    if encoder.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(encoder.device)
        waiting = segments * (1 + under_way) + 2 * under_way
        budget = on_gpu(
            hidden_size=encoder.hidden_size,
            intermediate_size=encoder.intermediate_size,
            states=waiting + _STATES_OF_A_LAYER,
            value_bytes=encoder.dtype.itemsize,
            free_bytes=free,
        )
    return max(budget, encoder.longest_input)


def on_gpu(
    *, hidden_size: int, intermediate_size: int, states: int, value_bytes: int, free_bytes: int
) -> int:
    """A power of two.

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
    return max(_LEAST_ON_GPU, 1 << (int(budget).bit_length() - 1))
