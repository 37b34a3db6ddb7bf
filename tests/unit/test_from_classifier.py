"""An already fine-tuned Hugging Face classifier keeps its answers and gains off-ramps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deebert.backbones import FAMILIES
from deebert.checkpoint import load_checkpoint
from deebert.encoder import PackedEncoder
from deebert.errors import BackboneError, CheckpointError
from deebert.evaluation import LabelledSequences, trace
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.problem import MULTI_LABEL, REGRESSION, Problem
from deebert.training import OffRampStage, Recipe, train
from tests.conftest import make_backbone_config, randomize
from tests.parity.test_encoder_vs_transformers import padded, random_ids, training_form

LABELS = {0: "negative", 1: "neutral", 2: "positive"}
ROWS = random_ids([1, 3, 9, 9, 20, 64])


def config_of(family: str, **fields: Any) -> Any:
    config = make_backbone_config(family, num_layers=3)
    config.id2label = LABELS
    config.label2id = {name: i for i, name in LABELS.items()}
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def save(folder: Path, theirs: PreTrainedModel) -> str:
    randomize(theirs, seed=4)
    theirs.eval().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def their_logits(theirs: Any, rows: list[list[int]]) -> Tensor:
    ids, mask = padded(rows, theirs.config.pad_token_id)
    logits: Tensor = theirs(input_ids=ids, attention_mask=mask).logits
    return logits


@pytest.fixture
def theirs(family: str) -> Any:
    """A fine-tuned classifier of each family: 3 layers, 3 labels."""
    torch.manual_seed(0)  # fresh off-ramps and dropout
    return FAMILIES[family].classifier(config_of(family))


class TestWhatIsKept:
    def test_the_final_logits_are_theirs_bit_for_bit(self, tmp_path: Path, theirs: Any) -> None:
        model = DeeBertForSequenceClassification.from_classifier(save(tmp_path, theirs)).eval()

        ids, mask = padded(ROWS, theirs.config.pad_token_id)
        assert torch.equal(model(ids, mask).logits, their_logits(theirs, ROWS))

    def test_the_packed_form_answers_the_same(self, tmp_path: Path, theirs: Any) -> None:
        model = DeeBertForSequenceClassification.from_classifier(save(tmp_path, theirs))

        packed = trace(PackedEncoder.of(model), PackedTokens.pack(ROWS))

        torch.testing.assert_close(packed.logits[-1], their_logits(theirs, ROWS), atol=1e-4, rtol=0)
        torch.testing.assert_close(packed.logits, training_form(model.eval(), ROWS), atol=1e-4, rtol=0)

    def test_every_weight_is_theirs(self, tmp_path: Path, theirs: Any, family: str) -> None:
        model = DeeBertForSequenceClassification.from_classifier(save(tmp_path, theirs))

        expected = theirs.base_model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.backbone.state_dict().items())
        assert expected.keys() - model.backbone.state_dict().keys() <= {
            "pooler.dense.weight",
            "pooler.dense.bias",
        }
        head = FAMILIES[family].head
        final = model.final_classifier
        assert torch.equal(final.dense.weight, theirs.get_submodule(head.dense).weight)
        assert torch.equal(final.classifier.weight, theirs.get_submodule(head.out).weight)
        assert torch.equal(final.classifier.bias, theirs.get_submodule(head.out).bias)

    def test_labels_are_theirs_and_everything_reads_cls(self, tmp_path: Path, theirs: Any) -> None:
        config = DeeBertForSequenceClassification.from_classifier(save(tmp_path, theirs)).config

        assert config.id2label == LABELS
        assert config.label2id == {"negative": 0, "neutral": 1, "positive": 2}
        assert config.off_ramp_pooling == "cls"
        assert config.exit_policy is None

    def test_half_precision_is_widened_exactly(self, tmp_path: Path, theirs: Any) -> None:
        model = DeeBertForSequenceClassification.from_classifier(save(tmp_path, theirs.half())).eval()

        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ids, mask = padded(ROWS, theirs.config.pad_token_id)
        assert torch.equal(model(ids, mask).logits, their_logits(theirs.float(), ROWS))


class TestOtherProblems:
    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"problem_type": "multi_label_classification"}, MULTI_LABEL),
            ({"num_labels": 1, "problem_type": "regression"}, REGRESSION),
            ({"num_labels": 1}, REGRESSION),
        ],
        ids=["multi-label", "regression", "one output"],
    )
    def test_weights_and_answers_are_theirs_bit_for_bit(
        self, tmp_path: Path, family: str, fields: dict[str, Any], problem: Problem
    ) -> None:
        theirs: Any = FAMILIES[family].classifier(config_of(family, **fields))
        folder = save(tmp_path, theirs)

        model = DeeBertForSequenceClassification.from_classifier(folder, learns_to_exit=True).eval()

        assert model.config.problem is problem
        ids, mask = padded(ROWS, theirs.config.pad_token_id)
        assert torch.equal(model(ids, mask).logits, their_logits(theirs, ROWS))
        assert model.exit_head is not None


class TestWhatIsGained:
    def test_off_ramps_start_from_the_heads_pooler_and_know_no_label_yet(
        self, tmp_path: Path, theirs: Any
    ) -> None:
        model = DeeBertForSequenceClassification.from_classifier(save(tmp_path, theirs))

        first, second = model.off_ramps
        assert torch.equal(first.dense.weight, model.final_classifier.dense.weight)
        assert torch.equal(second.dense.weight, model.final_classifier.dense.weight)
        assert not torch.equal(first.classifier.weight, second.classifier.weight)
        assert first.classifier.weight.std() < 0.03

    def test_further_configuration_reaches_the_model(self, tmp_path: Path, theirs: Any) -> None:
        model = DeeBertForSequenceClassification.from_classifier(
            save(tmp_path, theirs), off_ramp_layers=[2], max_seq_length=16
        )

        assert len(model.off_ramps) == 1
        assert model.config.max_seq_length == 16

    def test_off_ramps_can_share_the_heads_pooler_and_stand_on_the_embeddings(
        self, tmp_path: Path, theirs: Any
    ) -> None:
        model = DeeBertForSequenceClassification.from_classifier(
            save(tmp_path, theirs), off_ramp_layers=[0, 2], shares_off_ramp_pooler=True
        ).eval()

        assert model.off_ramp_pooler is not None
        assert torch.equal(model.off_ramp_pooler.weight, model.final_classifier.dense.weight)
        ids, mask = padded(ROWS, theirs.config.pad_token_id)
        assert model(ids, mask).off_ramp_logits.shape == (2, len(ROWS), 3)
        assert torch.equal(model(ids, mask).logits, their_logits(theirs, ROWS))

    def test_stage_2_alone_trains_them_and_leaves_the_rest(
        self, tmp_path: Path, theirs: Any, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = DeeBertForSequenceClassification.from_classifier(save(tmp_path / "theirs", theirs))
        rows = random_ids([5, 8, 13] * 20, seed=1)
        tokens = PackedTokens.pack(rows)
        # What the classifier itself says is learnable from its states.
        labels = their_logits(theirs, rows).argmax(-1)
        data = LabelledSequences(tokens=tokens, labels=labels)
        before = (trace(PackedEncoder.of(model), tokens).logits.argmax(-1) == labels).float().mean(1)
        stage = OffRampStage(epochs=120, batch_size=20, learning_rate=5e-3)

        recipe = Recipe(stage_1=None, stage_2=stage)
        train(model, tokenizer, data, recipe, tmp_path / "work", show_progress=False)

        after = (trace(PackedEncoder.of(model), tokens).logits.argmax(-1) == labels).float().mean(1)
        assert before[:-1].max() < 0.75
        assert after.min() > 0.95
        ids, mask = padded(ROWS, theirs.config.pad_token_id)
        assert torch.equal(model(ids, mask).logits, their_logits(theirs, ROWS))

        model.save_pretrained(tmp_path / "ours")
        tokenizer.save_pretrained(tmp_path / "ours")
        again = load_checkpoint(str(tmp_path / "ours"))
        assert again.labels == ("negative", "neutral", "positive")
        assert torch.equal(again.model(ids, mask).off_ramp_logits, model(ids, mask).off_ramp_logits)


class TestRefusals:
    @pytest.mark.parametrize(
        "other",
        [BertModel, BertForTokenClassification, BertForMaskedLM],
        ids=["a bare encoder", "token labels", "masked words"],
    )
    def test_models_without_such_a_head(self, tmp_path: Path, other: type[PreTrainedModel]) -> None:
        folder = save(tmp_path, other(config_of("bert")))

        with pytest.raises(CheckpointError, match=r"' lacks \d of the weights that it should have, first '"):
            DeeBertForSequenceClassification.from_classifier(folder)

    @pytest.mark.parametrize("fields", [{"num_labels": 1}, {"num_labels": 1, "problem_type": "regression"}])
    def test_a_regression_that_does_not_learn_to_exit(self, tmp_path: Path, fields: dict[str, Any]) -> None:
        folder = save(tmp_path, DistilBertForSequenceClassification(config_of("distilbert", **fields)))

        with pytest.raises(BackboneError) as caught:
            DeeBertForSequenceClassification.from_classifier(folder)
        assert str(caught.value) == (
            f"'{folder}' is a regression, whose answers have no entropy to exit by: "
            "let it learn to exit (learns_to_exit, --learn-to-exit)"
        )

    def test_a_regression_of_several_numbers(self, tmp_path: Path) -> None:
        config = config_of("distilbert", problem_type="regression")
        folder = save(tmp_path, DistilBertForSequenceClassification(config))

        with pytest.raises(BackboneError, match="is a regression of 3 outputs: give one of a single output"):
            DeeBertForSequenceClassification.from_classifier(folder, learns_to_exit=True)

    def test_a_head_of_another_number_of_labels(self, tmp_path: Path) -> None:
        folder = save(tmp_path, FAMILIES["bert"].classifier(config_of("bert")))
        two = config_of("bert")
        two.id2label, two.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
        two.save_pretrained(folder)

        with pytest.raises(
            CheckpointError,
            match=r"'classifier.bias' of '.*' has shape \(3,\), its config.json makes it \(2,\)",
        ):
            DeeBertForSequenceClassification.from_classifier(folder)

    def test_other_families(self, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=1)
        folder = save(tmp_path, GPT2ForSequenceClassification(config))

        with pytest.raises(
            BackboneError, match="a 'gpt2' backbone cannot have off-ramps: use one of bert, roberta,"
        ):
            DeeBertForSequenceClassification.from_classifier(folder)

    def test_a_pooling_that_the_head_was_not_trained_on(self, tmp_path: Path) -> None:
        folder = save(tmp_path, FAMILIES["bert"].classifier(config_of("bert")))

        with pytest.raises(TypeError, match="off_ramp_pooling"):
            DeeBertForSequenceClassification.from_classifier(folder, off_ramp_pooling="mean")
