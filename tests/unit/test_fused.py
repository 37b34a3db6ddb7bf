"""Weights on their way to a replica: nothing is lost, and no library that trained them is needed to run them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deebert.encoder import PackedEncoder
from deebert.fusing import fuse
from deebert.packing import PackedTokens
from pipeline.tokenization import TextTokenizer
from tests.conftest import ModelFactory, make_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["the film was good", "a bad story", "the worst"]

RUN = """
import pickle, sys, torch
import pipeline.replica
from deebert.encoder import PackedEncoder
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
    sent.write_bytes(pickle.dumps((fuse(model), tokenizer)))

    command = [sys.executable, "-c", RUN, str(sent), *TEXTS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False"]
    here = full_depth(PackedEncoder.of(model), tokenizer(TEXTS).tokens)
    # Sums may be taken in another order there: the number of threads is its own.
    torch.testing.assert_close(torch.load(f"{sent}.logits", weights_only=True), here, atol=1e-5, rtol=0)


def test_what_parts_share_stays_shared(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert", shares_off_ramp_pooler=True)

    cast = fuse(model).to(torch.device("cpu"), torch.bfloat16)

    first, second, *_ = cast.off_ramps.values()
    assert first.dense is second.dense


def test_a_cast_model_is_a_copy(tiny_model: ModelFactory) -> None:
    model = tiny_model("bert")
    fused = fuse(model)

    fused.to(torch.device("cpu"), torch.float32).embeddings.word.zero_()

    assert model.backbone.embeddings.word_embeddings.weight.any()
