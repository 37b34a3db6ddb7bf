"""DeeBERT as a Hugging Face model: saved, loaded, and built on a pretrained backbone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    RobertaConfig,
)

from deebert.backbones import FAMILIES
from deebert.config import DeeBertConfig
from deebert.errors import BackboneError, CheckpointError
from deebert.modeling import DeeBertForSequenceClassification, pool
from tests.conftest import ModelFactory, make_backbone_config, randomize

IDS = torch.tensor([[2, 40, 50, 60, 3], [2, 41, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def small(
    config_class: type[BertConfig] | type[RobertaConfig], **fields: object
) -> BertConfig | RobertaConfig:
    return config_class(
        vocab_size=70,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        **fields,
    )


def save_backbone(folder: Path, model: PreTrainedModel) -> str:
    randomize(model, seed=3)
    model.save_pretrained(folder)
    return str(folder)


def assert_fresh_and_unlike(ramps: list[Any], *, spread: float) -> None:
    """Poolers drawn from a normal distribution of this standard deviation, each for itself."""
    weights = torch.stack([ramp.dense.weight.detach() for ramp in ramps])
    assert weights.std().item() == pytest.approx(spread, rel=0.15)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    assert all(ramp.dense.bias.abs().max() == 0 for ramp in ramps)


class TestConfig:
    def test_every_layer_but_the_last_has_an_off_ramp_by_default(self) -> None:
        config = DeeBertConfig(backbone_config=small(BertConfig))

        assert config.off_ramp_layers == [1, 2]
        assert config.num_hidden_layers == 3
        assert config.hidden_size == 16
        assert config.off_ramp_pooling == "mean"
        assert config.exit_policy is None

    @pytest.mark.parametrize("layers", [[3], [2, 1], [1, 1], [-1], [1, 0]])
    def test_off_ramps_outside_the_backbone_or_out_of_order_are_refused(self, layers: list[int]) -> None:
        with pytest.raises(ValueError, match="give increasing layers between 0, the embeddings, and 2"):
            DeeBertConfig(backbone_config=small(BertConfig), off_ramp_layers=layers)

    def test_an_unknown_pooling_is_refused(self) -> None:
        with pytest.raises(ValueError, match="off_ramp_pooling is 'max': choose one of cls, mean"):
            DeeBertConfig(backbone_config=small(BertConfig), off_ramp_pooling="max")  # type: ignore[arg-type]

    def test_an_unknown_backbone_family_is_refused_by_name(self) -> None:
        with pytest.raises(
            BackboneError, match="a 'perceptron' backbone cannot have off-ramps: use one of bert, roberta"
        ):
            DeeBertConfig(backbone_config={"model_type": "perceptron"})

    def test_json_round_trip_keeps_everything(self) -> None:
        config = DeeBertConfig(
            backbone_config=small(RobertaConfig, pad_token_id=1),
            off_ramp_layers=[2],
            off_ramp_pooling="cls",
            exit_policy={"type": "entropy", "thresholds": [None, 0.2]},
            max_seq_length=12,
            id2label={0: "no", 1: "yes"},
            label2id={"no": 0, "yes": 1},
        )

        again = DeeBertConfig(**config.to_dict())

        assert isinstance(again.backbone_config, RobertaConfig)
        assert again.backbone_config.pad_token_id == 1
        assert again.off_ramp_layers == [2]
        assert again.off_ramp_pooling == "cls"
        assert again.exit_policy == {"type": "entropy", "thresholds": [None, 0.2]}
        assert again.max_seq_length == 12
        assert again.id2label == {0: "no", 1: "yes"}
        assert again.num_labels == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_names_what_families_call_differently(self, family: str) -> None:
        config = DeeBertConfig(backbone_config=make_backbone_config(family, num_layers=4))

        assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 32, 48)
        assert config.has_token_types == (family in ("bert", "electra"))
        assert DeeBertConfig(**config.to_dict()).intermediate_size == 48

    def test_an_unknown_activation_is_refused(self) -> None:
        with pytest.raises(
            ValueError, match="off_ramp_activation is 'swish': choose one of tanh, relu, gelu"
        ):
            DeeBertConfig(backbone_config=small(BertConfig), off_ramp_activation="swish")


class TestSavedModel:
    @pytest.mark.parametrize("layers", [None, [1, 3], []])
    def test_loads_through_the_auto_classes_with_equal_weights_and_answers(
        self, tmp_path: Path, tiny_model: ModelFactory, family: str, pooling: str, layers: list[int] | None
    ) -> None:
        model = tiny_model(family, pooling, off_ramp_layers=layers)
        model.save_pretrained(tmp_path)

        config = AutoConfig.from_pretrained(tmp_path)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()

        assert type(config) is DeeBertConfig
        assert type(again) is DeeBertForSequenceClassification
        assert config.backbone_config.model_type == family
        assert config.off_ramp_layers == ([1, 2, 3, 4] if layers is None else layers)
        assert config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(model(IDS, MASK).logits, again(IDS, MASK).logits)


class TestForward:
    def test_gives_logits_of_every_off_ramp_and_the_final_classifier(
        self, model: DeeBertForSequenceClassification
    ) -> None:
        output = model(IDS, MASK)

        assert output.loss is None
        assert output.logits.shape == (2, 3)
        assert output.off_ramp_logits.shape == (4, 2, 3)

    def test_an_off_ramp_reads_its_own_layer(self, tiny_model: ModelFactory, pooling: str) -> None:
        model = tiny_model("bert", pooling, off_ramp_layers=[2, 4])

        states = model.hidden_states(IDS, MASK, None)
        output = model(IDS, MASK)

        assert len(states) == 6
        for ramp, layer, logits in zip(model.off_ramps, (2, 4), output.off_ramp_logits, strict=True):
            assert torch.equal(logits, ramp(pool(states[layer], MASK, pooling)))
        assert torch.equal(output.logits, model.final_classifier(pool(states[5], MASK, pooling)))

    def test_without_off_ramps_there_are_no_off_ramp_logits(self, tiny_model: ModelFactory) -> None:
        assert tiny_model(off_ramp_layers=[])(IDS, MASK).off_ramp_logits is None

    def test_the_loss_is_the_final_classifiers_cross_entropy(
        self, model: DeeBertForSequenceClassification
    ) -> None:
        labels = torch.tensor([2, 0])

        output = model(IDS, MASK, labels=labels)

        log_p = torch.log_softmax(output.logits, dim=-1)
        torch.testing.assert_close(output.loss, -(log_p[0, 2] + log_p[1, 0]) / 2)
        output.loss.backward()
        assert all(p.grad is None for p in model.off_ramps.parameters())
        assert all(p.grad is not None for p in model.final_classifier.parameters())

    def test_padding_changes_no_answer(self, model: DeeBertForSequenceClassification) -> None:
        together, alone = model(IDS, MASK), model(IDS[1:, :3])

        torch.testing.assert_close(together.logits[1], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            together.off_ramp_logits[:, 1], alone.off_ramp_logits[:, 0], atol=1e-5, rtol=0
        )


class TestPooling:
    HIDDEN = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [500.0, 500.0]], [[4.0, 4.0], [5.0, 5.0], [6.0, 6.0]]])
    REAL = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def test_mean_pooling_ignores_padding(self) -> None:
        assert pool(self.HIDDEN, self.REAL, "mean").tolist() == [[2.0, 20.0], [5.0, 5.0]]

    def test_cls_pooling_takes_the_first_token(self) -> None:
        assert pool(self.HIDDEN, self.REAL, "cls").tolist() == [[1.0, 10.0], [4.0, 4.0]]


class TestFromBackbone:
    @pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.has_pooler])
    def test_keeps_the_backbone_bit_for_bit_and_starts_every_pooler_as_the_pretrained_one(
        self, tmp_path: Path, family: str, pooling: str
    ) -> None:
        backbone: Any = FAMILIES[family].model(make_backbone_config(family, num_layers=3))
        folder = save_backbone(tmp_path, backbone)

        model = DeeBertForSequenceClassification.from_backbone(
            folder, labels=["no", "yes", "maybe"], off_ramp_pooling=pooling
        )

        expected = {k: v for k, v in backbone.state_dict().items() if not k.startswith("pooler.")}
        actual = model.backbone.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert len(model.off_ramps) == 2
        for ramp in (*model.off_ramps, model.final_classifier):
            assert torch.equal(ramp.dense.weight, backbone.pooler.dense.weight)
            assert torch.equal(ramp.dense.bias, backbone.pooler.dense.bias)
        assert model.config.off_ramp_pooling == pooling
        assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
        assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}

    @pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.has_pooler])
    def test_families_without_a_pooler_start_from_random_ones_and_say_so(
        self, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = make_backbone_config(family, num_layers=3)
        config.initializer_range = 0.1
        backbone: Any = FAMILIES[family].model(config)
        folder = save_backbone(tmp_path, backbone)

        model = DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])

        assert (
            f"{folder} has no pretrained pooler: the off-ramps' start from random weights" in caplog.messages
        )
        expected, actual = backbone.state_dict(), model.backbone.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert_fresh_and_unlike([*model.off_ramps, model.final_classifier], spread=0.1)

    def test_a_checkpoint_saved_without_its_pooler_is_treated_the_same(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = save_backbone(tmp_path, BertModel(small(BertConfig), add_pooling_layer=False))

        model = DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])

        assert "has no pretrained pooler" in caplog.text
        assert_fresh_and_unlike([*model.off_ramps, model.final_classifier], spread=0.02)

    def test_a_pretrained_pooler_is_nothing_to_speak_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        DeeBertForSequenceClassification.from_backbone(
            save_backbone(tmp_path, BertModel(small(BertConfig))), labels=["no", "yes"]
        )

        assert "pooler" not in caplog.text

    def test_a_backbone_that_lacks_weights_is_refused(self, tmp_path: Path) -> None:
        folder = save_backbone(tmp_path, BertModel(small(BertConfig)))
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: value for name, value in weights.items() if "encoder.layer.1.output" not in name}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

        with pytest.raises(CheckpointError) as caught:
            DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])
        assert str(caught.value) == (
            f"'{folder}' lacks 4 of the weights that it should have, first "
            "'encoder.layer.1.output.LayerNorm.bias': give a complete model of that kind"
        )

    @pytest.mark.parametrize("kept_bytes", [0, 5, 1000])
    def test_weights_that_were_cut_short_are_refused(self, tmp_path: Path, kept_bytes: int) -> None:
        folder = save_backbone(tmp_path, BertModel(small(BertConfig)))
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept_bytes])

        with pytest.raises(CheckpointError, match=f"cannot load the model '{folder}': "):
            DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])

    def test_poolers_are_copies_that_train_apart(self, tmp_path: Path) -> None:
        folder = save_backbone(tmp_path, BertModel(small(BertConfig)))
        model = DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])
        before = model.off_ramps[1].dense.weight.clone()

        with torch.no_grad():
            model.off_ramps[0].dense.weight.zero_()

        assert torch.equal(model.off_ramps[1].dense.weight, before)

    def test_half_precision_checkpoints_are_widened_exactly(self, tmp_path: Path) -> None:
        backbone = BertModel(small(BertConfig)).half()
        folder = save_backbone(tmp_path, backbone)

        model = DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])

        assert {p.dtype for p in model.parameters()} == {torch.float32}
        stored = backbone.encoder.layer[0].output.dense.weight
        assert torch.equal(model.backbone.encoder.layer[0].output.dense.weight, stored.float())

    def test_further_configuration_reaches_the_model(self, tmp_path: Path) -> None:
        folder = save_backbone(tmp_path, BertModel(small(BertConfig)))

        model = DeeBertForSequenceClassification.from_backbone(
            folder, labels=["no", "yes"], off_ramp_layers=[2], max_seq_length=16
        )

        assert len(model.off_ramps) == 1
        assert model.config.off_ramp_layers == [2]
        assert model.config.max_seq_length == 16

    def test_another_family_is_refused_by_name(self, tmp_path: Path) -> None:
        gpt2 = GPT2Model(GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1))
        folder = save_backbone(tmp_path, gpt2)

        with pytest.raises(
            BackboneError,
            match="a 'gpt2' backbone cannot have off-ramps: "
            "use one of bert, roberta, xlm-roberta, camembert, electra, distilbert",
        ):
            DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])

    def test_a_decoder_is_refused(self, tmp_path: Path) -> None:
        folder = save_backbone(tmp_path, BertModel(small(BertConfig, is_decoder=True)))

        with pytest.raises(BackboneError, match="a 'bert decoder' backbone cannot have off-ramps"):
            DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"])
