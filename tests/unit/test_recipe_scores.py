"""What a recipe's model is said to have reached: thresholds chosen here and judged there, and medians of seeds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deebert.evaluation import LabelledSequences, Trace
from deebert.packing import PackedTokens
from jobs.recipe_scores import ModelScore, judge, tables

ODDS = {0.06: 99.0, 0.33: 9.0, 0.68: 1.4}
"""Odds of the likelier of two labels, by their entropy in nats, rounded up."""


def traced(entropies: list[float], answers: list[int]) -> tuple[Trace, LabelledSequences]:
    """Texts whose off-ramp, the first of two layers, says `answers` that sure; all are of label 0, as the end says."""
    early = torch.zeros(len(answers), 2)
    for row, (entropy, answer) in enumerate(zip(entropies, answers, strict=True)):
        early[row, answer] = math.log(ODDS[entropy])
    full = torch.tensor([[5.0, 0.0]]).expand(len(answers), 2)
    trace = Trace(layers=(1, 2), logits=torch.stack([early, full]), lengths=np.full(len(answers), 3))
    labels = torch.zeros(len(answers), dtype=torch.long)
    return trace, LabelledSequences(tokens=PackedTokens.pack([[2, 3]] * len(answers)), labels=labels)


def of_the_last(labels: Tensor, predictions: Tensor) -> float:
    """Not the accuracy, so that the metric asked for can be told from it."""
    return float(labels[-1] == predictions[-1])


JUDGED = traced([0.06, 0.06, 0.33, 0.68], [0, 0, 0, 1])
"""Rising thresholds let 2, 3 and 4 of 4 leave: speed-ups of 1.33, 1.6 and 2, the last with a wrong answer."""
HELD_OUT = traced([0.06, 0.33, 0.33, 0.68], [1, 1, 1, 1])
"""Rising thresholds let 1, 3 and 4 of 4 leave: speed-ups of 1.14, 1.6 and 2."""


class TestJudge:
    def test_thresholds_are_chosen_on_held_out_rows_and_judged_on_the_others(self) -> None:
        found = judge(JUDGED, HELD_OUT, (1.1, 1.3, 1.6, 2.0), of_the_last)

        assert found.chosen == {
            "1.1": (pytest.approx(4 / 3), 1.0),  # there a quarter leaves, here a half
            "1.3": (1.6, 1.0),  # here a lower threshold would do
            "1.6": (1.6, 1.0),  # reached to the digit is reached
            "2": (2.0, 0.0),
        }

    def test_what_no_threshold_reaches_is_the_largest_one(self) -> None:
        never = traced([0.06, 0.68, 0.68, 0.68], [0, 0, 0, 0])

        found = judge(JUDGED, never, (2.5,), of_the_last)

        assert found.chosen == {"2.5": (2.0, 0.0)}

    def test_the_curve_is_of_the_rows_to_judge_by_and_of_the_tasks_metric(self) -> None:
        found = judge(JUDGED, HELD_OUT, (), of_the_last)

        assert (found.full, found.off_ramps, found.chosen) == (1.0, (0.0, 1.0), {})
        assert list(dict.fromkeys(found.points)) == [
            (1.0, 1.0),
            (pytest.approx(4 / 3), 1.0),
            (1.6, 1.0),
            (2.0, 0.0),
        ]
        assert found.points == tuple(sorted(found.points))

    def test_its_json_form_is_the_same_score(self) -> None:
        found = judge(JUDGED, HELD_OUT, (1.1, 2.0), of_the_last)

        again = ModelScore.of(json.loads(json.dumps(found.to_dict())))

        assert again.at(1.8) == found.at(1.8) == pytest.approx(0.5)
        assert again.at(2.1) is None
        assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())


def scored(full: float, end: float, seconds: float) -> ModelScore:
    """A straight line from (1, `full`) to a speed-up of 3 at the score `end`."""
    return ModelScore(
        full=full,
        points=((1.0, full), (3.0, end)),
        chosen={"2": (1.5 + full, full - 0.05), "3": (2.5, end), "4": (3.0, end)},
        seconds=seconds,
        total_seconds=10 * seconds,
    )


SEEDS = [scored(0.9, 0.7, 11.0), scored(0.8, 0.6, 40.0), scored(0.98, 0.9, 12.0)]
STATIC = [
    ModelScore(full=full, depth_speed_up=2.0, seconds=5.0, total_seconds=6.0) for full in (0.81, 0.72, 0.9)
]


def cells(markdown: str, title: str) -> list[list[str]]:
    """The table below a title, head first."""
    lines = markdown.split(f"{title}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


class TestTables:
    def test_scores_are_medians_over_seeds_and_shares_of_the_bases_full_depth(self) -> None:
        made = tables({"two-stage": SEEDS, "static": STATIC}, (2.0, 3.0), "two-stage")

        assert cells(made, "Score at equal layer speed-up") == [
            ["variant", "full depth", "2×", "3×", "seconds", "with what it builds on"],
            ["two-stage", "90.00 (100.0)", "80.00 (88.9)", "70.00 (77.8)", "12", "120"],
            ["static", "–", "81.00 (90.0)", "–", "5", "6"],
        ]
        assert "the median of 3 seeds; in brackets, % of 90.00, the full depth of two-stage." in made

    def test_a_speed_up_that_one_seed_does_not_reach_has_no_score(self) -> None:
        short = replace(SEEDS[1], points=((1.0, 0.8), (2.0, 0.7)))

        made = tables({"two-stage": [SEEDS[0], short, SEEDS[2]]}, (2.0, 3.0), "two-stage")

        assert cells(made, "Score at equal layer speed-up")[1][2:4] == ["80.00 (88.9)", "–"]

    def test_thresholds_chosen_elsewhere_give_a_score_at_the_speed_up_that_comes_with_it(self) -> None:
        made = tables({"two-stage": SEEDS, "static": STATIC}, (2.0, 4.0), "two-stage")

        assert cells(made, "Thresholds chosen on held-out training rows") == [
            ["variant", "chosen for 2×", "chosen for 4×"],
            ["two-stage", "85.00 at 2.40×", "70.00 at 3.00×"],
        ]

    def test_one_seed_is_no_median(self) -> None:
        made = tables({"static": STATIC[:1], "other": STATIC[1:2]}, (2.0,), "static")

        assert "one seed; in brackets, % of 81.00, the full depth of static." in made
        assert "held-out" not in made
