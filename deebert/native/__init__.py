"""What a model does between its products, in C: bfloat16, on a CPU that has instructions for it.

Each function does what torch's operations do, to within bfloat16's rounding, and faster: made for short sequences and
many heads, one pass over memory each, on as many threads as torch has. Whoever calls one asks before whether it takes
such a tensor; where the C was not compiled (see `kernels.h`), it takes none, and all works without. Knows nothing of
layers or weights.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deebert.packing import IntArray, SequenceLayout, new_rows, samples_of_few_shapes

_WIDTH_OF, _HEAD_OF = 16, 32
MOST_CLASSES = 16
"""That `classify` takes: of more, a product is faster."""


def is_available() -> bool:
    """Whether the kernels were compiled, and this CPU has the instructions."""
    return _library() is not None


def is_missing() -> bool:
    """Whether this CPU has the instructions, and the kernels were not compiled."""
    return torch.cpu._is_avx512_bf16_supported() and not is_available()


def attends(qkv: Tensor) -> bool:
    """Whether `attention` takes such a tensor."""
    return qkv.shape[-1] % _HEAD_OF == 0 and _takes(qkv)


def attention(qkv: Tensor, layout: SequenceLayout) -> Tensor:
    """Scaled dot-product self-attention inside each packed sequence.

    Args:
        qkv: (T, 3, heads, size) bfloat16, `size` a multiple of 32, T no less than the layout's tokens.
        layout: where the sequences lie.

    Returns:
        (T, heads, size) bfloat16; rows beyond the sequences' are 0.
    """
    rows, _, heads, size = qkv.shape
    qkv, out = qkv.contiguous(), qkv.new_empty(rows, heads, size)
    if rows > layout.total_tokens:
        out[layout.total_tokens :] = 0
    scratch_bytes = _compiled().deebert_attention_scratch(layout.max_seqlen, size)
    scratch = qkv.new_empty(torch.get_num_threads(), scratch_bytes, dtype=torch.uint8)
    scale = math.log2(math.e) / math.sqrt(size)
    _run("attention", qkv, layout.offsets, len(layout), heads, size, scale, scratch, scratch_bytes, out)
    return out


def activates(x: Tensor) -> bool:
    """Whether `gelu_` takes such a tensor."""
    return _takes(x) and x.is_contiguous()


def gelu_(x: Tensor) -> Tensor:
    """GELU by the error function, in place: any shape, bfloat16."""
    _run("gelu", x, x.numel())
    return x


def takes_rows(x: Tensor) -> bool:
    """Whether `add_norm_`, `mean` and `attended` take such a tensor, and `embed` tables like it."""
    return x.shape[-1] % _WIDTH_OF == 0 and _takes(x) and x.is_contiguous()


def add_norm_(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalization of `x` + `residual`, in place of `x`: (T, H) bfloat16 each, `weight` and `bias` (H,)."""
    rows, width = x.shape
    residual, room = residual.contiguous(), _row_of_each_thread(x)
    _run("add_norm", x, residual, rows, width, weight, bias, eps, room)
    return x


def embeds(ids: Tensor, table: Tensor) -> bool:
    """Whether `embed` takes such token ids, and tables like this one."""
    return ids.dtype == torch.int32 and ids.is_contiguous() and takes_rows(table)


def embed(
    ids: Tensor,
    positions: Tensor,
    types: Tensor | None,
    *,
    word: Tensor,
    position: Tensor,
    token_type: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Layer normalization of the sum of each token's rows of the tables.

    Args:
        ids: (T,) int32.
        positions: (T,) int64.
        types: (T,) int32; None where all are 0.
        word: table of `ids`, (any, H) bfloat16.
        position: table of `positions`, (any, H) bfloat16.
        token_type: table of `types`, (any, H) bfloat16; None where tokens have no type.
        weight: (H,), the normalization's.
        bias: (H,), the normalization's.
        eps: the normalization's.

    Returns:
        (T, H) bfloat16, with room behind for `rows_of_few_shapes`.

    Raises:
        IndexError: a number is not within its table.
    """
    _refuse_beyond(ids, word)
    _refuse_beyond(positions, position)
    if types is not None and token_type is not None:
        _refuse_beyond(types, token_type)
    width = word.shape[1]
    out, room = new_rows(word, len(ids)), _row_of_each_thread(word)
    _run(
        "embed",
        ids,
        types,
        positions,
        len(ids),
        word,
        token_type,
        position,
        width,
        weight,
        bias,
        eps,
        room,
        out,
    )
    return out


def quantizes(x: Tensor, outputs: int) -> bool:
    """Whether `quantize` takes such a tensor, and `rescale` a product with so many outputs."""
    fits = x.shape[-1] % _WIDTH_OF == 0 and outputs % _WIDTH_OF == 0 and x.is_contiguous()
    return fits and _takes(x)


def quantize(x: Tensor, by: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each row in bytes that span its range: x · by ≈ scale · byte + minimum.

    Args:
        x: (T, W) bfloat16.
        by: (W,) float32, or None for 1.

    Returns:
        (T, W) uint8, (T,) float32 scales, (T,) float32 minima. The scale of a row that has a number which is none, or
        infinite, is not a number; that of a row of equal numbers is 1.
    """
    rows, width = x.shape
    out = x.new_empty(rows, width, dtype=torch.uint8)
    scales, minima = x.new_empty(2, rows, dtype=torch.float32)
    _run("quantize", x, rows, width, by, out, scales, minima)
    return out, scales, minima


def rescale(
    product: Tensor, scale: Tensor, minimum: Tensor, weight_sum: Tensor, bias: Tensor, out: Tensor
) -> None:
    """What the products of quantized rows stand for: product · scale + minimum · weight_sum + bias.

    Args:
        product: (T, W) float32.
        scale: (T,) float32, as of `quantize`.
        minimum: (T,) float32, as of `quantize`.
        weight_sum: (W,) float32, over the inputs.
        bias: (W,) float32.
        out: (T, W) bfloat16, contiguous: the answer.
    """
    rows, width = product.shape
    _run("rescale", product, rows, width, scale, minimum, weight_sum, bias, out)


def gathers(rows: Tensor) -> bool:
    """Whether `gather` takes such a tensor's rows."""
    return rows.device.type == "cpu" and rows.is_contiguous() and _runs()


def gather(parts: Sequence[tuple[Tensor, IntArray]], lengths: IntArray, order: IntArray, out: Tensor) -> None:
    """Sequences of several tensors, one after the other.

    Args:
        parts: tensors with a row per token, and the first row of each sequence that is wanted of them.
        lengths: (N,) rows of each of these sequences.
        order: (N,) which comes first, and so on.
        out: (Σ lengths, …) like the parts, contiguous: where they go.

    Raises:
        ValueError: a part has rows of another kind than `out`.
    """
    if any((rows.dtype, rows.shape[1:]) != (out.dtype, out.shape[1:]) for rows, _ in parts):
        raise ValueError("rows of several kinds cannot be gathered into one tensor: give all alike")
    bytes_a_row = out.itemsize * out[0].numel() if len(out) else 0
    places = [rows.data_ptr() + first * bytes_a_row for rows, first in parts]
    there = np.concatenate(places)[order]
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths[order] * bytes_a_row)))
    assert offsets[-1] == out.nbytes
    _run("gather", there, offsets, len(there), out)


def mean(states: Tensor, layout: SequenceLayout) -> Tensor:
    """Mean of each sequence's rows: (total_tokens, H) -> (N, H), bfloat16, `H` a multiple of 16.

    There is room behind them for `samples_of_few_shapes`.
    """
    samples, width = len(layout), states.shape[1]
    out = states.new_empty(samples_of_few_shapes(samples), width)[:samples]
    _run("mean", states, layout.offsets, samples, width, out)
    return out


def attended(states: Tensor, query: Tensor, layout: SequenceLayout) -> Tensor:
    """As `mean`, weighted by the softmax of the rows' products with a query: (total_tokens, H), (H,) -> (N, H)."""
    (samples, width), threads = (len(layout), states.shape[1]), torch.get_num_threads()
    out = states.new_empty(samples_of_few_shapes(samples), width)[:samples]
    weights = states.new_empty(threads, layout.max_seqlen, dtype=torch.float32)
    _run("attended", states, layout.offsets, samples, width, query, layout.max_seqlen, weights, out)
    return out


def classifies(x: Tensor, classes: int) -> bool:
    """Whether `classify` takes such a tensor, for so many classes."""
    return takes_rows(x) and classes <= MOST_CLASSES


def classify(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh(x) · weightᵀ + bias: (N, W) bfloat16, (C, W) and (C,) -> (N, C) float32."""
    rows, width = x.shape
    out, room = x.new_empty(rows, len(bias), dtype=torch.float32), _row_of_each_thread(x)
    _run("classify", x, rows, width, weight, bias, len(bias), room, out)
    return out


def measures(logits: Tensor) -> bool:
    """Whether `entropy` takes such answers."""
    here = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous()
    return here and 0 < logits.shape[-1] <= MOST_CLASSES and not logits.requires_grad and _runs()


def entropy(logits: Tensor) -> Tensor:
    """-Σ p ln p of softmax(logits), in nats: (..., C) float32 -> (...) float32."""
    out = logits.new_empty(logits.shape[:-1])
    _run("entropy", logits, out.numel(), logits.shape[-1], out)
    return out


def _run(kernel: str, *arguments: Tensor | npt.NDArray[Any] | float | None) -> None:
    """Give a kernel its numbers, where its arrays lie, and torch's threads."""
    function = getattr(_compiled(), f"deebert_{kernel}")
    function(*map(_address, arguments), _fork(), torch.get_num_threads())


def _address(argument: Tensor | npt.NDArray[Any] | float | None) -> float | None:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument.ctypes.data if isinstance(argument, np.ndarray) else argument


def _row_of_each_thread(like: Tensor) -> Tensor:
    """Room for a row of `like` in float32, to work in."""
    return like.new_empty(torch.get_num_threads(), like.shape[1], dtype=torch.float32)


def _refuse_beyond(numbers: Tensor, table: Tensor) -> None:
    if not numbers.numel():
        return
    least, most = (int(x) for x in torch.aminmax(numbers))
    if not 0 <= least <= most < len(table):
        raise IndexError(f"numbers from {least} to {most} in a table of {len(table)} rows")


def _takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and _runs()


def _runs() -> bool:
    """Whether the kernels are there, and as many threads as torch has can be woken."""
    return is_available() and (torch.get_num_threads() == 1 or _fork() is not None)


def _compiled() -> ctypes.CDLL:
    library = _library()
    assert library is not None  # asked before
    return library


@cache
def _library() -> ctypes.CDLL | None:
    """The C, with the types of its functions; a call lets other Python threads run. None where it cannot run."""
    found = importlib.util.find_spec("deebert.native.kernels")
    if found is None or found.origin is None:
        return None
    library = ctypes.CDLL(found.origin)
    if not library.deebert_runs_here():
        return None
    address, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.deebert_attention_scratch.argtypes = [count, count]
    library.deebert_attention_scratch.restype = count
    arguments = {
        "attention": [address, address, count, count, count, real, address, count, address],
        "gelu": [address, count],
        "gather": [address, address, count, address],
        "add_norm": [address, address, count, count, address, address, real, address],
        "embed": [*[address] * 3, count, *[address] * 3, count, address, address, real, address, address],
        "mean": [address, address, count, count, address],
        "attended": [address, address, count, count, address, count, address, address],
        "classify": [address, count, count, address, address, count, address, address],
        "entropy": [address, count, count, address],
        "quantize": [address, count, count, address, address, address, address],
        "rescale": [address, count, count, *[address] * 5],
    }
    for name, types in arguments.items():
        function = getattr(library, f"deebert_{name}")
        function.argtypes, function.restype = [*types, address, count], None
    return library


@cache
def _fork() -> int | None:
    """Where torch's OpenMP wakes its threads; None if that is none that can be asked (see `kernels.h`)."""
    torchs = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # loaded: what it depends on is searched
    try:
        return ctypes.cast(ctypes.CDLL(str(torchs)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
