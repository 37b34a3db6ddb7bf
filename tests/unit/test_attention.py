"""Attention over packed sequences against softmax attention written out, one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deebert.attention import (
    _has_varlen_kernel,
    _in_parts,
    _onednn_multiplies_bfloat16,
    _powers_of_two,
    _products_by_run,
    _sdpa_by_run,
    varlen_attention,
)
from deebert.packing import SequenceLayout, rows_of_few_shapes


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


@pytest.mark.parametrize("most", [1, 2, 3, 6, 7])
def test_more_sequences_than_a_kernel_takes_are_attended_to_in_parts(most: int) -> None:
    layout = SequenceLayout.of([5, 1, 5, 5, 2, 2, 1])
    qkv = random_qkv(layout.total_tokens)
    asked: list[int] = []

    def kernel(rows: Tensor, part: SequenceLayout) -> Tensor:
        assert len(rows) == part.total_tokens == int(part.cu_seqlens[-1])
        asked.append(len(part))
        return _sdpa_by_run(rows, part)

    attended = _in_parts(kernel, qkv, layout, most=most)

    torch.testing.assert_close(attended, _sdpa_by_run(qkv, layout), atol=1e-6, rtol=0)
    assert sum(asked) == 7
    assert max(asked) <= most


@pytest.mark.parametrize("size", [26, 264])
def test_the_variable_length_kernel_takes_heads_of_multiples_of_8_up_to_256(size: int) -> None:
    assert not _has_varlen_kernel(torch.empty(1, 3, 1, size, dtype=torch.bfloat16))


def test_keeps_bfloat16() -> None:
    qkv = random_qkv(6).bfloat16()
    layout = SequenceLayout.of([2, 4])

    out = varlen_attention(qkv, layout)

    assert out.dtype == torch.bfloat16
    expected = torch.cat([plain_attention(part) for part in qkv.float().split([2, 4])])
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)


class TestBfloat16OnCpus:
    """Batched products without the row maximum, held to float32."""

    @pytest.fixture(autouse=True)
    def _needs_bfloat16(self) -> None:
        if not _onednn_multiplies_bfloat16():
            pytest.skip("this CPU does not multiply bfloat16")

    @pytest.mark.parametrize(
        "lengths", [[1], [7], [8, 8, 3], [1, 2, 3, 4], [25, 1, 9, 9, 30], [40, 8, 40], [300, 299, 2]]
    )
    def test_is_within_rounding_of_float32(self, lengths: list[int]) -> None:
        layout = SequenceLayout.of(lengths)
        qkv = random_qkv(layout.total_tokens).bfloat16()

        attended = _products_by_run(qkv, layout.padded)

        assert attended is not None
        exact = varlen_attention(qkv.float(), layout)
        # Values are of order 1; bfloat16 keeps 8 bits, and scores, sums and quotients are each rounded to it.
        torch.testing.assert_close(attended.float(), exact, atol=0.03, rtol=0)
        assert (attended.float() - exact).pow(2).mean().sqrt() < 0.005

    @pytest.mark.parametrize("size", [1.0, 1e4], ids=["fast", "slower way"])
    def test_rows_that_follow_change_nothing_and_stay_finite(self, size: float) -> None:
        layout = SequenceLayout.of([70, 60])
        assert rows_of_few_shapes(130) == 132
        qkv = random_qkv(132).bfloat16()
        qkv[5] *= size
        qkv[130:] = math.nan

        attended = varlen_attention(qkv, layout)

        assert torch.equal(attended[:130], varlen_attention(qkv[:130], layout))
        assert attended.isfinite().all()

    def test_more_scores_than_are_held_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layout = SequenceLayout.of([5, 6, 7, 8, 8, 8, 30])
        qkv = random_qkv(layout.total_tokens).bfloat16()
        at_once = _products_by_run(qkv, layout.padded)

        monkeypatch.setattr("deebert.attention._MOST_SCORES", 2 * 2 * 8 * 8)

        assert torch.equal(_products_by_run(qkv, layout.padded), at_once)  # type: ignore[arg-type]

    def test_padding_counts_for_nothing(self) -> None:
        # One sequence of 3 is padded to 8: were its padding to count, the mean of its values would shrink.
        qkv = torch.zeros(3, 3, 2, 8, dtype=torch.bfloat16)
        qkv[:, 2] = 1.0

        out = _products_by_run(qkv, SequenceLayout.of([3]).padded)

        assert out is not None
        assert torch.equal(out, torch.ones_like(out))

    @pytest.mark.parametrize("size", [200.0, 1e4])
    def test_scores_out_of_range_take_the_slower_way(self, size: float) -> None:
        layout = SequenceLayout.of([4, 4, 2])
        qkv = random_qkv(10).bfloat16()
        qkv[5] *= size

        assert _products_by_run(qkv, layout.padded) is None
        assert torch.equal(varlen_attention(qkv, layout), _sdpa_by_run(qkv, layout))

    def test_very_negative_scores_take_the_slower_way(self) -> None:
        qkv = torch.full((2, 3, 1, 8), 20.0, dtype=torch.bfloat16)
        qkv[:, 1] = -20.0

        assert _products_by_run(qkv, SequenceLayout.of([2]).padded) is None
        assert varlen_attention(qkv, SequenceLayout.of([2])).eq(20.0).all()


@given(count=st.integers(0, 3_000), most=st.integers(1, 500))
def test_batched_products_come_in_few_sizes(count: int, most: int) -> None:
    sizes = list(_powers_of_two(count, most=most))

    assert sum(sizes) == count
    assert all(size <= most and size.bit_count() == 1 for size in sizes)
