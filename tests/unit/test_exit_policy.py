"""Entropy and the exit rule, in literal numbers."""

from __future__ import annotations

import math

import pytest
import torch

from deebert.errors import PolicyError
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, entropy, policy_from_dict


def fired(policy: EntropyThreshold, *entropies: float, layer: int = 1) -> list[bool]:
    values = torch.tensor(entropies)
    return policy.fires(layer, torch.zeros(len(values), 2), values).tolist()


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
    assert EntropyThreshold(0.01).fires(1, row, entropy(row)).tolist() == [True]


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
        with pytest.raises(PolicyError, match=r"threshold 0\.7 is above ln\(2\) = 0\.6931"):
            EntropyThreshold((0.1,), layer_0=0.7).check(num_labels=2, num_layers=2)
        with pytest.raises(PolicyError, match="nan is not a number"):
            EntropyThreshold(None, layer_0=math.nan)
        EntropyThreshold((0.1,), layer_0=0.05).check(num_labels=2, num_layers=2)


@pytest.mark.parametrize(
    "policy",
    [
        EntropyThreshold(0.2),
        EntropyThreshold(None),
        EntropyThreshold((0.1, None, 0.3)),
        EntropyThreshold(()),
        EntropyThreshold((0.1, None), layer_0=0.05),
    ],
)
def test_json_form_round_trips(policy: EntropyThreshold) -> None:
    assert policy_from_dict(policy.to_dict()) == policy


def test_json_form_is_literal() -> None:
    assert EntropyThreshold((0.1, None)).to_dict() == {"type": "entropy", "thresholds": [0.1, None]}


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(PolicyError, match="unknown exit policy 'patience': this version knows 'entropy'"):
        policy_from_dict({"type": "patience"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_thresholds_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(PolicyError, match="is not a number: give nats between 0 and ln"):
        EntropyThreshold(value)
    with pytest.raises(PolicyError, match="is not a number"):
        EntropyThreshold((0.1, value))


@pytest.mark.parametrize("threshold", [0.7, (0.1, 0.7)])
def test_a_threshold_above_the_largest_entropy_is_refused(threshold: float | tuple[float, ...]) -> None:
    with pytest.raises(PolicyError, match=r"threshold 0\.7 is above ln\(2\) = 0\.6931"):
        EntropyThreshold(threshold).check(num_labels=2, num_layers=3)


def test_thresholds_up_to_the_largest_entropy_are_accepted() -> None:
    EntropyThreshold(math.log(2)).check(num_labels=2, num_layers=12)
    EntropyThreshold((None, -1.0, 0.0, 0.69)).check(num_labels=2, num_layers=5)
    FULL_DEPTH.check(num_labels=2, num_layers=12)


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_thresholds_must_be_the_number_of_layers_that_can_exit(count: int) -> None:
    with pytest.raises(
        PolicyError, match=f"{count} entropy thresholds for 3 layers: .* 2 layers before the last"
    ):
        EntropyThreshold((0.1,) * count).check(num_labels=2, num_layers=3)
