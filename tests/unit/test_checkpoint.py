"""Model folders: what loads, what each refusal says, and what the digests stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deebert.checkpoint import load_checkpoint, weights_digest
from deebert.errors import BackboneError, CheckpointError
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from tests.conftest import ModelFactory


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may damage."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class TestLoading:
    def test_a_complete_folder_loads_in_float32_and_eval_mode(self, saved_model: Path) -> None:
        checkpoint = load_checkpoint(str(saved_model))

        assert checkpoint.labels == ("negative", "neutral", "positive")
        assert not checkpoint.model.training
        assert {p.dtype for p in checkpoint.model.parameters()} == {torch.float32}
        assert checkpoint.tokenizer("a good film").input_ids[0] == checkpoint.tokenizer.cls_token_id
        assert checkpoint.exit_policy == FULL_DEPTH

    def test_half_precision_is_widened_exactly(self, folder: Path, tiny_model: ModelFactory) -> None:
        halves = tiny_model().half()
        halves.save_pretrained(folder)

        model = load_checkpoint(str(folder)).model

        assert {p.dtype for p in model.parameters()} == {torch.float32}
        stored = halves.state_dict()
        assert all(torch.equal(value, stored[name].float()) for name, value in model.state_dict().items())

    def test_a_vocabulary_that_was_resized_is_saved_with_the_backbone(
        self, folder: Path, tiny_model: ModelFactory
    ) -> None:
        model = tiny_model()
        size = model.config.backbone_config.vocab_size + 3
        model.resize_token_embeddings(size)
        model.save_pretrained(folder)

        loaded = load_checkpoint(str(folder)).model

        assert loaded.config.vocab_size == loaded.config.backbone_config.vocab_size == size
        assert weights_digest(loaded) == weights_digest(model)

    def test_the_stored_operating_point_is_the_exit_policy(self, folder: Path) -> None:
        edit_config(folder, exit_policy={"type": "entropy", "thresholds": [0.1, None, 0.2, 0.3]})

        assert load_checkpoint(str(folder)).exit_policy == EntropyThreshold((0.1, None, 0.2, 0.3))

    @pytest.mark.parametrize(("trained", "default"), [(None, 64), (16, 16), (512, 64)])
    def test_the_default_length_is_what_training_used_within_what_positions_allow(
        self, folder: Path, trained: int | None, default: int
    ) -> None:
        edit_config(folder, max_seq_length=trained)

        checkpoint = load_checkpoint(str(folder))

        assert checkpoint.longest_input == 64
        assert checkpoint.default_max_length == default

    def test_robertas_positions_start_behind_its_padding(
        self, folder: Path, tiny_model: ModelFactory
    ) -> None:
        model = tiny_model("roberta")
        model.save_pretrained(folder)

        assert model.config.backbone_config.max_position_embeddings == 66
        assert load_checkpoint(str(folder)).longest_input == 64


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        missing = tmp_path / "nowhere"

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(missing))
        assert str(caught.value) == f"no such model folder: '{missing}'; train one with `deebert train`"

    def test_no_configuration(self, folder: Path) -> None:
        (folder / "config.json").unlink()

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == f"the model folder '{folder}' has no config.json: give a complete folder"

    def test_a_configuration_that_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")

        with pytest.raises(CheckpointError, match=r"config\.json' is not JSON \(.*\): save the model again"):
            load_checkpoint(str(folder))

    @pytest.mark.parametrize("document", ['{"model_type": "bert"}', "{}", "[]"])
    def test_another_kind_of_model(self, folder: Path, document: str) -> None:
        (folder / "config.json").write_text(document)
        kind = "'bert'" if "bert" in document else "None"

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == (
            f"'{folder}' holds a {kind} model, not a DeeBERT one: "
            "give it off-ramps with `deebert train --backbone`"
        )

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == (
            f"the model folder '{folder}' has no weights (model.safetensors): save the model again"
        )

    def test_no_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == (
            f"the model folder '{folder}' has no tokenizer (tokenizer.json): save the tokenizer into it"
        )

    def test_weights_that_are_missing_are_counted_and_named(
        self, folder: Path, tiny_model: ModelFactory
    ) -> None:
        tiny_model(off_ramp_layers=[1, 2, 3]).save_pretrained(folder)
        edit_config(folder, off_ramp_layers=[1, 2, 3, 4])

        with pytest.raises(CheckpointError, match=r"lacks 4 weights, first 'off_ramps\.3\.classifier\.bias'"):
            load_checkpoint(str(folder))

    def test_weights_of_another_shape(self, folder: Path, tiny_model: ModelFactory) -> None:
        tiny_model(num_labels=2).save_pretrained(folder)
        edit_config(folder, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == (
            f"the weight 'final_classifier.classifier.bias' of '{folder}' has shape (2,), its config.json makes it "
            "(3,): give the configuration that belongs to the weights"
        )

    @pytest.mark.parametrize("kept_bytes", [0, 5, 1000])
    def test_a_weights_file_that_was_cut_short(self, folder: Path, kept_bytes: int) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept_bytes])

        with pytest.raises(CheckpointError, match=f"cannot read the weights '{weights}': "):
            load_checkpoint(str(folder))

    def test_a_configuration_of_the_wrong_types(self, folder: Path) -> None:
        edit_config(folder, backbone_config={"model_type": "bert", "hidden_size": "wide"})

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value).startswith(
            f"cannot load the model '{folder}': Validation error for field 'hidden_size': TypeError: "
        )

    @pytest.mark.parametrize(
        "names", [["a", "b", "c"], 5, {"a": "a", "b": "b", "c": "c"}, {"1": "a", "2": "b", "3": "c"}]
    )
    def test_labels_that_are_not_named_by_their_ids(self, folder: Path, names: object) -> None:
        edit_config(folder, id2label=names)

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == (
            f"cannot load the model '{folder}': id2label is {names}: give the name of each label by its id, from 0 on"
        )

    def test_an_activation_that_there_is_not(self, folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        edit_config(folder, backbone_config={**document["backbone_config"], "hidden_act": "gelu_newer"})

        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(str(folder))
        assert str(caught.value) == f"cannot load the model '{folder}': there is no 'gelu_newer'"

    @pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
    def test_a_tokenizer_that_cannot_be_read(self, folder: Path, content: str) -> None:
        (folder / "tokenizer.json").write_text(content)

        with pytest.raises(
            CheckpointError, match=rf"cannot read the tokenizer in '{folder}' \(.*\): save it"
        ):
            load_checkpoint(str(folder))

    def test_off_ramps_that_the_backbone_cannot_have(self, folder: Path) -> None:
        edit_config(folder, off_ramp_layers=[9])

        with pytest.raises(CheckpointError, match=r"off_ramp_layers is \[9\]: give increasing layers"):
            load_checkpoint(str(folder))

    def test_a_backbone_family_without_off_ramps(self, folder: Path) -> None:
        edit_config(folder, backbone_config={"model_type": "gpt2"})

        with pytest.raises(BackboneError, match="a 'gpt2' backbone cannot have off-ramps"):
            load_checkpoint(str(folder))


class TestWeightsDigest:
    def test_is_the_same_before_saving_and_after_loading(
        self, saved_model: Path, tiny_model: ModelFactory
    ) -> None:
        assert weights_digest(load_checkpoint(str(saved_model)).model) == weights_digest(tiny_model())

    @pytest.mark.parametrize(
        "name",
        [
            "backbone.embeddings.word_embeddings.weight",
            "backbone.encoder.layer.2.attention.self.key.bias",
            "off_ramps.3.classifier.weight",
            "final_classifier.dense.bias",
        ],
    )
    def test_changes_when_one_weight_changes(self, tiny_model: ModelFactory, name: str) -> None:
        model = tiny_model()
        before = weights_digest(model)

        with torch.no_grad():
            value = model.get_parameter(name).view(-1)[3:4]
            value.copy_(torch.nextafter(value, torch.tensor([torch.inf])))

        assert weights_digest(model) != before

    @pytest.mark.parametrize(
        ("field", "value"), [("hidden_act", "relu"), ("num_attention_heads", 8), ("layer_norm_eps", 1e-3)]
    )
    def test_changes_with_what_decides_the_answers(
        self, tiny_model: ModelFactory, field: str, value: object
    ) -> None:
        model = tiny_model()
        before = weights_digest(model)

        setattr(model.config.backbone_config, field, value)

        assert weights_digest(model) != before

    def test_changes_with_pooling(self, tiny_model: ModelFactory) -> None:
        assert weights_digest(tiny_model(pooling="cls")) != weights_digest(tiny_model(pooling="mean"))

    def test_does_not_change_with_the_operating_point_label_names_or_library(
        self, tiny_model: ModelFactory
    ) -> None:
        model = tiny_model()
        before = weights_digest(model)

        model.config.exit_policy = {"type": "entropy", "thresholds": 0.3}
        model.config.max_seq_length = 32
        model.config.id2label = {0: "x", 1: "y", 2: "z"}
        model.config.backbone_config.transformers_version = "99.0"
        model.config.backbone_config.dtype = "float16"
        model.config.backbone_config.hidden_dropout_prob = 0.5

        assert weights_digest(model) == before
