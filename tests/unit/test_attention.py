"""Attention over packed sequences against softmax attention written out, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deebert.attention import varlen_attention
from deebert.packing import SequenceLayout


def plain_attention(qkv: Tensor) -> Tensor:
    """One sequence: (L, 3, heads, size) -> (L, heads, size)."""
    out = torch.empty(len(qkv), *qkv.shape[2:])
    for head in range(qkv.shape[2]):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        weights = torch.softmax(q @ k.T / math.sqrt(qkv.shape[3]), dim=-1)
        out[:, head] = weights @ v
    return out


def random_qkv(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 3, 2, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "lengths", [[1], [7], [3, 3, 3], [1, 2, 3, 4], [5, 1, 5, 5, 2], [1] * 9, [64, 1, 64]]
)
def test_equals_plain_attention_inside_each_sequence(lengths: list[int]) -> None:
    layout = SequenceLayout.of(lengths)
    qkv = random_qkv(layout.total_tokens)

    expected = torch.cat([plain_attention(part) for part in qkv.split(lengths)])

    torch.testing.assert_close(varlen_attention(qkv, layout), expected, atol=1e-5, rtol=0)


def test_a_single_token_attends_to_itself_alone() -> None:
    qkv = random_qkv(3)

    out = varlen_attention(qkv, SequenceLayout.of([1, 1, 1]))

    torch.testing.assert_close(out, qkv[:, 2], atol=1e-6, rtol=0)


def test_a_neighbour_changes_nothing() -> None:
    layout = SequenceLayout.of([4, 4, 2])
    qkv = random_qkv(10)
    other = qkv.clone()
    other[:4] = random_qkv(4, seed=1) * 100

    before, after = varlen_attention(qkv, layout), varlen_attention(other, layout)

    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])


def test_no_sequences_give_no_rows() -> None:
    assert varlen_attention(random_qkv(0), SequenceLayout.of([])).shape == (0, 2, 8)


def test_keeps_bfloat16() -> None:
    qkv = random_qkv(6).bfloat16()
    layout = SequenceLayout.of([2, 4])

    out = varlen_attention(qkv, layout)

    assert out.dtype == torch.bfloat16
    expected = torch.cat([plain_attention(part) for part in qkv.float().split([2, 4])])
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)
