"""How many tokens a micro-batch takes when nobody says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deebert.encoder import PackedEncoder
from deebert.exit_policy import EntropyThreshold
from deebert.fused import state_dtype
from deebert.memory import LARGEST_KEPT_BYTES
from deebert.packing import PackedTokens
from pipeline.engine import Engine
from pipeline.engine.budget import is_out_of_memory, micro_batch_tokens, on_cpu, on_gpu, under_way
from tests.conftest import LONGEST, make_model

GIB = 1 << 30


STATES = 40


def chosen(hidden_size: int, free_gib: float, *, value_bytes: int = 2) -> int:
    return on_gpu(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        states=STATES,
        value_bytes=value_bytes,
        free_bytes=int(free_gib * GIB),
    )


def test_with_room_the_smaller_model_takes_more_tokens() -> None:
    assert [chosen(width, 100) for width in (384, 768, 1024)] == [262144, 65536, 32768]


@pytest.mark.parametrize("free_gib", [1, 2])
def test_two_lanes_fit_into_the_free_memory(free_gib: float) -> None:
    held = 2 * 768 * (STATES + 8) * chosen(768, free_gib)
    assert 0.4 * free_gib * GIB < 2 * held < free_gib * GIB
    assert chosen(768, free_gib, value_bytes=4) == chosen(768, free_gib) // 2


@pytest.mark.parametrize(
    ("intermediate_size", "value_bytes", "tokens"),
    [(1536, 2, 4096), (1536, 4, 4096), (3072, 2, 4096), (3072, 4, 2048), (4096, 2, 2048), (65536, 4, 512)],
)
def test_on_a_cpu_the_largest_activations_stay_below_what_is_kept(
    intermediate_size: int, value_bytes: int, tokens: int
) -> None:
    assert on_cpu(intermediate_size=intermediate_size, value_bytes=value_bytes) == tokens
    assert tokens * intermediate_size * value_bytes < LARGEST_KEPT_BYTES or tokens == 512


def test_a_token_takes_its_states_and_twice_the_feed_forward_block() -> None:
    """In numbers: 2 bytes times 40 states of width 1024 and 2 of width 4096 are 98,304 a token."""
    just = 98_304 * 8192 / 0.4 / GIB

    assert chosen(1024, just + 1e-6) == 8192
    assert chosen(1024, just - 1e-6) == 4096


def test_a_layer_takes_a_gpu_a_trillion_operations() -> None:
    """Two for each of a token's weights: 4 matrices of width by width, and 2 of width by 4 times width."""
    # 24 h² operations a token: at this width 65,536 tokens are just fewer than 10¹², at the next just more.
    assert chosen(797, 1000) == 65_536
    assert chosen(798, 1000) == 32_768


def test_int8_s_states_are_as_wide_as_what_lies_between_its_products() -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "segments": 3}
    found = [
        micro_batch_tokens(torch.device("cpu"), dtype, **sizes)
        for dtype in (torch.int8, state_dtype(torch.int8), torch.float32, torch.bfloat16)
    ]

    assert found[0] == found[1]
    assert found[2:] == [2048, 4096]


def test_a_gpu_has_another_micro_batch_under_way_while_one_is_waited_for() -> None:
    assert [under_way(torch.device(kind)) for kind in ("cuda", "cpu")] == [2, 1]


def test_on_a_gpu_memory_is_what_is_free_and_what_torch_keeps_for_reuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before 2 of 3 segments wait states of 4 micro-batches with 2 under way; those hold 2, and a layer makes 6."""
    states = 2 * 4 + 2 * 2 + 6
    needed = 2 * (states * 1024 + 2 * 4096) * 8192 / 0.4
    kept, used = 3 << 30, 2 << 30
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: kept)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: used)
    found = []
    for free in (needed - (kept - used) + 1, needed - (kept - used) - 1):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (int(free), 80 << 30))
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "segments": 3}
        found.append(micro_batch_tokens(torch.device("cuda"), torch.bfloat16, **sizes))

    assert found == [8192, 4096]


def test_a_tiny_model_does_not_wait_for_millions_of_tokens() -> None:
    assert chosen(32, 100) == 262144


def test_hardly_any_memory_still_runs() -> None:
    assert chosen(1024, 0.001) == 2048


@pytest.mark.parametrize(("family", "positions"), [("bert", LONGEST), ("roberta", LONGEST)])
def test_on_a_cpu_an_engine_chooses_by_itself_and_takes_any_input(family: str, positions: int) -> None:
    encoder = PackedEncoder.of(make_model(family))
    assert encoder.longest_input == positions
    engine = Engine(encoder, EntropyThreshold(0.3))
    assert engine.micro_batch_tokens == 4096
    engine.submit(np.arange(1), PackedTokens.pack([[7] * positions]))
    assert sum(map(len, engine.drain())) == 1


def test_torch_says_in_words_that_a_cpu_has_no_more_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 46)  # 256 TiB: more than addresses

    assert is_out_of_memory(caught.value)


def test_what_is_an_end_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    assert not is_out_of_memory(torch.AcceleratorError("CUDA error: invalid configuration argument"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
