"""Two-stage training: what each stage may touch, that it learns, and what data it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, set_seed

from deebert.encoder import PackedEncoder
from deebert.errors import DataError
from deebert.evaluation import LabelledSequences, off_ramp_accuracy, trace
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.training import (
    StageConfig,
    TwoStageConfig,
    _OffRampStack,
    check_labels,
    collect_pooled_states,
    train_off_ramps,
    train_two_stage,
)
from tests.conftest import ModelFactory

QUICK = TwoStageConfig(
    stage_1=StageConfig(epochs=4, batch_size=16, learning_rate=2e-3),
    stage_2=StageConfig(epochs=6, batch_size=16, learning_rate=5e-3),
    micro_batch_tokens=512,
)
MARKED = (90, 91, 92)
"""Token ids, one for each label: a text belongs to the label whose token it holds."""


def toy(num_rows: int, seed: int) -> LabelledSequences:
    """Random texts of 4 to 12 tokens, half of them the marked token that gives the label away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    texts, labels = [], []
    for _ in range(num_rows):
        (label,), (length,) = draw(0, 3), draw(2, 11)
        words = draw(5, 80, length)
        words = [
            MARKED[label] if place == 0 or marked else w
            for place, (w, marked) in enumerate(zip(words, draw(0, 2, length), strict=True))
        ]
        texts.append([2, *words, 3])
        labels.append(label)
    return LabelledSequences(tokens=PackedTokens.pack(texts), labels=torch.tensor(labels))


def weights(model: DeeBertForSequenceClassification) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def accuracies(model: DeeBertForSequenceClassification, data: LabelledSequences) -> tuple[float, ...]:
    return off_ramp_accuracy(trace(PackedEncoder(model), data.tokens), data.labels)


def padded(tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    rows = [tokens.sequence(i).input_ids.long() for i in range(len(tokens))]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return ids, mask


class TestStage2:
    def test_changes_every_off_ramp_and_nothing_else_bit_for_bit(
        self, model: DeeBertForSequenceClassification
    ) -> None:
        before = weights(model)

        train_off_ramps(model, toy(48, seed=0), QUICK, show_progress=False)

        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if name.startswith("off_ramps.")}

    def test_learns_on_a_frozen_backbone(self, model: DeeBertForSequenceClassification) -> None:
        train_rows, held_out = toy(400, seed=1), toy(200, seed=2)
        before = accuracies(model, held_out)

        train_off_ramps(model, train_rows, QUICK, show_progress=False)

        after = accuracies(model, held_out)
        assert after[-1] == before[-1]  # full depth is untouched
        assert all(a > b for a, b in zip(after[:-1], before[:-1], strict=True))
        assert max(after[:-1]) > 0.8

    def test_is_deterministic(self, tiny_model: ModelFactory) -> None:
        first, second = tiny_model(), tiny_model()

        for model in (first, second):
            set_seed(1)  # dropout
            train_off_ramps(model, toy(48, seed=0), QUICK, show_progress=False)

        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def test_does_nothing_without_off_ramps(self, tiny_model: ModelFactory) -> None:
        model = tiny_model(off_ramp_layers=[])
        before = weights(model)

        train_off_ramps(model, toy(16, seed=0), QUICK, show_progress=False)

        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_leaves_the_model_in_eval_mode_with_trainable_weights(self, tiny_model: ModelFactory) -> None:
        model = tiny_model().train()

        train_off_ramps(model, toy(16, seed=0), QUICK, show_progress=False)

        assert not model.training
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("layers", [None, [2, 3]])
    def test_off_ramps_on_cached_states_answer_as_in_the_model(
        self, tiny_model: ModelFactory, family: str, pooling: str, layers: list[int] | None
    ) -> None:
        model = tiny_model(family, pooling, off_ramp_layers=layers)
        data = toy(40, seed=3)

        states = collect_pooled_states(model, data, torch.float32, 64, show_progress=False)
        with torch.no_grad():
            cached = _OffRampStack(model).eval()(states)
            expected = model(*padded(data.tokens)).off_ramp_logits

        assert states.shape == (4 if layers is None else 2, 40, 32)
        torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)

    def test_the_stack_writes_back_what_it_read(self, model: DeeBertForSequenceClassification) -> None:
        before = weights(model)
        stack = _OffRampStack(model)

        with torch.no_grad():
            stack.dense[1, 2, 3] += 1.0  # input 2 of output 3
        stack.write_back(model)

        difference = {
            n: v - before[n] for n, v in model.state_dict().items() if not torch.equal(v, before[n])
        }
        assert list(difference) == ["off_ramps.1.dense.weight"]
        assert difference["off_ramps.1.dense.weight"].nonzero().tolist() == [[3, 2]]


@pytest.fixture(scope="module")
def trained(
    tiny_model: ModelFactory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> DeeBertForSequenceClassification:
    model = tiny_model(num_layers=2)
    work_dir: Path = tmp_path_factory.mktemp("training")
    train_two_stage(model, tokenizer, toy(300, seed=1), QUICK, work_dir, show_progress=False)
    return model


class TestTwoStages:
    def test_every_off_ramp_learns_the_toy_problem(self, trained: DeeBertForSequenceClassification) -> None:
        off_ramp, final = accuracies(trained, toy(200, seed=2))

        assert final > 0.95
        assert off_ramp > 0.8

    def test_stage_1_trains_backbone_and_final_classifier(
        self, trained: DeeBertForSequenceClassification, tiny_model: ModelFactory
    ) -> None:
        fresh = tiny_model(num_layers=2).state_dict()

        for name in ("backbone.encoder.layer.0.output.dense.weight", "final_classifier.classifier.weight"):
            assert not torch.equal(trained.state_dict()[name], fresh[name])


class TestData:
    def test_no_rows_are_refused(self) -> None:
        nothing = LabelledSequences(tokens=PackedTokens.pack([]), labels=torch.tensor([], dtype=torch.long))

        with pytest.raises(DataError, match="the training data has no rows: give a file with at least one"):
            check_labels(nothing, 2)

    @pytest.mark.parametrize(("labels", "low", "high"), [([0, 3], 0, 3), ([-1, 2], -1, 2), ([7, 7], 7, 7)])
    def test_labels_that_the_model_does_not_have_are_refused_before_training(
        self,
        tiny_model: ModelFactory,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
        labels: list[int],
        low: int,
        high: int,
    ) -> None:
        model = tiny_model()
        before = weights(model)
        data = LabelledSequences(tokens=PackedTokens.pack([[2, 3], [2, 3]]), labels=torch.tensor(labels))

        with pytest.raises(DataError, match=f"the labels run from {low} to {high} but the model has 3"):
            train_two_stage(model, tokenizer, data, QUICK, tmp_path, show_progress=False)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_labels_within_the_model_are_accepted(self) -> None:
        check_labels(toy(20, seed=0), 3)
