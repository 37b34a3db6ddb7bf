"""How many tokens a micro-batch takes when nobody says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deebert.encoder import PackedEncoder
from deebert.exit_policy import EntropyThreshold
from deebert.memory import LARGEST_KEPT_BYTES
from deebert.packing import PackedTokens
from pipeline.engine import Engine
from pipeline.engine.budget import is_out_of_memory, on_cpu, on_gpu
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
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
