"""What ``auto`` means."""

from __future__ import annotations

import pytest
import torch

from deebert.precision import DTYPES, resolve_precision


def test_auto_is_bfloat16_on_gpus() -> None:
    assert resolve_precision("auto", has_gpu=True) == "bfloat16"


def test_auto_on_a_cpu_is_what_it_multiplies() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert resolve_precision("auto", has_gpu=False) == ("bfloat16" if native else "float32")


@pytest.mark.parametrize("asked", list(DTYPES))
def test_a_precision_is_taken_at_its_word(asked: str) -> None:
    assert resolve_precision(asked) == asked


def test_anything_else_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="unknown precision 'int3': choose auto, float32, bfloat16, float16"):
        resolve_precision("int3")
