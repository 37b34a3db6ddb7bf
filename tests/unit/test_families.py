"""Every family of backbones, from a saved folder to a planned run and its cost."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from deebert.backbones import FAMILIES, family_of
from deebert.checkpoint import load_checkpoint, weights_digest
from deebert.cost import ModelShape
from deebert.errors import BackboneError
from pipeline.config import ClassifyConfig
from pipeline.planning import RunPlan, make_plan
from tests.conftest import LONGEST, ModelFactory, make_backbone_config


@pytest.fixture
def folder(family: str, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A saved model of each family."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(folder: Path) -> RunPlan:
    texts = folder.parent / "texts.parquet"
    pq.write_table(pa.table({"text": ["a good film", "a bad film"]}), texts)
    config = ClassifyConfig(model=str(folder), input=(str(texts),), output=str(folder.parent / "out"))
    return make_plan(config, has_gpu=False)


def test_a_plan_knows_the_models_shape(folder: Path) -> None:
    model = planned(folder).model

    assert (model.num_layers, model.hidden_size, model.intermediate_size) == (5, 32, 48)
    shape = ModelShape(num_layers=5, hidden_size=32, intermediate_size=model.intermediate_size, num_labels=3)
    assert ModelShape.of(load_checkpoint(str(folder)).model.config) == shape
    assert shape.layer_flops(tokens=1, squared_tokens=1) == 2 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 32


def test_the_longest_input_leaves_out_positions_that_no_token_has(folder: Path) -> None:
    assert load_checkpoint(str(folder)).longest_input == LONGEST


def test_the_digest_is_the_same_before_saving_and_after_loading(
    family: str, folder: Path, tiny_model: ModelFactory
) -> None:
    assert weights_digest(load_checkpoint(str(folder)).model) == weights_digest(tiny_model(family))


def test_the_digest_changes_with_the_activation(family: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(family)
    before = weights_digest(model)

    setattr(model.config.backbone_config, FAMILIES[family].activation, "relu")

    assert weights_digest(model) != before


def test_digests_tell_families_of_equal_weights_apart(tiny_model: ModelFactory) -> None:
    alike = [tiny_model(family) for family in ("roberta", "xlm-roberta", "camembert")]

    assert all(
        torch.equal(a, b)
        for model in alike[1:]
        for a, b in zip(alike[0].state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert len({weights_digest(model) for model in alike}) == 3


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert", "electra"])
def test_a_decoder_is_no_backbone(family: str) -> None:
    config = make_backbone_config(family)
    config.is_decoder = True

    with pytest.raises(BackboneError, match=f"a '{family} decoder' backbone cannot have off-ramps"):
        family_of(config)
