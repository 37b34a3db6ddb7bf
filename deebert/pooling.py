"""What off-ramps read of packed token states, with no padding and no loop over sequences.

Sequences are segments; for attention on CPUs, neighbours of equal length are one dense view. Knows nothing of
layers or off-ramps. `deebert.modeling.pool` is the same for padded states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert import native
from deebert.packing import SequenceLayout


def mean_of_tokens(states: Tensor, layout: SequenceLayout) -> Tensor:
    """Mean of each sequence's states: (total_tokens, H) -> (N, H), in the dtype of `states`."""
    if native.takes_rows(states):
        return native.mean(states, layout)
    # It sums rows in one pass, half precision in float32; `segment_reduce` takes ten times as long on CPUs, and on GPUs
    # a copy of all states in float32.
    every_row = torch.arange(len(states), dtype=torch.int32, device=states.device)
    return F.embedding_bag(every_row, states, layout.cu_seqlens[:-1], mode="mean")


def attended_tokens(states: Tensor, query: Tensor, layout: SequenceLayout) -> Tensor:
    """Mean of each sequence's states, weighted by the softmax of their products with a query.

    Args:
        states: (total_tokens, H), any float dtype.
        query: (H,).
        layout: where the sequences lie.

    Returns:
        (N, H), in the dtype of `states`; scores and weights are float32.
    """
    if native.takes_rows(states) and native.takes_rows(query):
        return native.attended(states, query, layout)
    scores = states.float() @ query.float()
    return (_weighted_by_segment if states.is_cuda else _weighted_by_run)(states, scores, layout)


def _weighted_by_run(states: Tensor, scores: Tensor, layout: SequenceLayout) -> Tensor:
    pooled = states.new_empty(len(layout), 1, states.shape[1])
    token = 0
    for first, count, length in layout.runs:
        rows = slice(token, token := token + count * length)
        weights = scores[rows].view(count, 1, length).softmax(-1).to(states.dtype)
        torch.bmm(weights, states[rows].view(count, length, -1), out=pooled[first : first + count])
    return pooled.squeeze(1)


def _weighted_by_segment(states: Tensor, scores: Tensor, layout: SequenceLayout) -> Tensor:
    offsets = layout.cu_seqlens.long()
    largest = torch.segment_reduce(scores, "max", offsets=offsets)
    # The number of tokens is known here, so that nobody waits for the device to count them.
    largest = largest.repeat_interleave(offsets.diff(), output_size=len(scores))
    weights = (scores - largest).exp()
    sums = torch.segment_reduce(weights, "sum", offsets=offsets)
    weighted = torch.segment_reduce(states.float() * weights[:, None], "sum", offsets=offsets)
    return (weighted / sums[:, None]).to(states.dtype)
