"""Exit policies that the product does not have: what each of them means, on traces small enough to follow by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deebert.evaluation import Trace, score
from deebert.exit_policy import EntropyThreshold
from jobs.metrics import ACCURACY
from jobs.rival_policies import POLICIES, points

YES, NO = [2.0, 0.0], [0.0, 2.0]  # as sure as each other
SURE, UNSURE = [4.0, 0.0], [1.0, 0.0]


def traced(*samples: list[list[float]]) -> Trace:
    """One list for each sample: the logits of its off-ramps, the final classifier last."""
    logits = torch.tensor(samples).transpose(0, 1).contiguous()
    return Trace(
        layers=tuple(range(1, len(logits) + 1)),
        logits=logits,
        lengths=np.full(len(samples), 3, dtype=np.int32),
    )


def curve(name: str, trace: Trace, labels: Tensor) -> dict[float, float]:
    """Mean exit layer -> accuracy."""
    found = points(trace, labels, POLICIES[name], ACCURACY.compute)
    return {round(trace.num_layers / speed_up, 6): score for speed_up, score in found}


def test_each_goes_from_full_depth_to_ever_more_saving() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 300, 3, generator=generator)
    trace = Trace(layers=(1, 2, 3, 4, 5, 6), logits=logits, lengths=np.full(300, 3, dtype=np.int32))
    labels = torch.randint(0, 3, (300,), generator=generator)
    full = ACCURACY.compute(labels, logits[-1].argmax(-1))

    for name, doubt in POLICIES.items():
        found = points(trace, labels, doubt, ACCURACY.compute)
        speed_ups = [speed_up for speed_up, _ in found]
        assert found[0] == (1.0, full), name
        assert speed_ups == sorted(speed_ups), name
        assert speed_ups[-1] > 1.5, name


def test_entropy_is_the_products_own() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4, 50, 2, generator=generator)
    trace = Trace(layers=(1, 2, 3, 4), logits=logits, lengths=np.full(50, 3, dtype=np.int32))
    labels = torch.randint(0, 2, (50,), generator=generator)

    *found, last = points(trace, labels, POLICIES["entropy"], ACCURACY.compute)

    thresholds = trace.problem.entropy(logits[:-1]).unique().tolist()
    ours = [score(trace, labels, EntropyThreshold(t)) for t in thresholds]
    assert found == [pytest.approx((p.speed_up, p.score)) for p in ours]
    assert last[0] == 4.0  # everybody leaves at once


def test_patience_waits_for_so_many_in_a_row_that_say_the_same() -> None:
    trace = traced([NO, YES, YES, YES, NO], [NO, NO, YES, NO, NO])

    # Three in a row: the first sample leaves after layer 4. Two: after 3, and the second after 2. One: at once.
    assert curve("patience", trace, torch.tensor([0, 1])) == {5.0: 0.5, 4.5: 1.0, 2.5: 1.0, 1.0: 0.5}


def test_agreement_asks_for_a_sure_answer_that_the_off_ramp_before_gave_too() -> None:
    trace = traced([SURE, UNSURE, SURE, UNSURE], [SURE, NO, YES, SURE])

    # The second sample's off-ramps never agree, and nobody leaves at the first.
    assert curve("agreement", trace, torch.tensor([0, 0])) == {4.0: 1.0, 3.5: 1.0, 3.0: 1.0}


def test_a_rising_threshold_asks_twice_as_much_of_the_first_off_ramp_as_of_the_last() -> None:
    trace = traced([UNSURE, UNSURE, UNSURE, YES])
    doubts, answers = POLICIES["rising-entropy"](trace.logits)

    assert (doubts[0] / doubts[2]).item() == pytest.approx(2)
    assert (doubts[0] / doubts[1]).item() == pytest.approx(2**0.5)
    assert torch.equal(answers, trace.logits)


def test_confidence_is_the_largest_probability() -> None:
    trace = traced([[0.0, 0.0, 0.0], [0.0, 0.0, 20.0], [0.0, 0.0, 20.0]])

    assert POLICIES["confidence"](trace.logits)[0][:, 0].tolist() == pytest.approx([2 / 3, 0], abs=1e-6)


def test_the_mean_of_two_is_what_answers() -> None:
    trace = traced([SURE, [0.0, 1.0], [0.0, 0.5]])

    # After layer 2 alone the second label would answer; the final classifier does answer alone.
    doubts, answers = POLICIES["mean-of-two"](trace.logits)
    assert answers.argmax(-1)[:, 0].tolist() == [0, 0, 1]
    assert doubts[1, 0] > doubts[0, 0]
    assert curve("mean-of-two", trace, torch.tensor([0])) == {3.0: 0.0, 1.0: 1.0}
