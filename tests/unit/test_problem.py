"""What each problem type computes, in literal numbers and against torch and Hugging Face."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from deebert.exit_policy import EntropyThreshold, OffRampAnswer
from deebert.modeling import DeeBertForSequenceClassification
from deebert.problem import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, Problem, problem_of
from tests.conftest import ModelFactory, make_model

LN3 = math.log(3.0)
NAMES = list(PROBLEM_TYPES)
H_QUARTER = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
"""Entropy of a question that is answered yes with probability 3/4: sigmoid(ln 3)."""


def of(name: str) -> tuple[Problem, Tensor, Tensor]:
    """A problem, logits of 2 off-ramps for 5 samples, and labels."""
    generator = torch.Generator().manual_seed(3)
    problem, outputs = problem_of(name), 1 if name == "regression" else 4
    logits = torch.randn(2, 5, outputs, generator=generator)
    raw = {
        "single_label_classification": [0, 3, 1, 2, 0],
        "multi_label_classification": [(0, 2), (), (3,), (0, 1, 2, 3), (1,)],
        "regression": [0.5, -1.0, 3.0, 0.0, 2.5],
    }[name]
    return problem, logits, problem.label_tensor(raw, outputs)


def test_names_are_hugging_faces() -> None:
    assert [problem_of(name).name for name in NAMES] == NAMES
    assert problem_of(None) is SINGLE_LABEL
    with pytest.raises(
        ValueError, match="problem_type is 'ranking': choose one of single_label_classification, m"
    ):
        problem_of("ranking")


class TestLosses:
    def test_single_label_is_cross_entropy(self) -> None:
        problem, logits, labels = of("single_label_classification")

        expected = [F.cross_entropy(one, labels, reduction="none") for one in logits]
        torch.testing.assert_close(problem.losses(logits, labels), torch.stack(expected))

    def test_multi_label_is_the_mean_binary_cross_entropy(self) -> None:
        problem, logits, labels = of("multi_label_classification")

        expected = [F.binary_cross_entropy(one.sigmoid(), labels, reduction="none").mean(1) for one in logits]
        torch.testing.assert_close(problem.losses(logits, labels), torch.stack(expected))

    def test_regression_is_the_squared_distance(self) -> None:
        losses = REGRESSION.losses(torch.tensor([[[1.0], [2.0]]]), torch.tensor([3.0, 2.5]))

        assert losses.tolist() == [[4.0, 0.25]]

    @pytest.mark.parametrize("name", NAMES)
    def test_the_models_loss_is_hugging_faces(self, tiny_model: ModelFactory, name: str) -> None:
        """As `BertForSequenceClassification` computes it for this problem type and these labels."""
        from transformers.loss.loss_utils import ForSequenceClassificationLoss

        _, _, labels = of(name)
        outputs = 1 if name == "regression" else 4
        model = make_model(num_labels=outputs, problem_type=name)
        output = model(torch.arange(5, 25).view(5, 4), labels=labels)

        expected = ForSequenceClassificationLoss(labels, output.logits, model.config)
        torch.testing.assert_close(output.loss, expected)


class TestDivergences:
    @pytest.mark.parametrize("name", NAMES)
    def test_none_from_oneself_and_more_from_others(self, name: str) -> None:
        problem, logits, _ = of(name)

        from_first = problem.divergences(logits, logits[0], 2.0)

        assert from_first.shape == (2, 5)
        torch.testing.assert_close(from_first[0], torch.zeros(5), atol=1e-6, rtol=0)
        assert (from_first[1] > 1e-4).all()

    def test_of_labels_it_is_the_mean_of_their_own(self) -> None:
        # At temperature 2 the targets 2 ln 3 and 0 are 3/4 and 1/2; both answers are 1/2.
        found = MULTI_LABEL.divergences(torch.zeros(1, 1, 2), torch.tensor([[2 * LN3, 0.0]]), 2.0)

        kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
        assert found.item() == pytest.approx(4 * kl / 2, abs=1e-6)

    def test_of_numbers_it_is_the_squared_distance_at_any_temperature(self) -> None:
        said, wanted = torch.tensor([[[1.0]]]), torch.tensor([[3.0]])

        assert REGRESSION.divergences(said, wanted, 1.0).item() == 4.0
        assert REGRESSION.divergences(said, wanted, 9.0).item() == 4.0

    @pytest.mark.parametrize("name", NAMES)
    def test_targets_get_no_gradient(self, name: str) -> None:
        problem, logits, _ = of(name)
        said, wanted = logits.clone().requires_grad_(), logits[0].clone().requires_grad_()

        problem.divergences(said, wanted, 2.0).sum().backward()

        assert wanted.grad is None
        assert said.grad is not None


class TestEntropy:
    def test_of_labels_it_is_that_of_the_least_sure_one(self) -> None:
        logits = torch.tensor([[LN3, 9.0, -9.0], [-LN3, LN3, -LN3], [50.0, -50.0, 50.0]])

        assert MULTI_LABEL.entropy(logits).tolist() == pytest.approx([H_QUARTER, H_QUARTER, 0.0], abs=1e-6)

    def test_underflow_is_no_nan(self) -> None:
        assert MULTI_LABEL.entropy(torch.tensor([[1e30, -1e30], [200.0, -200.0]])).tolist() == [0.0, 0.0]

    def test_reduced_precision_is_computed_in_float32(self) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            found = MULTI_LABEL.entropy(torch.tensor([[1.0, -2.0]], dtype=dtype))
            assert found.dtype == torch.float32
            assert found.tolist() == MULTI_LABEL.entropy(torch.tensor([[1.0, -2.0]])).tolist()

    @given(st.lists(st.floats(-60, 60), min_size=1, max_size=6))
    def test_is_never_above_ln_2_and_does_not_ask_which_answer(self, logits: list[float]) -> None:
        row = torch.tensor([logits])

        found = MULTI_LABEL.entropy(row).item()

        assert 0.0 <= found <= math.log(2) + 1e-6
        assert found == pytest.approx(MULTI_LABEL.entropy(-row).item(), abs=1e-6)

    @given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.floats(-20, 20))
    def test_a_further_label_never_makes_an_answer_surer(self, logits: list[float], other: float) -> None:
        fewer, more = torch.tensor([logits]), torch.tensor([[*logits, other]])

        assert MULTI_LABEL.entropy(more).item() >= MULTI_LABEL.entropy(fewer).item() - 1e-6

    def test_a_number_has_none_and_never_leaves_by_it(self) -> None:
        logits = torch.tensor([[0.3], [7.0]])
        nothing = REGRESSION.entropy(logits)

        assert nothing.isnan().all()
        assert (
            EntropyThreshold(5.0).fires(1, OffRampAnswer(logits=logits, entropy=nothing)).tolist()
            == [False] * 2
        )


class TestPredictions:
    def test_labels_hold_above_one_half(self) -> None:
        assert MULTI_LABEL.predict(torch.tensor([[0.1, 0.0, -0.1]])).tolist() == [[True, False, False]]

    def test_labels_hold_above_one_half_of_a_mean_too(self) -> None:
        assert MULTI_LABEL.predict_scores(torch.tensor([[0.501, 0.5, 0.499]])).tolist() == [
            [True, False, False]
        ]

    def test_scores(self) -> None:
        assert SINGLE_LABEL.scores(torch.tensor([[LN3, 0.0]])).tolist() == [pytest.approx([0.75, 0.25])]
        assert MULTI_LABEL.scores(torch.tensor([[LN3, 0.0]])).tolist() == [pytest.approx([0.75, 0.5])]
        assert REGRESSION.scores(torch.tensor([[2.5]])).tolist() == [[2.5]]

    def test_correctness_is_what_a_learning_to_exit_head_learns(self) -> None:
        right = SINGLE_LABEL.correctness(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        assert right.tolist() == [1.0, 0.0]

        sets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        right = MULTI_LABEL.correctness(torch.tensor([[3.0, -3.0], [3.0, 3.0]]), sets)
        assert right.tolist() == [1.0, 0.0]

        close = REGRESSION.correctness(torch.tensor([[2.0], [3.0]]), torch.tensor([2.0, 2.0]))
        assert close.tolist() == pytest.approx([1.0, 1 - math.tanh(1.0)])

    def test_an_error_is_as_wrong_as_it_is_large_among_the_labels(self) -> None:
        labels = torch.tensor([0.0, 1.0, 2.5, 4.0, 5.0])
        errors = torch.tensor([0.0, 0.1, -0.25, 0.5, 1.0])

        found = []
        for unit in (0.2, 1.0, 20.0):  # labels to 1, to 5 as STS-B's, to 100
            logits = ((labels + errors) * unit)[:, None]
            scale = REGRESSION.label_scale(labels * unit)
            found.append(REGRESSION.correctness(logits, labels * unit, scale))

        assert all(torch.allclose(right, found[1], atol=1e-5) for right in found)
        assert REGRESSION.label_scale(torch.tensor([0.5, 3.5])) == pytest.approx(1.0)  # a deviation of 1.5
        assert REGRESSION.label_scale(torch.tensor([7.0, 7.0])) == 1.0
        assert SINGLE_LABEL.label_scale(torch.tensor([0, 9])) == 1.0


class TestLabels:
    @pytest.mark.parametrize("name", NAMES)
    def test_good_ones_fit(self, name: str) -> None:
        problem, logits, labels = of(name)

        assert problem.misfit(labels, logits.shape[-1]) is None

    def test_multi_hot(self) -> None:
        assert MULTI_LABEL.label_tensor([(0, 2), ()], 3).tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]

    @pytest.mark.parametrize(
        ("problem", "labels", "says"),
        [
            (SINGLE_LABEL, torch.tensor([0, 3]), "the labels run from 0 to 3 but the model has 3"),
            (MULTI_LABEL, torch.zeros(2, 4), "each of the model's 3 labels"),
            (MULTI_LABEL, torch.full((2, 3), 0.5), "give one 0 or 1 a row and label"),
            (REGRESSION, torch.tensor([1.0, math.nan]), "one finite number a row"),
            (REGRESSION, torch.zeros(4, 2), "one finite number a row"),
        ],
    )
    def test_others_are_told_apart(self, problem: Problem, labels: Tensor, says: str) -> None:
        wrong = problem.misfit(labels, 3)

        assert wrong is not None
        assert says in wrong


class TestModels:
    def test_a_regression_has_one_output(self) -> None:
        with pytest.raises(ValueError, match="a regression has one output, not 3"):
            make_model(problem_type="regression")

    @pytest.mark.parametrize("name", NAMES)
    def test_the_problem_and_the_head_come_back_from_a_folder(self, tmp_path, name: str) -> None:  # type: ignore[no-untyped-def]
        model = make_model(
            num_labels=1 if name == "regression" else 3, problem_type=name, learns_to_exit=True
        )
        model.save_pretrained(tmp_path)

        again = DeeBertForSequenceClassification.from_pretrained(tmp_path).eval()

        ids = torch.arange(5, 25).view(5, 4)
        assert again.config.problem is problem_of(name)
        assert torch.equal(again(ids).certainties, model(ids).certainties)

    def test_a_head_reads_states_without_moving_them(self) -> None:
        model = make_model(learns_to_exit=True)

        model(torch.arange(5, 25).view(5, 4)).certainties.sum().backward()

        moved = {name for name, p in model.named_parameters() if p.grad is not None}
        assert moved == {"exit_head.linear.weight", "exit_head.linear.bias"}

    def test_a_model_can_be_given_a_head_later(self) -> None:
        model = make_model()
        before = model(torch.arange(5, 25).view(5, 4))

        model.learn_to_exit()
        head = model.exit_head
        model.learn_to_exit()

        after = model(torch.arange(5, 25).view(5, 4))
        assert before.certainties is None
        assert after.certainties.shape == (5, 5)
        assert torch.equal(before.off_ramp_logits, after.off_ramp_logits)
        assert model.config.learns_to_exit
        assert model.exit_head is head
