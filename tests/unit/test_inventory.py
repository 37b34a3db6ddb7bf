"""The weights that a configuration names are those of the training form, and enough for every other form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from deebert.backbones import FAMILIES
from deebert.checkpoint import Checkpoint, load_checkpoint, weights_digest
from deebert.config import POOLINGS, DeeBertConfig
from deebert.encoder import PackedEncoder
from deebert.errors import CheckpointError
from deebert.inventory import weight_shapes
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from tests.conftest import ModelFactory, fused_model, make_tokenizer, randomize

KINDS: list[dict[str, Any]] = [
    {},
    *({"off_ramp_pooling": pooling} for pooling in POOLINGS),
    {"off_ramp_layers": []},
    {"off_ramp_layers": [0, 2]},
    {"shares_off_ramp_pooler": True},
    {"shares_off_ramp_pooler": True, "off_ramp_layers": []},
    {"learns_to_exit": True, "off_ramp_pooling": "both"},
    {"problem_type": "regression", "num_labels": 1},
]


def model_of(family: str, **fields: Any) -> DeeBertForSequenceClassification:
    sizes = {"num_hidden_layers": 3, "vocab_size": 40, "hidden_size": 8, "num_attention_heads": 2}
    inner = {FAMILIES[family].intermediate_size: 12, "max_position_embeddings": 20}
    backbone = AutoConfig.for_model(family, **sizes, **inner)
    model = DeeBertForSequenceClassification(DeeBertConfig(backbone_config=backbone, **fields))
    randomize(model, seed=0)
    model.eval()
    return model


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_all_weights_and_no_others(family: str, fields: dict[str, Any]) -> None:
    model = model_of(family, **fields)

    assert weight_shapes(model.config) == {n: tuple(w.shape) for n, w in model.state_dict().items()}


def test_embeddings_may_be_narrower_than_layers() -> None:
    narrow = AutoConfig.for_model(
        "electra", num_hidden_layers=1, hidden_size=8, embedding_size=4, num_attention_heads=2
    )
    model = DeeBertForSequenceClassification(DeeBertConfig(backbone_config=narrow))

    assert "backbone.embeddings_project.weight" in weight_shapes(model.config)
    assert weight_shapes(model.config) == {n: tuple(w.shape) for n, w in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_is_what_is_loaded(family: str, tmp_path: Path) -> None:
    model = model_of(family, off_ramp_pooling="attention", learns_to_exit=True)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    loaded = load_checkpoint(str(tmp_path))

    stored = model.state_dict()
    assert loaded.weights.keys() == stored.keys()
    assert all(torch.equal(weight, stored[name]) for name, weight in loaded.weights.items())
    assert loaded.digest == weights_digest(model) == weights_digest(loaded.model)
    assert not loaded.model.training


def test_weights_in_several_files_are_found(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    assert len([*tmp_path.glob("*.safetensors")]) > 1

    assert load_checkpoint(str(tmp_path)).digest == weights_digest(model)


def test_what_there_is_beside_them_is_left(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = tiny_model(off_ramp_layers=[1, 2, 3, 4])
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    fewer = DeeBertConfig.from_pretrained(tmp_path, off_ramp_layers=[1, 2, 3])
    fewer.save_pretrained(tmp_path)

    loaded = load_checkpoint(str(tmp_path))

    assert "off_ramps.3.classifier.weight" not in loaded.weights
    assert loaded.digest == weights_digest(loaded.model)


def test_training_its_model_leaves_a_checkpoint_as_it_was(saved_model: Path) -> None:
    checkpoint = load_checkpoint(str(saved_model))
    before = checkpoint.digest

    with torch.no_grad():
        for weight in checkpoint.model.parameters():
            weight.add_(1.0)

    assert checkpoint.digest == before
    assert weights_digest(checkpoint.model) != before


def test_a_model_of_its_own_is_the_checkpoint_s(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    checkpoint = Checkpoint.of("m", model, make_tokenizer())
    tokens = PackedTokens.pack([[2, 5, 6, 3], [2, 7, 3]])

    assert checkpoint.model is model
    encoder, same = PackedEncoder(checkpoint.fused), PackedEncoder(fused_model(model))
    assert torch.equal(encoder.embed(tokens), same.embed(tokens))


def test_heads_that_do_not_divide_the_width(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = tiny_model()
    model.config.backbone_config.num_attention_heads = 5
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match=r"cannot load the model .* no multiple of its 5 heads"):
        load_checkpoint(str(tmp_path))


def test_whoever_runs_a_model_does_without_transformers_modelling_code(saved_model: Path) -> None:
    program = """
import sys
from deebert.checkpoint import load_checkpoint
from deebert.encoder import PackedEncoder
import pipeline.run, pipeline.stream

checkpoint = load_checkpoint(sys.argv[1])
PackedEncoder(checkpoint.fused), checkpoint.digest
heavy = ("transformers.modeling_utils", "transformers.activations", "deebert.modeling", "torch._dynamo")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, saved_model], check=True, capture_output=True, text=True
    )

    assert done.stdout.split() == ["[]"]
