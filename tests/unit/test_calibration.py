"""Choosing a threshold: the largest saving that keeps enough accuracy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deebert.calibration import choose_threshold
from deebert.evaluation import Trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, LearningToExit
from deebert.problem import REGRESSION, SINGLE_LABEL

NINE, MANY = math.log(9), math.log(99)
# Off-ramp 1 is right and sure (entropy 0.056) of two samples, right and less sure (0.325) of one, and wrong
# about the last (0.679); the final classifier is always right.
LITERAL = Trace(
    layers=(1, 2),
    logits=torch.tensor(
        [
            [[MANY, 0.0], [0.0, MANY], [NINE, 0.0], [math.log(1.4), 0.0]],
            [[MANY, 0.0], [0.0, MANY], [NINE, 0.0], [0.0, NINE]],
        ]
    ),
    lengths=np.array([3, 3, 3, 3]),
)
LABELS = torch.tensor([0, 1, 0, 1])


def chosen_threshold(keep_accuracy: float) -> float:
    policy = choose_threshold(LITERAL, LABELS, keep_accuracy=keep_accuracy).policy
    assert isinstance(policy, EntropyThreshold)
    assert isinstance(policy.thresholds, float)
    return policy.thresholds


def test_keeping_all_accuracy_spares_the_sample_that_leaves_wrongly() -> None:
    point = choose_threshold(LITERAL, LABELS, keep_accuracy=1.0)

    assert point.accuracy == 1.0
    assert point.exit_histogram == (0, 3, 1)
    assert 0.325 < chosen_threshold(1.0) < 0.679


def test_giving_up_accuracy_buys_saving() -> None:
    point = choose_threshold(LITERAL, LABELS, keep_accuracy=0.75)

    assert point.exit_histogram == (0, 4, 0)
    assert point.accuracy == 0.75


def test_just_above_what_can_be_kept_the_choice_falls_back() -> None:
    assert choose_threshold(LITERAL, LABELS, keep_accuracy=0.76).exit_histogram == (0, 3, 1)


def test_full_depth_where_no_exit_keeps_enough() -> None:
    hopeless = Trace(layers=(1, 2), logits=LITERAL.logits[[0, 1]].clone(), lengths=LITERAL.lengths)
    hopeless.logits[0] = -LITERAL.logits[1] * 10  # sure of the wrong answer

    point = choose_threshold(hopeless, LABELS, keep_accuracy=0.9)

    assert point.policy == FULL_DEPTH
    assert point.saving == 0.0


@pytest.mark.parametrize("num_labels", [2, 3, 4, 5, 7, 77])
def test_the_choice_is_always_a_policy_that_the_model_accepts(num_labels: int) -> None:
    logits = torch.zeros(2, 1, num_labels)
    logits[0, 0, 0] = 3e-3  # all but even: below ln(labels) by less than the grid's step
    point = choose_threshold(
        Trace(layers=(1, 2), logits=logits, lengths=np.array([1])), torch.tensor([0]), keep_accuracy=1.0
    )

    assert isinstance(point.policy, EntropyThreshold)
    point.policy.check(problem=SINGLE_LABEL, num_labels=num_labels, num_layers=2, learns_to_exit=False)


def test_a_regression_is_calibrated_by_certainty() -> None:
    # Off-ramp 1 is right where it is certain and a whole point off where it is not.
    trace = Trace(
        layers=(1, 2),
        logits=torch.tensor([[[1.0], [2.0], [4.0]], [[1.0], [2.0], [3.0]]]),
        lengths=np.array([3, 3, 3]),
        problem=REGRESSION,
        certainties=torch.tensor([[0.9, 0.8, 0.4], [0.9, 0.9, 0.9]]),
    )

    point = choose_threshold(trace, torch.tensor([1.0, 2.0, 3.0]), keep_accuracy=0.99)

    assert isinstance(point.policy, LearningToExit)
    assert isinstance(point.policy.thresholds, float)
    assert 0.4 <= point.policy.thresholds < 0.8
    assert point.exit_histogram == (0, 2, 1)
    assert point.accuracy == 1.0
