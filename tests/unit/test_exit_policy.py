"""Entropy and the exit rule, in literal numbers."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch

from deebert.errors import PolicyError
from deebert.exit_policy import (
    FULL_DEPTH,
    EntropyThreshold,
    LearningToExit,
    OffRampAnswer,
    entropy,
    policy_from_dict,
)
from deebert.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def fired(policy: EntropyThreshold, *entropies: float, layer: int = 1) -> list[bool]:
    answer = OffRampAnswer(logits=torch.zeros(len(entropies), 2), entropy=torch.tensor(entropies))
    return policy.fires(layer, answer).tolist()


def certain(policy: LearningToExit, *certainties: float, layer: int = 1) -> list[bool]:
    nothing = torch.zeros(len(certainties))
    answer = OffRampAnswer(logits=nothing[:, None], entropy=nothing, certainty=torch.tensor(certainties))
    return policy.fires(layer, answer).tolist()


def of_two_labels(num_layers: int, **other: Any) -> dict[str, Any]:
    """What a policy is checked against."""
    return {
        "problem": SINGLE_LABEL,
        "num_labels": 2,
        "num_layers": num_layers,
        "learns_to_exit": False,
        **other,
    }


@pytest.mark.parametrize(
    ("logits", "nats"),
    [
        ([0.0, 0.0], 0.693147),
        ([5.0, 5.0, 5.0], 1.098612),
        ([math.log(9), 0.0], 0.325083),  # p = 0.9, 0.1
        ([0.0, math.log(99)], 0.056002),  # p = 0.01, 0.99
        ([math.log(2), 0.0, 0.0], 1.039721),  # p = 0.5, 0.25, 0.25
        ([-1000.0, -1000.0], 0.693147),
        ([7.0], 0.0),
    ],
)
def test_entropy_is_minus_sum_p_ln_p(logits: list[float], nats: float) -> None:
    assert entropy(torch.tensor([logits])).item() == pytest.approx(nats, abs=1e-6)


@pytest.mark.parametrize("logits", [[200.0, -200.0], [0.0, -1e4, -1e4], [1e30, -1e30]])
def test_entropy_of_an_underflowing_probability_is_zero_where_the_original_has_nan(
    logits: list[float],
) -> None:
    row = torch.tensor([logits])
    p = torch.softmax(row, dim=-1)

    assert torch.isnan(-(p * torch.log(p)).sum())  # the original's form
    assert entropy(row).tolist() == [0.0]
    assert fired(EntropyThreshold(0.01), *entropy(row).tolist()) == [True]


def test_entropy_is_float32_whatever_the_logits_are() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        result = entropy(rows.to(dtype))
        assert result.dtype == torch.float32
        assert result.tolist() == entropy(rows).tolist()


def test_fires_strictly_below_the_threshold() -> None:
    assert fired(EntropyThreshold(0.5), 0.0, 0.49999, 0.5, 0.50001) == [True, True, False, False]


@pytest.mark.parametrize("threshold", [None, -1.0, -1e-9, 0.0, 0])
def test_none_negative_and_zero_never_fire(threshold: float | None) -> None:
    policy = EntropyThreshold(threshold)

    assert not any(policy.can_fire(layer) for layer in range(1, 12))
    assert fired(policy, -0.0, 0.0, 1e-9, 0.3) == [False] * 4


def test_full_depth_never_fires() -> None:
    assert not FULL_DEPTH.can_fire(1)
    assert fired(FULL_DEPTH, 0.0) == [False]


def test_each_layer_has_its_own_threshold() -> None:
    policy = EntropyThreshold((0.1, None, 0.3))

    assert [policy.can_fire(layer) for layer in (1, 2, 3)] == [True, False, True]
    assert fired(policy, 0.2, layer=1) == [False]
    assert fired(policy, 0.0, layer=2) == [False]
    assert fired(policy, 0.2, layer=3) == [True]


def test_a_layer_beyond_the_thresholds_never_fires() -> None:
    assert not EntropyThreshold((0.5,)).can_fire(2)


class TestLayer0:
    """The off-ramp on the embeddings."""

    def test_one_threshold_is_for_it_too(self) -> None:
        assert fired(EntropyThreshold(0.3), 0.2, 0.3, layer=0) == [True, False]
        assert not FULL_DEPTH.can_fire(0)

    def test_thresholds_for_each_layer_begin_with_layer_1(self) -> None:
        policy = EntropyThreshold((0.1, 0.2))

        assert [policy.at(layer) for layer in (0, 1, 2)] == [None, 0.1, 0.2]
        assert not policy.can_fire(0)
        assert fired(policy, 0.0, layer=0) == [False]

    @pytest.mark.parametrize("others", [None, 0.3, (0.1, 0.2)])
    def test_it_can_have_one_of_its_own(self, others: float | tuple[float, ...] | None) -> None:
        policy = EntropyThreshold(others, layer_0=0.05)

        assert fired(policy, 0.04, 0.05, layer=0) == [True, False]
        assert policy.at(1) == EntropyThreshold(others).at(1)
        assert not EntropyThreshold(others, layer_0=-1.0).can_fire(0)

    def test_json_forms_without_it_are_what_they_were(self) -> None:
        assert EntropyThreshold(0.2).to_dict() == {"type": "entropy", "thresholds": 0.2}
        assert EntropyThreshold((0.1,), layer_0=0.05).to_dict() == {
            "type": "entropy",
            "thresholds": [0.1],
            "layer_0": 0.05,
        }

    def test_it_is_checked_as_the_others(self) -> None:
        model: Any = {"problem": SINGLE_LABEL, "num_labels": 2, "num_layers": 2, "learns_to_exit": False}
        with pytest.raises(PolicyError, match=r"threshold 0\.7 is above ln\(2\) = 0\.6931"):
            EntropyThreshold((0.1,), layer_0=0.7).check(**model)
        with pytest.raises(PolicyError, match="nan is not a number"):
            EntropyThreshold(None, layer_0=math.nan)
        EntropyThreshold((0.1,), layer_0=0.05).check(**model)

    def test_certainties_for_each_layer_say_nothing_of_it(self) -> None:
        assert LearningToExit(0.5).can_fire(0)
        assert not LearningToExit((0.5, 0.5)).can_fire(0)
        assert LearningToExit((0.5, 0.5), layer_0=0.9).can_fire(0)


@pytest.mark.parametrize(
    "policy",
    [
        EntropyThreshold(0.2),
        EntropyThreshold(None),
        EntropyThreshold((0.1, None, 0.3)),
        EntropyThreshold(()),
        EntropyThreshold((0.1, None), layer_0=0.05),
        LearningToExit(0.9),
        LearningToExit((0.9, None)),
        LearningToExit((0.9, None), layer_0=0.95),
    ],
)
def test_json_form_round_trips(policy: EntropyThreshold | LearningToExit) -> None:
    assert policy_from_dict(policy.to_dict()) == policy


def test_json_form_is_literal() -> None:
    assert EntropyThreshold((0.1, None)).to_dict() == {"type": "entropy", "thresholds": [0.1, None]}
    assert LearningToExit(0.9).to_dict() == {"type": "learning-to-exit", "thresholds": 0.9}


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(
        PolicyError, match="unknown exit policy 'patience': this version knows 'entropy' and 'l"
    ):
        policy_from_dict({"type": "patience"})


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ("0.2", "the exit policy '0.2' has no type and thresholds: store another one"),
        (0.2, "the exit policy 0.2 has no type and thresholds"),
        ({"type": ["x"]}, "unknown exit policy ['x']: this version knows"),
        (
            {"type": "entropy", "thresholds": "0.2"},
            "the entropy exit policy has a threshold '0.2', no number",
        ),
        ({"type": "entropy", "thresholds": [0.2, "x"]}, "has a threshold 'x', no number"),
        ({"type": "entropy", "thresholds": True}, "has a threshold True, no number"),
        ({"type": "entropy", "thresholds": {"1": 0.2}}, "has a threshold {'1': 0.2}, no number"),
        ({"type": "learning-to-exit", "thresholds": 0.9, "layer_0": "0.9"}, "a threshold '0.9', no number"),
    ],
)
def test_a_json_form_that_no_policy_has_is_refused(stored: object, says: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(says)):
        policy_from_dict(stored)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_thresholds_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(PolicyError, match="is not a number: give nats between 0 and ln"):
        EntropyThreshold(value)
    with pytest.raises(PolicyError, match="is not a number"):
        EntropyThreshold((0.1, value))


@pytest.mark.parametrize("threshold", [0.7, (0.1, 0.7)])
def test_a_threshold_above_the_largest_entropy_is_refused(threshold: float | tuple[float, ...]) -> None:
    with pytest.raises(PolicyError, match=r"threshold 0\.7 is above ln\(2\) = 0\.6931"):
        EntropyThreshold(threshold).check(**of_two_labels(3))


def test_what_is_advised_for_full_depth_is_full_depth_whatever_the_model_stores() -> None:
    with pytest.raises(PolicyError, match=r"give at most that, or -1 to run at full depth$"):
        EntropyThreshold(5.0).check(**of_two_labels(3))
    assert not any(EntropyThreshold(-1.0).can_fire(layer) for layer in (1, 2))


def test_thresholds_up_to_the_largest_entropy_are_accepted() -> None:
    EntropyThreshold(math.log(2)).check(**of_two_labels(12))
    EntropyThreshold((None, -1.0, 0.0, 0.69)).check(**of_two_labels(5))
    FULL_DEPTH.check(**of_two_labels(12))


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_thresholds_must_be_the_number_of_layers_that_can_exit(count: int) -> None:
    with pytest.raises(
        PolicyError, match=f"{count} entropy thresholds for 3 layers: .* 2 layers before the last"
    ):
        EntropyThreshold((0.1,) * count).check(**of_two_labels(3))


@pytest.mark.parametrize(("threshold", "problem"), [(0.7, MULTI_LABEL), ((0.1, 0.7), MULTI_LABEL)])
def test_labels_that_each_hold_or_not_have_at_most_ln_2(threshold: Any, problem: Any) -> None:
    with pytest.raises(PolicyError, match=r"threshold 0\.7 is above ln\(2\) = 0\.6931"):
        EntropyThreshold(threshold).check(**of_two_labels(3, problem=problem, num_labels=9))


def test_a_regression_has_no_entropy_to_compare() -> None:
    regression = of_two_labels(3, problem=REGRESSION, num_labels=1)

    with pytest.raises(
        PolicyError, match=r"means nothing to a regression, .*: train with --learn-to-exit and g"
    ):
        EntropyThreshold(0.1).check(**regression)
    FULL_DEPTH.check(**regression)
    EntropyThreshold(-1.0).check(**regression)
    assert fired(EntropyThreshold(0.1), math.nan) == [False]


class TestLearningToExit:
    def test_fires_strictly_above_the_threshold(self) -> None:
        assert certain(LearningToExit(0.75), 1.0, 0.7500001, 0.75, 0.2) == [True, True, False, False]

    @pytest.mark.parametrize("threshold", [None, 1.0, 1])
    def test_none_and_one_never_fire(self, threshold: float | None) -> None:
        policy = LearningToExit(threshold)

        assert not any(policy.can_fire(layer) for layer in range(1, 12))
        assert certain(policy, 1.0, 0.5) == [False, False]

    def test_each_layer_has_its_own_threshold(self) -> None:
        policy = LearningToExit((0.9, None, 0.0))

        assert [policy.can_fire(layer) for layer in (1, 2, 3, 4)] == [True, False, True, False]
        assert certain(policy, 0.8, layer=1) == [False]
        assert certain(policy, 1.0, layer=2) == [False]
        assert certain(policy, 0.8, layer=3) == [True]

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_what_is_no_certainty_is_refused(self, value: float) -> None:
        with pytest.raises(PolicyError, match="is no certainty: give a number between 0 and 1"):
            LearningToExit((0.5, value))

    def test_a_model_without_such_a_head_is_refused(self) -> None:
        with pytest.raises(PolicyError, match="which this model has not: train it with --learn-to-exit"):
            LearningToExit(0.9).check(**of_two_labels(3))
        LearningToExit(0.9).check(**of_two_labels(3, learns_to_exit=True))

    def test_the_number_of_thresholds_must_fit(self) -> None:
        with pytest.raises(PolicyError, match="3 certainty thresholds for 3 layers"):
            LearningToExit((0.9,) * 3).check(**of_two_labels(3, learns_to_exit=True))


@pytest.mark.parametrize("kind", [EntropyThreshold, LearningToExit])
def test_whole_numbers_are_the_same_thresholds_as_floats_also_as_text(kind: Any) -> None:
    for given, as_floats in (((0, None, 1), (0.0, None, 1.0)), (1, 1.0)):
        stored = json.dumps(kind(given, layer_0=0).to_dict())
        assert stored == json.dumps(kind(as_floats, layer_0=0.0).to_dict())
        assert stored == json.dumps(policy_from_dict(json.loads(stored)).to_dict())
