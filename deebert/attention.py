"""Self-attention over packed sequences: one signature, the fastest backend that the device has.

Sequences never see each other. CUDA in half precision uses PyTorch's variable-length kernel where that runs; CPUs that
multiply bfloat16 run a kernel of our own (`deebert.native`), or, where that cannot, plain batched products over
sequences of about equal length; everything else runs `scaled_dot_product_attention` once for every run of neighbours of
equal length. That is why the engine keeps micro-batches sorted by length. Knows nothing of layers or weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert import native
from deebert.packing import PaddedLayout, SequenceLayout

# Attention scores held at a time: 8 MiB in bfloat16.
_MOST_SCORES = 1 << 22
# Sums of exponentials in this range have lost nothing to overflow or underflow.
_LEAST_SUM, _LARGEST_SUM = 2.0**-100, 2.0**100
# CUDA's kernels have a block of threads for each sequence, in a dimension of the grid that ends there.
_MOST_SEQUENCES = (1 << 16) - 1
_LARGEST_VARLEN_HEAD = 256
# AMX multiplies tiles eight times as fast as AVX-512 its pairs, once sequences fill tiles. Reckoned, not measured.
_LONGEST_WITHOUT_AMX = 64


def varlen_attention(qkv: Tensor, layout: SequenceLayout) -> Tensor:
    """Scaled dot-product self-attention inside each packed sequence.

    Args:
        qkv: (total_tokens, 3, num_heads, head_size), any float dtype; on CPUs some rows more may follow
            (`rows_of_few_shapes`).
        layout: where the sequences lie.

    Returns:
        As many rows as `qkv` has, (num_heads, head_size) each, in its dtype; of those beyond the sequences', finite.
    """
    if qkv.is_cuda:
        return _in_parts(_cuda_varlen if _has_varlen_kernel(qkv) else _sdpa_by_run, qkv, layout)
    if native.attends(qkv) and (layout.max_seqlen <= _LONGEST_WITHOUT_AMX or not _has_amx()):
        return native.attention(qkv, layout)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and _onednn_multiplies_bfloat16():
        attended = _products_by_run(qkv, layout.padded)
        if attended is not None:
            return attended
    return _sdpa_by_run(qkv, layout)


def _has_varlen_kernel(qkv: Tensor) -> bool:
    """What the kernel itself asks for: half precision, heads of a multiple of 8 up to 256, Ampere or newer."""
    size = qkv.shape[-1]
    takes_heads = size % 8 == 0 and size <= _LARGEST_VARLEN_HEAD
    is_half = qkv.dtype in (torch.float16, torch.bfloat16)
    return is_half and takes_heads and torch.cuda.get_device_capability(qkv.device) >= (8, 0)


def _in_parts(
    attend: Callable[[Tensor, SequenceLayout], Tensor],
    qkv: Tensor,
    layout: SequenceLayout,
    *,
    most: int = _MOST_SEQUENCES,
) -> Tensor:
    """What `attend` gives, asked for at most so many sequences at a time."""
    if len(layout) <= most:
        return attend(qkv, layout)
    parts = [layout.lengths[first : first + most] for first in range(0, len(layout), most)]
    rows = qkv.split([int(lengths.sum()) for lengths in parts])
    cut = (SequenceLayout.of(lengths, layout.device) for lengths in parts)
    return torch.cat([attend(*part) for part in zip(rows, cut, strict=True)])


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
    out[token:].zero_()
    return out


def _onednn_multiplies_bfloat16() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _products_by_run(qkv: Tensor, padded: PaddedLayout) -> Tensor | None:
    """Attention as two batched products with an exponential between them; None where a score is too large.

    PyTorch's fused CPU kernel spends 5 µs on each head of each sequence, several times what the products of
    a sentence take. Softmax without its row maximum: `exp2` of the scores is summed by the second product
    itself, through a column of ones beside the values. Padding has zeros there, so it counts for nothing.
    """
    tokens, _, heads, size = qkv.shape
    rows = qkv.view(tokens, -1).index_select(0, padded.source).index_fill_(0, padded.padding, 0)
    ones = qkv.new_ones(len(rows), 1).index_fill_(0, padded.padding, 0)
    out = qkv.new_empty(len(rows), heads, size)
    token = 0
    for _, count, length in padded.runs:
        for together in _powers_of_two(count, most=max(1, _MOST_SCORES // (heads * length * length))):
            here = slice(token, token := token + together * length)
            q, k, v = rows[here].view(-1, length, 3, heads, size).permute(2, 0, 3, 1, 4)
            sums, weighted = _weigh(q, k, v, ones[here].view(-1, 1, length, 1))
            least, largest = (float(x) for x in torch.aminmax(sums))
            if not (least > _LEAST_SUM and largest < _LARGEST_SUM):
                return None
            torch.div(weighted, sums, out=out[here].view(-1, length, heads, size))
    return out.view(len(rows), -1).index_select(0, padded.target[:tokens]).view(tokens, heads, size)


def _powers_of_two(count: int, *, most: int) -> Iterator[int]:
    """Powers of two that add up to `count`, none above `most`, largest first.

    oneDNN builds a kernel for each shape of a batched product, which takes longer than to run it; survivors
    regrouped come in ever new numbers. So there are few shapes, and their kernels are built once.
    """
    while count:
        together = 1 << (min(count, most).bit_length() - 1)
        yield together
        count -= together


def _weigh(q: Tensor, k: Tensor, v: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
    """Σ e^score and Σ e^score · v for each query: (N, L, heads, 1) and (N, L, heads, size).

    Args:
        q: (N, heads, L, size), as are `k` and `v`.
        k: padding holds zeros, in `v` too.
        v: see `k`.
        ones: (N, 1, L, 1), 0 for padding.
    """
    count, heads, length, size = q.shape
    values = v.new_empty(count, heads, length, size + 1)
    values[..., :size], values[..., size:] = v, ones
    q, k = (x.reshape(-1, length, size) for x in (q, k))
    scale = math.log2(math.e) / math.sqrt(size)
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    result = torch.bmm(scores.exp2_(), values.view(-1, length, size + 1)).view(values.shape).transpose(1, 2)
    return result[..., size:], result[..., :size]
