"""Weights on their way to a replica: nothing is lost, and no library that trained them is needed to run them."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deebert.encoder import PackedEncoder
from deebert.fused import Linear, Norm, QuantizedLinear
from deebert.packing import PackedTokens
from pipeline.tokenization import TextTokenizer
from tests.conftest import ModelFactory, fused_model, make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["the film was good", "a bad story", "the worst"]

RUN = """
import pickle, sys, torch
import pipeline.replica
from deebert.encoder import PackedEncoder
from deebert.fused import Linear, Norm, QuantizedLinear
with open(sys.argv[1], "rb") as file:
    fused, tokenizer = pickle.load(file)
encoder, tokens = PackedEncoder(fused), tokenizer(sys.argv[2:]).tokens
states = encoder.embed(tokens)
for layer in range(encoder.num_layers):
    states = encoder.layer(layer, states, tokens.layout)
torch.save(encoder.off_ramp(encoder.num_layers - 1, states, tokens.layout), sys.argv[1] + ".logits")
print("transformers" in sys.modules)
"""


def full_depth(encoder: PackedEncoder, tokens: PackedTokens) -> torch.Tensor:
    states = encoder.embed(tokens)
    for layer in range(encoder.num_layers):
        states = encoder.layer(layer, states, tokens.layout)
    return encoder.off_ramp(encoder.num_layers - 1, states, tokens.layout)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_another_process_runs_them_without_transformers(
    tiny_model: ModelFactory, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    tokenizer = TextTokenizer(make_tokenizer(), max_length=16, has_token_types=model.config.has_token_types)
    sent = tmp_path / "sent"
    sent.write_bytes(pickle.dumps((fused_model(model), tokenizer)))

    command = [sys.executable, "-c", RUN, str(sent), *TEXTS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False"]
    here = full_depth(PackedEncoder.of(model), tokenizer(TEXTS).tokens)
    # Sums may be taken in another order there: the number of threads is its own.
    torch.testing.assert_close(torch.load(f"{sent}.logits", weights_only=True), here, atol=1e-5, rtol=0)


def test_what_parts_share_stays_shared(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert", shares_off_ramp_pooler=True)

    cast = fused_model(model).to(torch.device("cpu"), torch.bfloat16)

    first, second, *_ = cast.off_ramps.values()
    assert first.dense is second.dense


def test_a_cast_model_is_a_copy(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert")
    fused = fused_model(model)

    fused.to(torch.device("cpu"), torch.float32).embeddings.word.zero_()

    assert model.backbone.embeddings.word_embeddings.weight.any()


needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI")


def off_by(quantized: QuantizedLinear, linear: Linear, x: torch.Tensor) -> float:
    """Root mean square of the error, of that of the exact outputs."""
    exact = linear(x.float())
    return ((quantized(x) - exact).square().mean() / exact.square().mean()).sqrt().item()


def random_linear(inputs: int = 64, outputs: int = 48) -> Linear:
    generator = torch.Generator().manual_seed(1)
    return Linear(
        weight=torch.randn(outputs, inputs, generator=generator),
        bias=torch.randn(outputs, generator=generator),
    )


@needs_vnni
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16]
)  # the second by the kernels, where they run
class TestQuantizedLinear:
    @pytest.mark.parametrize("outputs", [48, 50])
    def test_rounds_both_sides_to_a_step_in_256(self, outputs: int, dtype: torch.dtype) -> None:
        linear = random_linear(outputs=outputs)

        assert off_by(QuantizedLinear.of(linear), linear, torch.randn(200, 64).to(dtype)) < 0.015

    def test_rows_do_not_depend_on_each_other(self, dtype: torch.dtype) -> None:
        x, quantized = torch.randn(2_100, 64).to(dtype), QuantizedLinear.of(random_linear())
        x[7] *= 1000

        together = quantized(x)

        assert together.dtype == dtype
        for row in (0, 7, 32, 1_023, 1_024, 2_099):
            assert torch.equal(quantized(x[row : row + 1])[0], together[row])

    def test_a_row_of_one_value_is_exact(self, dtype: torch.dtype) -> None:
        linear = random_linear()
        x = torch.full((2, 64), 0.75)

        torch.testing.assert_close(
            QuantizedLinear.of(linear)(x.to(dtype)).float(), linear(x), atol=0.15, rtol=0
        )  # weights alone are rounded

    @pytest.mark.parametrize("flaw", [math.nan, math.inf, -math.inf])
    def test_what_is_no_number_spoils_its_row_and_no_other(self, flaw: float, dtype: torch.dtype) -> None:
        x = torch.randn(3, 64).to(dtype)
        x[1, 40] = flaw

        out = QuantizedLinear.of(random_linear())(x)

        assert not out[1].isfinite().any()
        assert out[[0, 2]].isfinite().all()

    def test_outputs_without_weights_are_their_bias(self, dtype: torch.dtype) -> None:
        linear = random_linear()
        linear.weight[3] = 0.0

        out = QuantizedLinear.of(linear)(torch.randn(5, 64).to(dtype))

        assert torch.equal(out[:, 3], linear.bias[3].to(dtype).expand(5))

    def test_outliers_do_not_spoil_the_other_inputs(self, dtype: torch.dtype) -> None:
        linear = random_linear(inputs=512)
        linear.weight[:, 100] *= 40
        x = torch.randn(200, 512)
        x[:, 100] /= 40

        assert QuantizedLinear.of(linear).outliers.tolist() == [100]
        assert off_by(QuantizedLinear.of(linear), linear, x.to(dtype)) < 0.015

    def test_outliers_count_in_rows_of_equal_numbers(self, dtype: torch.dtype) -> None:
        linear, x = random_linear(inputs=512), torch.full((2, 512), 0.5)
        linear.weight[:, 100] *= 40

        out = QuantizedLinear.of(linear)(x.to(dtype)).float()

        torch.testing.assert_close(out, linear(x), atol=0.5, rtol=0)

    def test_inputs_of_a_large_range_do_not_spoil_the_others(self, dtype: torch.dtype) -> None:
        linear, norm = random_linear(), Norm(weight=torch.ones(64), bias=torch.zeros(64), eps=1e-12)
        norm.weight[5] = 30.0
        linear.weight[:, 5] /= 30
        x = norm(torch.randn(200, 64)).to(dtype)

        assert off_by(QuantizedLinear.of(linear), linear, x) > 0.02
        assert off_by(QuantizedLinear.of(linear, after=norm), linear, x) < 0.02


@needs_vnni
def test_each_product_is_smoothed_by_the_normalization_that_it_reads(tiny_model: ModelFactory) -> None:
    exact = fused_model(tiny_model("bert"))

    small = exact.to(torch.device("cpu"), torch.int8)

    before = [exact.embeddings.norm, *(layer.output_norm for layer in exact.layers[:-1])]
    for layer, quantized, read in zip(exact.layers, small.layers, before, strict=True):
        for product, found, norm in (
            (layer.qkv, quantized.qkv, read),
            (layer.intermediate, quantized.intermediate, layer.attention_norm),
        ):
            assert isinstance(product, Linear)
            assert isinstance(found, QuantizedLinear)
            expected = QuantizedLinear.of(product, after=norm).smoothing
            assert found.smoothing is not None
            assert expected is not None
            assert torch.equal(found.smoothing, expected)


@needs_vnni
@pytest.mark.parametrize("pooling", ["cls", "mean", "both", "attention"])
def test_an_int8_model_says_nearly_what_the_exact_one_says(
    tiny_model: ModelFactory, family: str, pooling: str
) -> None:
    model, rng = tiny_model(family, pooling), np.random.default_rng(0)
    tokens = PackedTokens.pack([rng.integers(5, 60, n).tolist() for n in rng.integers(3, 33, 200)])

    exact, small = (full_depth(PackedEncoder.of(model, dtype=d), tokens) for d in (torch.float32, torch.int8))

    assert small.dtype == torch.float32
    assert (small - exact).square().mean().sqrt() < 0.2 * exact.std()
    first, second, _ = exact.sort(-1, descending=True).values.unbind(-1)
    is_clear = first - second >= (first - second).quantile(0.7)
    assert (small.argmax(-1) == exact.argmax(-1))[is_clear].float().mean() > 0.98
