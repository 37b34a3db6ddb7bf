"""What ``auto`` means."""

from __future__ import annotations

import pytest
import torch

from deebert.errors import PrecisionError
from deebert.fused import state_dtype
from deebert.precision import DTYPES, resolve_precision
from pipeline.config import PRECISIONS


def test_auto_is_bfloat16_on_gpus() -> None:
    assert resolve_precision("auto", has_gpu=True) == "bfloat16"


def test_auto_is_float16_on_gpus_that_emulate_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native, auto in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, n=native: n)
        assert resolve_precision("auto") == resolve_precision("auto", has_gpu=True) == auto


def test_auto_on_a_cpu_is_what_it_multiplies() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert resolve_precision("auto", has_gpu=False) == ("bfloat16" if native else "float32")


def test_auto_is_int8_for_a_model_that_was_found_to_keep_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert resolve_precision("auto", has_gpu=False, int8_agreement=0.995) == "int8"
    assert resolve_precision("auto", has_gpu=False, int8_agreement=0.9949) != "int8"
    assert resolve_precision("auto", has_gpu=True, int8_agreement=1.0) == "bfloat16"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert resolve_precision("auto", has_gpu=False, int8_agreement=1.0) != "int8"


@pytest.mark.parametrize("asked", list(DTYPES))
def test_a_precision_is_taken_at_its_word(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert resolve_precision(asked, has_gpu=False) == asked


def test_int8_is_for_cpus_that_sum_whole_numbers_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrecisionError, match=r"^int8 is for CPUs and this runs on GPUs: give bfloat16$"):
        resolve_precision("int8", has_gpu=True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(PrecisionError, match=r"^int8 needs a CPU with VNNI, which this one has not: give "):
        resolve_precision("int8", has_gpu=False)


def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU like Intel's before Cooper Lake and AMD's before Zen 4."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_emulated_bfloat16_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_bfloat16(monkeypatch)

    assert resolve_precision("bfloat16", has_gpu=True) == "bfloat16"
    assert resolve_precision("auto", has_gpu=False) == "float32"
    assert not caplog.records

    assert resolve_precision("bfloat16", has_gpu=False) == "bfloat16"
    assert caplog.messages == ["this CPU emulates bfloat16, which takes longer than float32: give auto"]


def test_a_gpu_that_emulates_bfloat16_is_named_with_what_it_does_not_emulate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: False)

    assert resolve_precision("float16", has_gpu=True) == resolve_precision("auto", has_gpu=True) == "float16"
    assert not caplog.records

    assert resolve_precision("bfloat16", has_gpu=True) == "bfloat16"
    assert caplog.messages == ["this GPU emulates bfloat16, which takes longer than float16: give float16"]


def test_beside_int8_nothing_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    without_bfloat16(monkeypatch)

    assert state_dtype(torch.int8) == torch.float32


def test_the_flag_offers_what_there_is() -> None:
    assert ("auto", *DTYPES) == PRECISIONS


def test_anything_else_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match="unknown precision 'int3': choose auto, float32, bfloat16, float16, int8"
    ):
        resolve_precision("int3")
