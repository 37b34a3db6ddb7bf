"""Static baselines: which layers they keep, that they keep them unchanged, and that they are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertModel, PreTrainedTokenizerFast

from deebert.baselines import StaticStyle, cut, kept_layers
from deebert.checkpoint import load_checkpoint
from deebert.encoder import PackedEncoder
from deebert.errors import BackboneError, DataError
from deebert.evaluation import LabelledSequences, trace
from deebert.packing import PackedTokens
from deebert.training import BackboneStage, Recipe
from jobs.static import train_static
from jobs.traces import StaticRecord
from pipeline.errors import UsageError
from tests.conftest import ModelFactory, make_backbone_config

TOKENS = PackedTokens.pack([[2, 45, 46, 3], [2, 47, 3], [2, 48, 49, 50, 51, 3]])


@pytest.mark.parametrize(
    ("depth", "style", "layers"),
    [
        (3, "first", (1, 2, 3)),
        (6, "every-other", (1, 3, 5, 7, 9, 11)),
        (4, "every-other", (1, 4, 7, 10)),
        (5, "every-other", (1, 3, 5, 8, 10)),
        (12, "every-other", tuple(range(1, 13))),
    ],
)
def test_kept_layers_of_12(depth: int, style: StaticStyle, layers: tuple[int, ...]) -> None:
    assert kept_layers(12, depth, style) == layers


@pytest.mark.parametrize("depth", [0, 13])
def test_no_such_depth(depth: int) -> None:
    with pytest.raises(BackboneError, match=f"of {depth} layers cannot be cut from 12: give 1 to 12"):
        kept_layers(12, depth, "first")


def test_a_cut_model_runs_its_layers_alone(tiny_model: ModelFactory, family: str, pooling: str) -> None:
    whole = tiny_model(family, pooling)
    encoder = PackedEncoder.of(whole)
    states = encoder.embed(TOKENS)
    for layer in (1, 3, 4):
        states = encoder.layer(layer - 1, states, TOKENS.layout)

    static = cut(whole, (1, 3, 4))
    (logits,) = trace(PackedEncoder.of(static), TOKENS).logits

    assert static.config.num_hidden_layers == 3
    assert static.config.off_ramp_layers == []
    assert static.config.id2label == whole.config.id2label
    torch.testing.assert_close(logits, encoder.off_ramp(4, states, TOKENS.layout), atol=1e-6, rtol=0)


def test_a_cut_model_shares_nothing_with_the_whole(tiny_model: ModelFactory) -> None:
    whole = tiny_model()
    static = cut(whole, (1, 2))
    with torch.no_grad():
        for parameter in static.parameters():
            parameter.zero_()

    assert all(bool(parameter.any()) for parameter in whole.parameters())


class TestTraining:
    RECIPE = Recipe(stage_1=BackboneStage(epochs=20, batch_size=16, learning_rate=2e-3))

    def data(self, labels: list[int]) -> LabelledSequences:
        """A text's first letter tells its label."""
        texts = [[2, 5 + label, *range(20, 22 + i % 5), 3] for i, label in enumerate(labels)]
        return LabelledSequences(tokens=PackedTokens.pack(texts), labels=torch.tensor(labels))

    @pytest.fixture
    def backbone(self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
        model = tiny_model()
        torch.manual_seed(0)  # its pooler's weights
        plain = BertModel(model.config.backbone_config)
        plain.load_state_dict(model.backbone.state_dict(), strict=False)
        plain.save_pretrained(tmp_path / "backbone")
        tokenizer.save_pretrained(tmp_path / "backbone")
        return str(tmp_path / "backbone")

    def test_a_baseline_learns(self, backbone: str, saved_model: Path) -> None:
        data, like = self.data([0, 1, 2] * 40), load_checkpoint(str(saved_model))

        static = train_static(
            StaticRecord(depth=2, style="every-other", recipe={"backbone": backbone}),
            like=like,
            data=data,
            recipe=self.RECIPE,
        )

        predictions = trace(PackedEncoder.of(static.model), data.tokens).logits[-1].argmax(-1)
        assert (predictions == data.labels).float().mean() > 0.9
        assert static.record.name == "static 2 (every-other)"
        assert not static.model.training

    @pytest.mark.parametrize(
        ("field", "value"), [("num_hidden_layers", 3), ("vocab_size", 200), ("hidden_size", 64)]
    )
    def test_another_backbone_is_no_baseline_of_the_model(
        self, field: str, value: int, saved_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        config = make_backbone_config("bert")
        setattr(config, field, value)
        BertModel(config).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        like = load_checkpoint(str(saved_model))
        record = StaticRecord(depth=2, style="first", recipe={"backbone": str(tmp_path / "other")})

        with pytest.raises(
            UsageError, match=f"other' is not the one of .*: its {field} is {value}, the model's is"
        ):
            train_static(record, like=like, data=self.data([0, 1]), recipe=self.RECIPE)

    def test_labels_that_the_model_does_not_have_are_refused(self, backbone: str, saved_model: Path) -> None:
        like = load_checkpoint(str(saved_model))
        record = StaticRecord(depth=2, style="first", recipe={"backbone": backbone})

        with pytest.raises(DataError, match="the labels run from 0 to 3 but the model has 3"):
            train_static(record, like=like, data=self.data([0, 3]), recipe=self.RECIPE)
