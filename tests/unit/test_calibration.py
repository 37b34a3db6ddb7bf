"""Choosing a threshold: by the score to keep, by a bound on disagreement, by the saving to reach."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from deebert.calibration import (
    choose_by_disagreement,
    choose_by_drop,
    choose_by_speed_up,
    choose_threshold,
    disagreement,
    drop,
)
from deebert.errors import PolicyError
from deebert.evaluation import Trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, LearningToExit
from deebert.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL

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


@pytest.mark.parametrize("scored", [0.0, -0.3, math.nan])
def test_no_share_of_nothing_can_be_kept(scored: float) -> None:
    """As of F1 where no text was found to hold a label: the most aggressive threshold would keep it all."""

    def metric(labels: torch.Tensor, predictions: torch.Tensor) -> float:
        return scored

    with pytest.raises(
        PolicyError, match=r"^full depth scores 0 or less on these texts, of which no share can"
    ):
        choose_threshold(LITERAL, LABELS, keep_accuracy=0.99, metric=metric)


@pytest.mark.parametrize("num_labels", [2, 3, 4, 5, 7, 77])
def test_the_choice_is_always_a_policy_that_the_model_accepts(num_labels: int) -> None:
    logits = torch.zeros(2, 1, num_labels)
    logits[0, 0, 0] = 3e-3  # all but even: below ln(labels) by less than the grid's step
    point = choose_threshold(
        Trace(layers=(1, 2), logits=logits, lengths=np.array([1])), torch.tensor([0]), keep_accuracy=1.0
    )

    assert isinstance(point.policy, EntropyThreshold)
    point.policy.check(problem=SINGLE_LABEL, num_labels=num_labels, num_layers=2, learns_to_exit=False)


def test_a_metric_may_be_kept_instead_of_accuracy() -> None:
    def of_the_first(labels: torch.Tensor, predictions: torch.Tensor) -> float:
        return float(labels[0] == predictions[0])

    point = choose_threshold(LITERAL, LABELS, keep_accuracy=1.0, metric=of_the_first)

    assert (point.score, point.accuracy, point.exit_histogram) == (1.0, 0.75, (0, 4, 0))


def test_the_score_to_keep_is_a_share_of_full_depths_by_the_same_metric() -> None:
    # Accuracy is 1 at full depth; by this metric full depth reaches a half, and so does an exit of all.
    def half_of_the_first(labels: torch.Tensor, predictions: torch.Tensor) -> float:
        return 0.5 * float(labels[0] == predictions[0])

    point = choose_threshold(LITERAL, LABELS, keep_accuracy=1.0, metric=half_of_the_first)

    assert (point.score, point.exit_histogram) == (0.5, (0, 4, 0))


def test_of_many_labels_the_choice_is_a_policy_that_the_model_accepts() -> None:
    # Whatever the number of labels, each is yes or no: at most ln(2) nats.
    logits = torch.zeros(2, 1, 5)
    logits[0] = 3e-3  # all but even: below ln(2) by less than the grid's step
    trace = Trace(layers=(1, 2), logits=logits, lengths=np.array([1]), problem=MULTI_LABEL)

    point = choose_threshold(trace, torch.ones(1, 5), keep_accuracy=0.0)

    assert isinstance(point.policy, EntropyThreshold)
    assert point.exit_histogram == (0, 1, 0)
    point.policy.check(problem=MULTI_LABEL, num_labels=5, num_layers=2, learns_to_exit=False)


class TestBySpeedUp:
    def test_the_score_is_of_the_metric_asked_for(self) -> None:
        def never(labels: torch.Tensor, predictions: torch.Tensor) -> float:
            return 0.25

        point = choose_by_speed_up(LITERAL, LABELS, speed_up=1.6, metric=never)

        assert (point.score, point.exit_histogram) == (0.25, (0, 3, 1))

    def test_more_saving_is_not_taken_for_a_better_score(self) -> None:
        def errors(labels: torch.Tensor, predictions: torch.Tensor) -> float:
            return float((labels != predictions).float().mean())

        point = choose_by_speed_up(LITERAL, LABELS, speed_up=1.2, metric=errors)

        assert (point.score, point.exit_histogram) == (0.0, (0, 2, 2))

    def test_as_many_thresholds_are_tried_as_asked_for_up_to_the_largest_entropy(self) -> None:
        half, whole = (
            choose_by_speed_up(LITERAL, LABELS, speed_up=speed_up, steps=2).policy for speed_up in (1.2, 2.0)
        )

        assert half == EntropyThreshold(0.346573)  # ln(2) / 2
        assert whole == EntropyThreshold(0.693147)

    def test_the_least_saving_that_reaches_it(self) -> None:
        assert choose_by_speed_up(LITERAL, LABELS, speed_up=1.2).exit_histogram == (0, 2, 2)
        assert choose_by_speed_up(LITERAL, LABELS, speed_up=1.6).exit_histogram == (0, 3, 1)
        assert choose_by_speed_up(LITERAL, LABELS, speed_up=2.0).exit_histogram == (0, 4, 0)

    def test_what_no_threshold_reaches_is_refused_with_the_most(self) -> None:
        with pytest.raises(PolicyError, match=r"2.1 times as fast: the most is 2.00 times$"):
            choose_by_speed_up(LITERAL, LABELS, speed_up=2.1)


def drawn(texts: int, *, seed: int = 0) -> Trace:
    """Texts whose off-ramp errs the more the less sure it is; the final classifier always says 0."""
    rng = np.random.default_rng(seed)
    wrong = rng.uniform(
        0, 0.5, texts
    )  # the probability that it errs, and that it gives to what it does not say
    odds = np.log((1 - wrong) / wrong) * np.where(rng.uniform(size=texts) < wrong, -1, 1)
    early = np.stack([odds, np.zeros(texts)], axis=1)
    full = np.tile([9.0, 0.0], (texts, 1))
    logits = torch.from_numpy(np.stack([early, full])).float()
    return Trace(layers=(1, 2), logits=logits, lengths=np.full(texts, 3))


class TestByDisagreement:
    @pytest.mark.parametrize(("differing", "texts"), [(0, 299), (5, 100), (50, 100)])
    def test_the_bound_is_clopper_and_pearson_s(self, differing: int, texts: int) -> None:
        logits = torch.zeros(2, texts, 2)
        logits[:, :, 0] = 5.0
        logits[0, :differing] = torch.tensor([0.0, 5.0])
        trace = Trace(layers=(1, 2), logits=logits, lengths=np.full(texts, 3))

        found = disagreement(trace, EntropyThreshold(0.5), confidence=0.95)

        assert (found.texts, found.differing, found.share) == (texts, differing, differing / texts)
        both_sides = binomtest(differing, texts).proportion_ci(confidence_level=0.9, method="exact")
        assert found.bound == pytest.approx(both_sides.high, abs=1e-9)

    def test_of_many_labels_one_that_differs_is_another_answer(self) -> None:
        logits = torch.full((2, 100, 3), 5.0)
        logits[0, :7, 1] = -5.0
        trace = Trace(layers=(1, 2), logits=logits, lengths=np.full(100, 3), problem=MULTI_LABEL)

        found = disagreement(trace, EntropyThreshold(0.5), confidence=0.95)

        assert (found.texts, found.differing) == (100, 7)

    def test_all_different_is_no_bound(self) -> None:
        opposite = Trace(
            layers=(1, 2),
            logits=torch.stack([-LITERAL.logits[1] * 9, LITERAL.logits[1]]),
            lengths=LITERAL.lengths,
        )

        assert disagreement(opposite, EntropyThreshold(0.69), confidence=0.9).bound == 1.0

    def test_the_share_of_new_texts_is_below_as_often_as_it_says(self) -> None:
        most, everything = 0.1, drawn(100_000, seed=1)
        missed = []
        for seed in range(2, 62):
            policy = choose_by_disagreement(drawn(400, seed=seed), most=most, confidence=0.9)
            missed.append(disagreement(everything, policy, confidence=0.9).share > most)

        assert sum(missed) <= 10  # of 60, where 6 are allowed on average; 11 or more happen once in 60 times
        assert policy != FULL_DEPTH

    def test_more_texts_show_more(self) -> None:
        few, many = (
            choose_by_disagreement(drawn(texts), most=0.1, confidence=0.95).thresholds
            for texts in (200, 20_000)
        )

        assert isinstance(few, float)
        assert isinstance(many, float)
        assert few < many

    def test_what_comes_after_the_first_failure_is_not_tried(self) -> None:
        # The first to leave lose a tenth of the answers, those after them win as many back.
        entropy_of = {0.2: torch.tensor([3.0, 0.0]), 0.5: torch.tensor([1.4, 0.0])}
        logits = torch.zeros(2, 1_000, 2)
        logits[1, :, 0] = 5.0
        logits[0, :, 0] = 9.0
        logits[0, :100] = entropy_of[0.2].flip(0)
        labels = torch.zeros(1_000, dtype=torch.int64)
        labels[100:200] = 1
        logits[0, 100:200] = entropy_of[0.5].flip(0)
        trace = Trace(layers=(1, 2), logits=logits, lengths=np.full(1_000, 3))
        assert drop(trace, labels, EntropyThreshold(0.3), confidence=0.9).bound > 0.05
        assert drop(trace, labels, EntropyThreshold(0.6), confidence=0.9).bound < 0.05

        policy = choose_by_drop(trace, labels, most=0.05, confidence=0.9)

        assert isinstance(policy.thresholds, float)
        assert policy.thresholds < 0.3

    def test_shares_of_no_size_are_no_division_by_nothing(self) -> None:
        with pytest.raises(PolicyError, match="give at least"):
            choose_by_disagreement(drawn(10), most=1e-17, confidence=0.95)

    def test_too_few_texts_show_nothing(self) -> None:
        with pytest.raises(
            PolicyError, match=r"298 texts cannot show that less than 0.01 of all .* at least 299"
        ):
            choose_by_disagreement(drawn(298), most=0.01, confidence=0.95)
        assert choose_by_disagreement(drawn(299), most=0.01, confidence=0.95) is not None

    def test_numbers_never_agree(self) -> None:
        trace = Trace(
            layers=(1, 2),
            logits=torch.zeros(2, 500, 1),
            lengths=np.full(500, 3),
            problem=REGRESSION,
            certainties=torch.ones(2, 500),
        )

        with pytest.raises(PolicyError, match=r"answers are numbers, .*: calibrate by the score to keep"):
            choose_by_disagreement(trace, most=0.1, confidence=0.95)


def labelled(texts: int, *, seed: int = 0) -> tuple[Trace, torch.Tensor]:
    """`drawn`, and labels of which full depth (always 0) misses a tenth."""
    wrong = np.random.default_rng(seed + 1_000).uniform(size=texts) < 0.1
    return drawn(texts, seed=seed), torch.from_numpy(wrong.astype(np.int64))


class TestByDrop:
    def test_lost_and_won_are_bounded_each(self) -> None:
        # Of 200 texts full depth is right about 190; early exits lose 12 of them and win 4 others.
        logits = torch.zeros(2, 200, 2)
        logits[1, :, 0] = logits[0, :, 0] = 5.0
        labels = torch.zeros(200, dtype=torch.int64)
        labels[:10] = 1
        logits[0, [*range(4), *range(10, 22)]] = torch.tensor([0.0, 5.0])
        trace = Trace(layers=(1, 2), logits=logits, lengths=np.full(200, 3))

        found = drop(trace, labels, EntropyThreshold(0.5), confidence=0.9)

        assert (found.texts, found.lost, found.won, found.share) == (200, 12, 4, 0.04)
        lost, won = (binomtest(n, 200).proportion_ci(confidence_level=0.9, method="exact") for n in (12, 4))
        assert found.bound == pytest.approx(lost.high - won.low, abs=1e-9)

    def test_accuracy_of_new_texts_drops_by_less_as_often_as_it_says(self) -> None:
        most, (everything, labels) = 0.08, labelled(100_000, seed=1)
        missed, chosen = [], []
        for seed in range(2, 62):
            policy = choose_by_drop(*labelled(400, seed=seed), most=most, confidence=0.9)
            missed.append(drop(everything, labels, policy, confidence=0.9).share > most)
            chosen.append(policy)

        assert sum(missed) <= 10  # of 60, where 6 are allowed on average; 11 or more happen once in 60 times
        assert any(policy != FULL_DEPTH for policy in chosen)

    def test_right_answers_that_exits_win_let_more_leave(self) -> None:
        trace, labels = labelled(5_000)

        by_drop = choose_by_drop(trace, labels, most=0.05, confidence=0.95)
        by_disagreement = choose_by_disagreement(trace, most=0.05, confidence=0.95)

        assert isinstance(by_drop.thresholds, float)
        assert isinstance(by_disagreement.thresholds, float)
        assert by_drop.thresholds > by_disagreement.thresholds

    def test_too_few_texts_show_nothing(self) -> None:
        with pytest.raises(
            PolicyError,
            match=r"367 texts cannot show that accuracy drops by less than 0.01: give at least 368",
        ):
            choose_by_drop(*labelled(367), most=0.01, confidence=0.95)
        assert choose_by_drop(*labelled(368), most=0.01, confidence=0.95) is not None

    def test_it_is_of_one_label_a_text(self) -> None:
        trace = Trace(
            layers=(1, 2), logits=torch.zeros(2, 500, 2), lengths=np.full(500, 3), problem=MULTI_LABEL
        )

        with pytest.raises(
            PolicyError, match=r"models that choose one label: calibrate by the score to keep"
        ):
            choose_by_drop(trace, torch.zeros(500, 2), most=0.1, confidence=0.95)


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


def test_where_there_is_an_entropy_no_certainty_is_chosen() -> None:
    # By certainty the right one could leave alone; by entropy both are as unsure, and none may.
    trace = Trace(
        layers=(1, 2),
        logits=torch.tensor([[[0.01, 0.0], [0.0, 0.01]], [[MANY, 0.0], [MANY, 0.0]]]),
        lengths=np.array([3, 3]),
        certainties=torch.tensor([[0.9, 0.1], [0.9, 0.9]]),
    )

    point = choose_threshold(trace, torch.tensor([0, 0]), keep_accuracy=1.0)

    assert isinstance(point.policy, EntropyThreshold)
    assert point.exit_histogram == (0, 0, 2)


def test_the_last_certainty_that_is_tried_lets_everybody_leave() -> None:
    trace = Trace(
        layers=(1, 2),
        logits=torch.ones(2, 3, 1),
        lengths=np.array([3, 3, 3]),
        problem=REGRESSION,
        certainties=torch.full((2, 3), 1e-4),
    )

    point = choose_threshold(trace, torch.ones(3), keep_accuracy=1.0)

    assert point.policy == LearningToExit(0.0)
    assert point.exit_histogram == (0, 3, 0)
