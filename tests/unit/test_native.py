"""The kernels in C against float64: every number that they may meet, and nothing beyond what they are given."""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig

from deebert import native
from deebert.attention import _sdpa_by_run, varlen_attention
from deebert.config import DeeBertConfig
from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens, SequenceLayout
from pipeline.engine.engine import Engine, EngineConfig
from tests.conftest import fused_model, randomize

COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
needs_kernels = pytest.mark.skipif(
    not native.is_available(), reason="the kernels are not built or this CPU lacks AVX-512 with bfloat16"
)
# bfloat16 keeps 8 bits: rounding to the nearest errs by one part in 2⁸ at most.
HALF_STEP = 2.0**-8


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()


def exact_attention(qkv: Tensor, lengths: list[int]) -> Tensor:
    """In float64, written out."""
    parts = []
    for part in qkv.double().split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)  # 3 × (heads, length, size)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.skipif(
    shutil.which(COMPILER) is None or not torch.cpu._is_avx512_bf16_supported(),
    reason="there is no C compiler, or nothing to compile for",
)
def test_setup_compiles_the_kernels() -> None:
    assert native.is_available()


@needs_kernels
class TestAttention:
    @given(
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
        heads=st.integers(1, 3),
        size=st.sampled_from([32, 64, 96]),
        seed=st.integers(0, 2**31),
        spread=st.sampled_from([0.1, 1.0, 4.0]),
    )
    def test_is_within_rounding_of_float64(
        self, lengths: list[int], heads: int, size: int, seed: int, spread: float
    ) -> None:
        qkv = random(sum(lengths), 3, heads, size, seed=seed, size=spread)

        attended = native.attention(qkv, SequenceLayout.of(lengths))

        exact = exact_attention(qkv, lengths)
        # Weights are rounded once and so is the answer; both err in proportion to the largest value at most.
        error = (attended.double() - exact).abs().max()
        assert error <= 2 * HALF_STEP * qkv[:, 2].abs().max() + 1e-6

    @pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 300, 512])
    def test_any_length(self, length: int) -> None:
        qkv = random(length, 3, 2, 64)

        attended = native.attention(qkv, SequenceLayout.of([length]))

        torch.testing.assert_close(attended.double(), exact_attention(qkv, [length]), atol=0.01, rtol=0)

    def test_errs_no_more_than_torch(self) -> None:
        lengths = [25, 7, 60, 120]
        qkv, layout = random(sum(lengths), 3, 12, 32, size=1.5), SequenceLayout.of(lengths)
        exact = exact_attention(qkv, lengths)

        ours, theirs = (
            (a.double() - exact).square().mean().sqrt()
            for a in (native.attention(qkv, layout), _sdpa_by_run(qkv, layout))
        )

        assert ours <= 1.02 * theirs

    @pytest.mark.parametrize("spread", [1e3, 1e6])
    def test_the_largest_score_takes_all_where_scores_are_huge(self, spread: float) -> None:
        qkv, lengths = random(40, 3, 2, 32), [30, 10]
        qkv[:, 0] *= spread

        attended = native.attention(qkv, SequenceLayout.of(lengths))

        torch.testing.assert_close(attended.double(), exact_attention(qkv, lengths), atol=0.02, rtol=0)

    def test_a_sequence_is_answered_as_if_alone(self) -> None:
        lengths = [9, 33, 1, 64]
        qkv = random(sum(lengths), 3, 2, 32)

        together = native.attention(qkv, SequenceLayout.of(lengths))

        alone = [
            native.attention(part, SequenceLayout.of([len(part)])) for part in qkv.clone().split(lengths)
        ]
        assert torch.equal(together, torch.cat(alone))

    def test_reads_nothing_beyond_the_sequences(self) -> None:
        room = torch.full((60, 3, 2, 32), math.nan, dtype=torch.bfloat16)
        room[10:50] = random(40, 3, 2, 32)
        layout = SequenceLayout.of([17, 23])

        attended = native.attention(room[10:50], layout)

        assert torch.equal(attended, native.attention(room[10:50].clone(), layout))
        assert attended.isfinite().all()

    @pytest.mark.parametrize("size", [32, 64])
    @pytest.mark.parametrize("length", [1, 16, 23, 40])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_writes_nothing_beyond_what_it_is_given(self, length: int, size: int, threads: int) -> None:
        library, heads, guard = native._compiled(), 20, 64
        qkv, offsets = random(length, 3, heads, size), SequenceLayout.of([length]).offsets
        out = torch.full((length * heads * size + 2 * guard,), 7.0, dtype=torch.bfloat16)
        each = library.deebert_attention_scratch(length, size)
        scratch = torch.full((threads * each + 2 * guard,), 7, dtype=torch.uint8)

        library.deebert_attention(
            qkv.data_ptr(),
            offsets.ctypes.data,
            1,
            heads,
            size,
            math.log2(math.e) / math.sqrt(size),
            scratch[guard:].data_ptr(),
            each,
            out[guard:].data_ptr(),
            native._fork(),
            threads,
        )

        for room in (out, scratch):
            assert room[:guard].eq(7).all()
            assert room[-guard:].eq(7).all()
        there = out[guard:-guard].view(length, heads, size)
        assert torch.equal(there, native.attention(qkv, SequenceLayout.of([length])))

    def test_rows_that_follow_come_out_as_zero(self) -> None:
        qkv, layout = random(44, 3, 2, 32), SequenceLayout.of([20, 20])
        qkv[40:] = math.nan

        attended = native.attention(qkv, layout)

        assert attended[40:].eq(0).all()
        assert torch.equal(attended[:40], native.attention(qkv[:40], layout))

    def test_no_sequences_give_no_rows(self) -> None:
        assert native.attention(random(0, 3, 2, 32), SequenceLayout.of([])).shape == (0, 2, 32)

    def test_threads_do_not_disturb_each_other(self) -> None:
        lengths = [30, 5, 61] * 8
        inputs = [random(sum(lengths), 3, 4, 32, seed=seed) for seed in range(4)]
        layout = SequenceLayout.of(lengths)
        expected = [native.attention(qkv, layout) for qkv in inputs]

        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(lambda i: native.attention(inputs[i % 4], layout), range(64)))

        assert all(torch.equal(answer, expected[i % 4]) for i, answer in enumerate(done))

    def test_varlen_attention_takes_it(self) -> None:
        qkv, layout = random(50, 3, 2, 32), SequenceLayout.of([30, 20])

        assert torch.equal(varlen_attention(qkv, layout), native.attention(qkv, layout))


@needs_kernels
class TestGelu:
    def test_every_bfloat16(self) -> None:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        finite = numbers[numbers.isfinite()]

        found = native.gelu_(finite.clone()).double()

        exact = F.gelu(finite.double())
        error = (found - exact).abs()
        # Φ is off by 8e-8 and some float32 rounding beside, times x; then comes the rounding to bfloat16, which takes
        # what is below its smallest normal number for 0.
        assert (error <= exact.abs() * HALF_STEP + finite.double().abs() * 2e-7 + 2.0**-126).all()
        assert (found[finite.double() < -20] == 0).all()

    def test_what_is_no_number_stays_none(self) -> None:
        assert native.gelu_(torch.full((20,), math.nan, dtype=torch.bfloat16)).isnan().all()

    @pytest.mark.parametrize("count", [*range(1, 18), 31, 32, 33])
    def test_any_number_of_them_and_no_more(self, count: int) -> None:
        x = random(count + 32)
        before, one_by_one = x.clone(), torch.cat([native.gelu_(x[i : i + 1].clone()) for i in range(len(x))])

        native.gelu_(x[16 : 16 + count])

        assert torch.equal(x[16 : 16 + count], one_by_one[16 : 16 + count])
        assert torch.equal(x[:16], before[:16])
        assert torch.equal(x[16 + count :], before[16 + count :])


@needs_kernels
class TestAddNorm:
    @pytest.mark.parametrize("width", [16, 32, 384, 1_024])
    @pytest.mark.parametrize("rows", [0, 1, 5])
    def test_is_within_rounding_of_float64(self, rows: int, width: int) -> None:
        x, residual = random(rows, width), random(rows, width, seed=1, size=3.0)
        weight, bias, kept = random(width, seed=2), random(width, seed=3), residual.clone()
        summed = x.double() + residual.double()

        found = native.add_norm_(x, residual, weight, bias, 1e-12)

        exact = F.layer_norm(summed, (width,), weight.double(), bias.double(), 1e-12)
        assert found.data_ptr() == x.data_ptr()
        assert torch.equal(residual, kept)
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=HALF_STEP)

    def test_a_row_of_equal_numbers_is_its_bias(self) -> None:
        x, residual, bias = torch.ones(3, 32).bfloat16(), torch.ones(3, 32).bfloat16(), random(32)

        found = native.add_norm_(x, residual, random(32, seed=1), bias, 1e-12)

        assert torch.equal(found, bias.expand(3, 32))

    def test_a_large_mean_costs_no_digits(self) -> None:
        # The mean of squares less the square of the mean would be all rounding here.
        x, residual = random(4, 64), torch.full((4, 64), 4_096.0).bfloat16()
        weight, bias = torch.ones(64).bfloat16(), torch.zeros(64).bfloat16()
        exact = F.layer_norm(x.double() + 4_096, (64,), eps=1e-12)

        found = native.add_norm_(x, residual, weight, bias, 1e-12)

        torch.testing.assert_close(found.double(), exact, atol=5e-3, rtol=HALF_STEP)


@needs_kernels
class TestEmbed:
    WORD, POSITION, TYPE = random(50, 48), random(20, 48, seed=1, size=0.3), random(2, 48, seed=2)
    NORM = (random(48, seed=3), random(48, seed=4), 1e-12)

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None, **other: Tensor | None) -> Tensor:
        tables = {"word": self.WORD, "position": self.POSITION, "token_type": self.TYPE, **other}
        weight, bias, eps = self.NORM
        return native.embed(ids, positions, types, **tables, weight=weight, bias=bias, eps=eps)  # type: ignore[arg-type]

    def numbers(self, tokens: int, below: int, seed: int) -> Tensor:
        return torch.randint(below, (tokens,), generator=torch.Generator().manual_seed(seed))

    @pytest.mark.parametrize("tokens", [0, 1, 7, 300])
    def test_is_within_rounding_of_float64(self, tokens: int) -> None:
        ids, types = self.numbers(tokens, 50, 0).int(), self.numbers(tokens, 2, 1).int()
        positions = self.numbers(tokens, 20, 2)
        summed = self.WORD.double()[ids] + self.POSITION.double()[positions]
        weight, bias, eps = (x.double() if isinstance(x, Tensor) else x for x in self.NORM)

        for given_types, table, of_types in (
            (types, self.TYPE, self.TYPE.double()[types]),
            (None, self.TYPE, self.TYPE.double()[0]),
            (None, None, 0),
            (types, None, 0),
        ):
            found = self.embed(ids, positions, given_types, token_type=table)

            exact = F.layer_norm(summed + of_types, (48,), weight, bias, eps)  # type: ignore[arg-type]
            assert (found.dtype, found.shape) == (torch.bfloat16, (tokens, 48))
            torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=HALF_STEP)

    @pytest.mark.parametrize("beyond", [-1, 50, 2**31 - 1])
    def test_a_number_beyond_its_table_is_refused(self, beyond: int) -> None:
        fine, places = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([0, 1])
        bad = torch.tensor([3, beyond], dtype=torch.int32)

        for numbers in ((bad, places, None), (fine, bad.long(), None), (fine, places, bad)):
            with pytest.raises(IndexError, match=r"numbers from .* in a table of \d+ rows"):
                self.embed(*numbers)
        assert self.embed(fine, places, bad, token_type=None).isfinite().all()


@needs_kernels
class TestMean:
    @given(
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
        width=st.sampled_from([16, 32, 48, 64, 80, 384]),
        seed=st.integers(0, 2**31),
    )
    def test_is_within_rounding_of_float64(self, lengths: list[int], width: int, seed: int) -> None:
        states = random(sum(lengths), width, seed=seed)

        found = native.mean(states, SequenceLayout.of(lengths))

        exact = torch.stack([part.mean(0) for part in states.double().split(lengths)])
        torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=HALF_STEP)

    def test_stays_within_its_sequences(self) -> None:
        room = torch.full((30, 80), math.nan, dtype=torch.bfloat16)
        room[5:25] = random(20, 80)

        assert native.mean(room[5:25], SequenceLayout.of([7, 13])).isfinite().all()

    def test_no_sequences_have_no_means(self) -> None:
        assert native.mean(random(0, 32), SequenceLayout.of([])).shape == (0, 32)


@needs_kernels
class TestGather:
    def test_writes_every_sequence_in_its_place_and_nothing_beyond(self) -> None:
        one, other = random(6, 16), random(4, 16, seed=1)
        room = torch.full((9, 16), math.nan, dtype=torch.bfloat16)
        lengths, order = np.array([2, 1, 3, 1]), np.array([1, 3, 0, 2])

        native.gather([(one, np.array([4, 0])), (other, np.array([1, 0]))], lengths, order, room[1:8])

        assert torch.equal(room[1:8], torch.cat((one[:1], other[:1], one[4:6], other[1:4])))
        assert room[[0, 8]].isnan().all()

    def test_rows_of_several_kinds_are_refused(self) -> None:
        one = np.array([0])

        with pytest.raises(ValueError, match="rows of several kinds cannot be gathered"):
            native.gather([(random(3, 16).float(), one)], one + 1, one, random(1, 16))

    def test_nothing(self) -> None:
        none = np.zeros(0, np.int64)

        native.gather([(random(3, 16), none)], none, none, random(0, 16))


@needs_kernels
class TestAttended:
    @given(
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
        width=st.sampled_from([16, 32, 48, 64, 80, 384]),
        sharpness=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
        seed=st.integers(0, 2**31),
    )
    def test_is_within_rounding_of_float64(
        self, lengths: list[int], width: int, sharpness: float, seed: int
    ) -> None:
        states, query = random(sum(lengths), width, seed=seed), random(width, seed=seed + 1, size=sharpness)

        found = native.attended(states, query, SequenceLayout.of(lengths))

        parts = states.double().split(lengths)
        exact = torch.stack([(part @ query.double()).softmax(0) @ part for part in parts])
        # Scores of some hundred err by some 1e-5 in float32, and so do weights.
        torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=HALF_STEP)

    def test_a_query_of_zeros_makes_it_the_mean(self) -> None:
        states, layout = random(40, 64), SequenceLayout.of([1, 16, 23])

        found = native.attended(states, torch.zeros(64, dtype=torch.bfloat16), layout)

        torch.testing.assert_close(found, native.mean(states, layout))

    def test_stays_within_its_sequences(self) -> None:
        room = torch.full((30, 80), math.nan, dtype=torch.bfloat16)
        room[5:25] = random(20, 80)

        assert native.attended(room[5:25], random(80), SequenceLayout.of([7, 13])).isfinite().all()

    def test_what_is_no_number_has_no_answer(self) -> None:
        states = random(30, 32)
        states[12, 5] = math.nan

        found = native.attended(states, random(32, seed=1), SequenceLayout.of([10, 10, 10]))

        assert found.isnan().all(dim=1).tolist() == [False, True, False]

    def test_no_sequences_have_no_answers(self) -> None:
        assert native.attended(random(0, 32), random(32), SequenceLayout.of([])).shape == (0, 32)


@needs_kernels
class TestClassify:
    @pytest.mark.parametrize("classes", [1, 2, 16])
    @pytest.mark.parametrize("width", [16, 384])
    @pytest.mark.parametrize("rows", [0, 1, 7])
    def test_is_within_float32_of_float64(self, rows: int, width: int, classes: int) -> None:
        x, weight, bias = (
            random(rows, width, size=2.0),
            random(classes, width, seed=1),
            random(classes, seed=2),
        )

        found = native.classify(x, weight, bias)

        exact = F.linear(x.double().tanh(), weight.double(), bias.double())
        assert (found.dtype, found.shape) == (torch.float32, (rows, classes))
        torch.testing.assert_close(found.double(), exact, atol=2e-6 * width, rtol=1e-6)

    def test_tanh_of_every_bfloat16(self) -> None:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(torch.bfloat16)
        every = every[every.isfinite()]
        rows = torch.zeros(len(every), 16, dtype=torch.bfloat16)
        rows[:, 5] = every

        found = native.classify(rows, torch.ones(1, 16).bfloat16(), torch.zeros(1).bfloat16())

        torch.testing.assert_close(found[:, 0].double(), every.double().tanh(), atol=2e-6, rtol=0)

    def test_what_is_no_number_has_no_answer(self) -> None:
        x = random(3, 32)
        x[1, 20] = math.nan

        found = native.classify(x, random(2, 32, seed=1), random(2, seed=2))

        assert found.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@needs_kernels
class TestEntropy:
    @pytest.mark.parametrize("classes", [1, 2, 3, 16])
    @pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
    def test_is_within_float32_of_float64(self, classes: int, size: float) -> None:
        logits = size * torch.randn(500, classes, generator=torch.Generator().manual_seed(classes))

        found = native.entropy(logits)

        log_p = logits.double().log_softmax(-1)
        assert (found.dtype, found.shape) == (torch.float32, (500,))
        torch.testing.assert_close(found.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-15, rtol=2e-6)

    def test_of_answers_however_sure(self) -> None:
        apart = torch.arange(0, 120, 0.25)

        found = native.entropy(torch.stack((-apart, torch.zeros(len(apart))), dim=1))

        p = (-apart.double()).exp() / (1 + (-apart.double()).exp())
        exact = apart.double() * p + torch.log1p((-apart.double()).exp())
        normal = exact > 1e-37  # below, float32 itself loses digits
        torch.testing.assert_close(found.double()[normal], exact[normal], atol=0, rtol=2e-6)
        assert (found >= 0).all()

    @pytest.mark.parametrize("at", [0, 1, 2])
    @pytest.mark.parametrize("flaw", [math.nan, math.inf])
    def test_what_is_no_number_has_none(self, at: int, flaw: float) -> None:
        logits = torch.randn(3, 3)
        logits[1, at] = flaw

        assert native.entropy(logits).isnan().tolist() == [False, True, False]

    def test_of_many_off_ramps_at_once(self) -> None:
        logits = torch.randn(2, 5, 3)

        assert torch.equal(native.entropy(logits)[1], native.entropy(logits[1]))
        assert native.entropy(logits[:0]).shape == (0, 5)


@needs_kernels
class TestQuantize:
    @given(
        rows=st.integers(0, 5),
        width=st.sampled_from([16, 48, 384]),
        size=st.floats(1e-3, 1e3),
        smooths=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def test_spans_the_range_of_each_row_in_255_steps(
        self, rows: int, width: int, size: float, smooths: bool, seed: int
    ) -> None:
        x, by = random(rows, width, seed=seed, size=size), random(width, seed=seed + 1).float().abs()

        bytes_, scale, minimum = native.quantize(x, by if smooths else None)

        exact = x.double() * by if smooths else x.double()
        assert (bytes_.dtype, bytes_.shape) == (torch.uint8, x.shape)
        assert [row.max() for row in bytes_] == [255] * rows
        assert [row.min() for row in bytes_] == [0] * rows
        found = bytes_ * scale.double()[:, None] + minimum.double()[:, None]
        assert ((found - exact).abs() <= 0.5001 * scale.double()[:, None]).all()

    def test_a_row_of_equal_numbers_is_its_minimum(self) -> None:
        bytes_, scale, minimum = native.quantize(torch.full((2, 32), -3.0).bfloat16(), None)

        assert not bytes_.any()
        assert (scale.tolist(), minimum.tolist()) == ([1, 1], [-3, -3])

    @pytest.mark.parametrize("flaw", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("at", [0, 15, 16, 47])
    def test_a_row_with_a_number_that_is_none_has_no_scale(self, at: int, flaw: float) -> None:
        x = random(3, 48)
        x[1, at] = flaw

        _, scale, _ = native.quantize(x, None)

        assert scale.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("width", [16, 80, 1_536])
    @pytest.mark.parametrize("rows", [0, 1, 5])
    def test_rescaled_is_within_rounding_of_float64(self, rows: int, width: int) -> None:
        product, scale, minimum = (
            random(rows, width).float(),
            random(rows).float(),
            random(rows, seed=1).float(),
        )
        weight_sum, bias = random(width, seed=2).float(), random(width, seed=3).float()
        room = torch.full((rows + 2, width), math.nan, dtype=torch.bfloat16)

        native.rescale(product, scale, minimum, weight_sum, bias, room[1 : rows + 1])

        exact = product.double() * scale.double()[:, None] + minimum.double()[:, None] * weight_sum + bias
        torch.testing.assert_close(room[1 : rows + 1].double(), exact, atol=1e-5, rtol=HALF_STEP)
        assert room[0].isnan().all()
        assert room[rows + 1].isnan().all()


@needs_kernels
def test_they_take_what_they_were_made_for() -> None:
    takes = (native.attends, native.activates, native.takes_rows)
    good = random(8, 3, 2, 32)

    assert [take(good) for take in takes] == [True] * 3
    assert [take(good.float()) for take in takes] == [False] * 3
    assert [take(random(8, 3, 2, 24)) for take in takes] == [False, True, False]
    assert [take(good.transpose(0, 1)) for take in takes] == [True, False, False]  # attention takes a copy
    rows = random(8, 32)
    assert [native.quantizes(rows, outputs) for outputs in (48, 50)] == [True, False]
    assert not native.quantizes(random(8, 24), 48)
    ids = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    assert native.embeds(ids, rows)
    assert not native.embeds(ids.long(), rows)
    assert not native.embeds(ids[::2], rows)
    assert not native.embeds(ids, rows.float())
    logits = torch.randn(4, 16)
    assert native.measures(logits)
    assert not native.measures(logits.double())
    assert not native.measures(logits.t())
    assert not native.measures(torch.randn(4, 17))
    assert not native.measures(logits.clone().requires_grad_())


PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
FORK = ctypes.CFUNCTYPE(None, PART, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
"""As in `kernels.h`."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_kernels
class TestThreads:
    """Of torch's OpenMP, which wakes them for the kernels too."""

    @pytest.fixture(params=[2, 3, 8])
    def several(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    def equal(self, several: int, compute: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
        with threads(1):
            alone = compute()
        with threads(several):
            together = compute()
        for one, other in zip(as_tuple(alone), as_tuple(together), strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)

    @pytest.mark.parametrize("lengths", [[300], [1], [25] * 160, [1, 2, 200, 3] * 9, []])
    def test_attention(self, several: int, lengths: list[int]) -> None:
        qkv, layout = random(sum(lengths) + 5, 3, 4, 32), SequenceLayout.of(lengths)

        self.equal(several, lambda: native.attention(qkv, layout))

    @pytest.mark.parametrize("count", [1, 16_384, 32_767, 200_005])
    def test_gelu(self, several: int, count: int) -> None:
        x = random(count, size=3.0)

        self.equal(several, lambda: native.gelu_(x.clone()))

    @pytest.mark.parametrize("rows", [0, 1, 64, 129, 2000])
    def test_rows(self, several: int, rows: int) -> None:
        x, residual, weight, bias = (random(n, 48, seed=n) for n in (rows, rows, 1, 2))
        norm = (weight[0], bias[0], 1e-12)
        classifier = (random(3, 48, seed=7), random(3, seed=8))
        product, sums = torch.randn(rows, 48), torch.randn(48)

        def rescaled() -> Tensor:
            out = x.new_empty(rows, 48)
            native.rescale(product, product[:, 0].clone(), product[:, 1].clone(), sums, sums, out)
            return out

        self.equal(several, lambda: native.add_norm_(x.clone(), residual, *norm))
        self.equal(several, lambda: native.classify(x, *classifier))
        self.equal(several, lambda: native.entropy(product))
        self.equal(several, lambda: native.quantize(x, sums))
        self.equal(several, rescaled)

    @pytest.mark.parametrize("tokens", [0, 1, 64, 129, 2000])
    def test_embed(self, several: int, tokens: int) -> None:
        ids, tables, norm = (
            torch.arange(tokens) % 10,
            random(3, 10, 48).unbind(),
            random(2, 48, seed=1).unbind(),
        )
        word, position, token_type = tables

        def embedded() -> Tensor:
            return native.embed(
                ids.int(),
                ids,
                None,
                word=word,
                position=position,
                token_type=token_type,
                weight=norm[0],
                bias=norm[1],
                eps=1e-12,
            )

        self.equal(several, embedded)

    @pytest.mark.parametrize("lengths", [[5], [1, 30] * 40, []])
    def test_mean(self, several: int, lengths: list[int]) -> None:
        states = random(sum(lengths), 48)

        self.equal(several, lambda: native.mean(states, SequenceLayout.of(lengths)))
        query = random(48, seed=1)
        self.equal(several, lambda: native.attended(states, query, SequenceLayout.of(lengths)))

    def test_they_are_awake_at_once(self) -> None:
        seen: set[int] = set()
        everyone = threading.Barrier(3, timeout=60)

        @PART
        def meet(_: int | None) -> None:
            seen.add(threading.get_native_id())
            everyone.wait()

        FORK(native._fork())(meet, None, 3, 0)

        assert len(seen) == 3

    @pytest.mark.parametrize("came", [1, 2, 3])
    def test_fewer_may_come_than_were_asked_for(self, came: int) -> None:
        asked: list[int] = []

        @FORK
        def fork(part, task: int | None, threads: int, _: int) -> None:  # type: ignore[no-untyped-def]
            asked.append(threads)
            for _ in range(came):
                part(task)

        x = random(200_005)
        expected = native.gelu_(x.clone())

        native._compiled().deebert_gelu(x.data_ptr(), x.numel(), ctypes.cast(fork, ctypes.c_void_p), 3)

        assert asked == [3]
        assert torch.equal(x, expected)

    def test_without_torchs_threads_they_run_on_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "_fork", lambda: None)
        good = random(8, 32)

        with threads(2):
            assert not native.takes_rows(good)
        with threads(1):
            assert native.takes_rows(good)
            assert native.gelu_(good.clone()).isfinite().all()


def as_tuple(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


class TestEncoder:
    LENGTHS = (3, 17, 17, 40, 64)

    @pytest.fixture
    def model(self) -> DeeBertForSequenceClassification:
        """Tiny, but with heads as wide as the kernel wants them."""
        backbone = AutoConfig.for_model(
            "bert",
            vocab_size=20,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=96,
            max_position_embeddings=64,
        )
        model = DeeBertForSequenceClassification(DeeBertConfig(backbone_config=backbone))
        randomize(model, seed=0)
        return model.eval()

    def states(self, encoder: PackedEncoder) -> Tensor:
        """After the last layer, whose norm makes them of order 1."""
        tokens = PackedTokens.pack([[(7 * i + n) % 20 for i in range(n)] for n in self.LENGTHS])
        return encoder.layers(0, encoder.num_layers - 1, encoder.embed(tokens), tokens.layout).float()

    @pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16"
    )
    def test_needs_no_kernels(
        self,
        model: DeeBertForSequenceClassification,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        exact, short = (
            self.states(PackedEncoder.of(model)),
            PackedEncoder.of(model, dtype=torch.bfloat16),
        )
        with_them = self.states(short)

        monkeypatch.setattr(native, "_library", lambda: None)

        PackedEncoder.of(model, dtype=torch.bfloat16)
        missing = "the kernels for this CPU were not compiled" in caplog.text
        assert missing == torch.cpu._is_avx512_bf16_supported()
        ours, torchs = ((s - exact).square().mean().sqrt() for s in (with_them, self.states(short)))
        assert torchs < 0.1
        assert ours <= 1.1 * torchs

    @pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16"
    )
    def test_what_lies_behind_the_states_is_read_and_not_written(
        self, model: DeeBertForSequenceClassification
    ) -> None:
        encoder, layout = PackedEncoder.of(model, dtype=torch.bfloat16), SequenceLayout.of([70, 60])
        chunk = random(200, 64)
        chunk[150:] = math.nan
        kept, alone = chunk.clone(), chunk[20:150].clone()

        found = encoder.layers(0, 1, chunk[20:150], layout)

        torch.testing.assert_close(chunk, kept, atol=0, rtol=0, equal_nan=True)
        assert torch.equal(found, encoder.layers(0, 1, alone, layout))

    @pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")
    def test_int8_needs_no_kernels(
        self, model: DeeBertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exact, small = self.states(PackedEncoder.of(model)), PackedEncoder.of(model, dtype=torch.int8)
        with_them = self.states(small)

        monkeypatch.setattr(native, "_library", lambda: None)

        ours, torchs = ((s - exact).square().mean().sqrt() for s in (with_them, self.states(small)))
        assert torchs < 0.2
        assert ours <= 1.1 * torchs

    @needs_kernels
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
    def test_samples_out_of_order_get_their_own_answers(
        self, model: DeeBertForSequenceClassification, dtype: torch.dtype
    ) -> None:
        lengths = (9, 3, 30, 64, 1, 17, 30, 5) * 4
        tokens = PackedTokens.pack([[(7 * i + n) % 20 for i in range(n)] for n in lengths])
        engine = Engine(
            PackedEncoder.of(model, dtype=dtype), FULL_DEPTH, EngineConfig(micro_batch_tokens=100)
        )

        engine.submit(np.arange(len(lengths)), tokens)
        answers = {
            int(i): row
            for exits in engine.drain()
            for i, row in zip(exits.sample_ids, exits.logits, strict=True)
        }

        alone = PackedEncoder.of(model, dtype=dtype)
        for i in range(len(lengths)):
            one = tokens.sequence(i)
            states = alone.layers(0, alone.num_layers - 1, alone.embed(one), one.layout)
            logits = alone.off_ramp(alone.num_layers - 1, states, one.layout)[0]
            np.testing.assert_allclose(answers[i], logits, atol=0.05)

    @needs_kernels
    def test_uses_them_where_its_weights_were_sent_to(
        self, model: DeeBertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = pickle.loads(pickle.dumps(fused_model(model)))
        used: list[str] = []
        for name in ("attention", "gelu_", "add_norm_", "classify"):
            monkeypatch.setattr(native, name, _noting(getattr(native, name), name, used))
        encoder = PackedEncoder(sent, dtype=torch.bfloat16)

        self.states(encoder)
        encoder.off_ramp(0, random(5, 64), SequenceLayout.of([2, 3]))

        assert used == [*["attention", "add_norm_", "gelu_", "add_norm_"] * len(sent.layers), "classify"]

    @needs_kernels
    def test_uses_them_between_integers_too(
        self, model: DeeBertForSequenceClassification, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[str] = []
        for name in ("attention", "gelu_", "add_norm_", "quantize", "rescale"):
            monkeypatch.setattr(native, name, _noting(getattr(native, name), name, used))

        self.states(PackedEncoder.of(model, dtype=torch.int8))

        product = ["quantize", "rescale"]
        between = [*product, "attention", *product, "add_norm_", *product, "gelu_", *product, "add_norm_"]
        assert used == between * len(model.backbone.encoder.layer)


def _noting(function, name: str, used: list[str]):  # type: ignore[no-untyped-def]
    def noted(*args: object) -> Tensor:
        used.append(name)
        return function(*args)  # type: ignore[no-any-return]

    return noted
