"""Self-attention over packed sequences: one signature, the fastest backend that the device has.

Sequences never see each other. CUDA in half precision uses PyTorch's variable-length kernel; everything
else runs `scaled_dot_product_attention` once for every run of neighbours of equal length, which is why the
engine keeps micro-batches sorted by length. Knows nothing of layers or weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.packing import SequenceLayout


def varlen_attention(qkv: Tensor, layout: SequenceLayout) -> Tensor:
    """Scaled dot-product self-attention inside each packed sequence.

    Args:
        qkv: (total_tokens, 3, num_heads, head_size), any float dtype.
        layout: where the sequences lie.

    Returns:
        (total_tokens, num_heads, head_size), in the dtype of `qkv`.
    """
    if qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16):
        return _cuda_varlen(qkv, layout)
    return _sdpa_by_run(qkv, layout)


def _cuda_varlen(qkv: Tensor, layout: SequenceLayout) -> Tensor:
    # Imported here: the module exists from torch 2.10 on, and only CUDA needs it.
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    out = varlen_attn(q, k, v, cu, cu, longest, longest)
    assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


def _sdpa_by_run(qkv: Tensor, layout: SequenceLayout) -> Tensor:
    _, _, heads, size = qkv.shape
    out = qkv.new_empty(len(qkv), heads, size)
    token = 0
    for _, count, length in layout.runs:
        rows = slice(token, token := token + count * length)
        # (tokens, 3, heads, size) -> 3 × (count, heads, length, size), without a copy
        q, k, v = qkv[rows].view(count, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        out[rows].view(count, length, heads, size).copy_(attended.transpose(1, 2))
    return out
