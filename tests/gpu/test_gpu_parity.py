"""The packed form and the engine on CUDA, held to float32 on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from deebert.attention import varlen_attention
from deebert.config import POOLINGS
from deebert.encoder import PackedEncoder
from deebert.evaluation import trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.packing import PackedTokens, SequenceLayout
from deebert.pooling import mean_of_tokens
from pipeline.engine import Engine, EngineConfig, warm_up
from pipeline.engine.span import Span
from tests.conftest import LONGEST, VOCABULARY, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def samples(count: int = 200) -> PackedTokens:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, LONGEST + 1, size=count)
    return PackedTokens.pack([rng.integers(5, len(VOCABULARY), size=n).tolist() for n in lengths])


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_float32_logits_equal_the_cpu(family: str, pooling: str) -> None:
    model, tokens = make_model(family, pooling, off_ramp_layers=[0, 1, 2, 4]), samples()
    on_gpu = trace(PackedEncoder.of(model, device="cuda"), tokens)
    torch.testing.assert_close(
        on_gpu.logits, trace(PackedEncoder.of(model), tokens).logits, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_float32(dtype: torch.dtype, pooling: str) -> None:
    model, tokens = make_model("bert", pooling), samples(1000)
    exact = trace(PackedEncoder.of(model), tokens).logits.argmax(-1)
    half = trace(PackedEncoder.of(model, device="cuda", dtype=dtype), tokens).logits.argmax(-1)
    assert (exact == half).float().mean() > 0.97


@pytest.mark.parametrize("size", [26, 32, 264])
def test_heads_that_the_variable_length_kernel_does_not_take(size: int) -> None:
    layout = SequenceLayout.of(np.array([1, 3, 3, 40]))
    qkv = torch.randn(layout.total_tokens, 3, 3, size, generator=torch.Generator().manual_seed(0))
    exact = varlen_attention(qkv, layout)
    there = SequenceLayout.of(layout.lengths, "cuda")
    on_gpu = varlen_attention(qkv.to("cuda", torch.bfloat16), there)
    torch.testing.assert_close(on_gpu.float().cpu(), exact, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_sequences_than_a_grid_has_blocks(dtype: torch.dtype) -> None:
    layout = SequenceLayout.of(np.full(70_000, 2))
    qkv = torch.randn(layout.total_tokens, 3, 2, 32, generator=torch.Generator().manual_seed(0))
    there = SequenceLayout.of(layout.lengths, "cuda")
    on_gpu = varlen_attention(qkv.to("cuda", dtype), there)
    torch.testing.assert_close(on_gpu.float().cpu(), varlen_attention(qkv, layout), atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_of_tokens_are_summed_in_float32(dtype: torch.dtype) -> None:
    layout = SequenceLayout.of(np.array([1, 3, 3, 4000]))
    states = torch.rand(layout.total_tokens, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_gpu = mean_of_tokens(states.cuda(), SequenceLayout.of(layout.lengths, "cuda"))
    assert on_gpu.dtype == dtype
    exact = torch.stack([part.double().mean(0) for part in states.split(layout.lengths.tolist())])
    torch.testing.assert_close(on_gpu.cpu(), exact.to(dtype))


def test_samples_are_taken_as_on_the_cpu() -> None:
    tokens, chosen = samples(50), np.array([7, 3, 3, 49, 0])
    taken = tokens.to("cuda").take(chosen)
    assert taken.input_ids.is_cuda
    assert taken.input_ids.tolist() == tokens.take(chosen).input_ids.tolist()
    assert tokens.to("cuda").take([]).input_ids.tolist() == []


def test_a_warm_up_leaves_its_workspace_to_the_thread_that_comes_next() -> None:
    encoder = PackedEncoder.of(make_model("bert", "mean"), device="cuda", dtype=torch.bfloat16)
    warm_up(encoder, FULL_DEPTH)
    before = torch.cuda.memory_allocated()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(trace, encoder, samples(20)).result()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_span_is_its_own_device_s_time() -> None:
    device = torch.device("cuda:1")
    work = torch.randn(4096, 4096, device=device)
    with Span(device) as span:
        for _ in range(50):
            work = work @ work
    assert not span.is_over()
    assert span.seconds() > 0.0
    assert torch.cuda.current_stream(device).query()  # nothing of it is left to do


@pytest.mark.parametrize("under_way", [1, 2, None])
@pytest.mark.parametrize("layers", [None, [0, 2, 4]])
def test_the_engine_conserves_and_regroups_on_the_device(
    layers: list[int] | None, under_way: int | None
) -> None:
    model, tokens = make_model("bert", "mean", off_ramp_layers=layers), samples(1000)
    encoder = PackedEncoder.of(model, device="cuda", dtype=torch.bfloat16)
    config = EngineConfig(micro_batch_tokens=1024, under_way=under_way)
    engine = Engine(encoder, EntropyThreshold(0.7), config)
    started = time.perf_counter()
    engine.submit(np.arange(1000), tokens)
    left = [(int(i), exits.exit_layer) for exits in engine.drain() for i in exits.sample_ids]
    assert sorted(i for i, _ in left) == list(range(1000))
    assert len({layer for _, layer in left}) > 2
    # By the device's clock, on which steps that overlap on the host come one after the other.
    assert 0.0 < engine.stats.total_seconds < time.perf_counter() - started


def test_two_micro_batches_under_way_change_no_answer() -> None:
    tokens = samples(1000)
    encoder = PackedEncoder.of(make_model("bert", "mean"), device="cuda")
    found = []
    for under_way in (1, 2):
        config = EngineConfig(micro_batch_tokens=1024, under_way=under_way)
        engine = Engine(encoder, EntropyThreshold(0.7), config)
        engine.submit(np.arange(1000), tokens)
        logits = np.empty((1000, encoder.num_labels), np.float32)
        layers = np.empty(1000, np.int64)
        for exits in engine.drain():
            logits[exits.sample_ids], layers[exits.sample_ids] = exits.logits, exits.exit_layer
        found.append((logits, layers))
    (one, layers_of_one), (two, layers_of_two) = found
    same = layers_of_one == layers_of_two
    assert same.mean() > 0.99  # the others' entropies lie at the threshold
    np.testing.assert_allclose(two[same], one[same], atol=1e-3)


def test_a_budget_by_itself_fits_the_device() -> None:
    encoder = PackedEncoder.of(make_model("bert", "mean"), device="cuda", dtype=torch.bfloat16)
    engine = Engine(encoder, FULL_DEPTH)
    assert engine.micro_batch_tokens >= 2048
    engine.submit(np.arange(200), samples(200))
    assert sum(map(len, engine.drain())) == 200


@pytest.fixture
def little_memory() -> Iterator[None]:
    """64 MiB of the device for this process, beyond what it holds."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_micro_batches_that_do_not_fit_are_halved(
    little_memory: None, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = samples(20_000)
    encoder = PackedEncoder.of(make_model("bert", "mean"), device="cuda")
    engine = Engine(encoder, FULL_DEPTH, EngineConfig(micro_batch_tokens=1 << 20))
    engine.submit(np.arange(20_000), tokens)
    left = [int(i) for exits in engine.drain() for i in exits.sample_ids]
    assert sorted(left) == list(range(20_000))
    assert "out of memory: micro-batches have" in caplog.text
