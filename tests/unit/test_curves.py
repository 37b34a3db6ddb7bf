"""An evaluation's figures and tables hold the numbers that they are of: read back from the marks, not looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from pipeline.report.curves import draw
from pipeline.report.evaluated import EvaluatedPoint, EvaluatedSet, Measured, state_evaluation
from pipeline.report.svg import EXECUTED, SAVED


def measured(saving: float, *, samples: int) -> Measured:
    """One of which a tenth more was expected than it saved."""
    return Measured(
        samples=samples, rounds=3, seconds=1 - saving, saving=saving, expected_saving=saving + 0.1
    )


def point(
    name: str, f1: float, accuracy: float, exits: tuple[int, ...], *, timed: bool = True
) -> EvaluatedPoint:
    """On samples that leave a model of 4 layers as `exits` says."""
    mean = sum(layer * count for layer, count in enumerate(exits)) / sum(exits)
    saving = 1 - mean / 4
    return EvaluatedPoint(
        name=name,
        scores=(f1, accuracy),
        mean_exit_layer=mean,
        speed_up=4 / mean,
        saving=saving,
        flop_saving=saving - 0.05,
        exit_histogram=exits,
        alone=measured(0.8 * saving, samples=20) if timed else None,
        engine=measured(0.6 * saving, samples=50) if timed else None,
    )


STATIC = EvaluatedPoint(
    name="static 2 (first)",
    scores=(0.7, 0.75),
    mean_exit_layer=2.0,
    speed_up=2.0,
    saving=0.5,
    flop_saving=0.25,
    exit_histogram=(),
)
FOUND = EvaluatedSet(
    name="",
    samples=1_000,
    metrics=("F1", "accuracy"),
    off_ramps=((1, (0.4, 0.5)), (2, (0.6, 0.65)), (4, (0.8, 0.9))),
    full=point("full depth", 0.8, 0.9, (0, 0, 0, 0, 10)),
    thresholds=(
        point("0.1", 0.78, 0.88, (0, 1, 3, 0, 6)),
        point("0.2", 0.76, 0.81, (0, 3, 3, 0, 4)),
        point("0.3", 0.6, 0.72, (0, 8, 1, 0, 1)),
    ),
    statics=(STATIC,),
    certainties=(point("0.9 sure", 0.77, 0.86, (0, 2, 0, 0, 8)),),
)
"""Of layer work the thresholds save 22.5, 37.5 and 65 %, the certainty 15 %."""


def panels(found: EvaluatedSet, stem: str) -> list[Axes]:
    (one,) = (picture for picture in draw(found) if picture.stem == stem)
    return one.figure.axes


def lines(axes: Axes) -> dict[str, list[Any]]:
    """The marks of each line, by its name."""
    return {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}


def names(axes: Axes) -> dict[str, Any]:
    """What each word stands at."""
    return {text.get_text(): text.xy for text in axes.texts}


def near(*marks: tuple[float, float]) -> list[Any]:
    return [pytest.approx(mark, abs=1e-9) for mark in marks]


class TestFigures:
    def test_quality_stands_over_the_share_that_is_saved(self) -> None:
        (axes,) = panels(FOUND, "quality_saving")

        assert lines(axes) == {
            "time, measured alone": near((0, 80), (18, 78), (30, 76), (52, 60)),
            "layer work, expected": near((0, 80), (22.5, 78), (37.5, 76), (65, 60)),
            "layer work, learned exits": near((0, 80), (15, 77)),
        }
        (diamonds,) = axes.collections
        assert diamonds.get_offsets().tolist() == near((50, 70))
        assert names(axes) == {
            "0.1": pytest.approx((22.5, 78)),
            "0.2": pytest.approx((37.5, 76)),
            "0.3": pytest.approx((65, 60)),
            "2 layers": pytest.approx((50, 70)),
        }

    def test_baselines_of_as_many_layers_are_told_apart(self) -> None:
        (first,) = FOUND.statics
        other = replace(first, name=f"{first.name} (every-other)", scores=(0.6,))

        (axes,) = panels(replace(FOUND, statics=(first, other)), "quality_saving")

        assert {"2 layers", "2 layers, every other"} <= names(axes).keys()

    def test_a_name_that_would_cover_the_one_before_is_left_out(self) -> None:
        # A sample that leaves saves three of four layers: 0, 3, 6, 9 and 30 %.
        falling = tuple(point(f"{n}", 0.7, 0.8, (0, n, 0, 0, 100 - n)) for n in (40, 12, 8, 4, 0))

        (axes,) = panels(replace(FOUND, thresholds=falling, certainties=(), statics=()), "quality_saving")

        assert names(axes) == {
            n: pytest.approx((x, 70), abs=1e-9) for n, x in (("0", 0), ("8", 6), ("40", 30))
        }

    def test_time_saved_stands_over_what_was_expected_of_the_samples_timed(self) -> None:
        (axes,) = panels(FOUND, "expected_measured")

        found = lines(axes)
        assert found["one sample at a time"] == near((10, 0), (28, 18), (40, 30), (62, 52))
        assert found["one sample at a time, learned exits"] == near((10, 0), (22, 12))
        assert found["through the engine"] == near((10, 0), (23.5, 13.5), (32.5, 22.5), (49, 39))
        assert found["through the engine, learned exits"] == near((10, 0), (19, 9))

    def test_lines_do_not_loop_back_where_savings_fall_as_thresholds_rise(self) -> None:
        # A sample that leaves saves three of four layers; certainties in their own order.
        learned = tuple(
            point(f"certainty {c}", score, 0.8, (0, n, 0, 0, 10 - n))
            for c, score, n in ((0.5, 0.6, 8), (0.7, 0.7, 4), (0.9, 0.75, 2))
        )
        both, alone = replace(FOUND, certainties=learned), replace(FOUND, thresholds=(), certainties=learned)
        curve = near((0, 80), (15, 75), (30, 70), (60, 60))

        assert lines(*panels(both, "quality_saving"))["layer work, learned exits"] == curve
        assert lines(*panels(alone, "quality_saving"))["layer work, expected"] == curve
        assert lines(*panels(alone, "quality_saving"))["time, measured alone"] == near(
            (0, 80), (12, 75), (24, 70), (48, 60)
        )
        of_time = near((10, 0), (22, 12), (34, 24), (58, 48))
        assert lines(*panels(both, "expected_measured"))["one sample at a time, learned exits"] == of_time
        assert lines(*panels(alone, "expected_measured"))["one sample at a time"] == of_time

    def test_exits_that_cost_time_do_not_stretch_the_axis_of_what_was_expected(self) -> None:
        costly = replace(FOUND.thresholds[0], engine=replace(measured(0.2, samples=50), saving=-2.5))

        (axes,) = panels(replace(FOUND, thresholds=(costly,), certainties=()), "expected_measured")

        diagonal, *_ = (line.get_xydata().tolist() for line in axes.get_lines())
        assert diagonal == near((10, 10), (30, 30))
        assert axes.get_xlim()[0] > 0

    def test_without_timings_there_is_no_figure_of_time(self) -> None:
        full = point("full depth", 0.8, 0.9, (0, 0, 0, 0, 10), timed=False)
        untimed = replace(FOUND, full=full, thresholds=(), certainties=())

        assert [picture.stem for picture in draw(untimed)] == ["quality_saving", "off_ramps", "exit_layers"]
        assert list(state_evaluation(untimed)) == ["off_ramps", "thresholds"]

    def test_each_off_ramp_has_its_score_and_full_depth_a_line(self) -> None:
        (axes,) = panels(FOUND, "off_ramps")

        found = lines(axes)
        assert found["off-ramp"] == near((1, 40), (2, 60), (4, 80))
        assert {y for _, y in found["full depth"]} == {80}
        assert names(axes) == {
            "40.0": pytest.approx((1, 40)),
            "60.0": pytest.approx((2, 60)),
            "80.0": pytest.approx((4, 80)),
            "2 layers": pytest.approx((2, 70)),
        }

    def test_bars_are_the_share_that_leaves_after_each_layer(self) -> None:
        axes = panels(FOUND, "exit_layers")

        assert [one.get_title() for one in axes] == [
            "0.1: 78.0 %, mean 3.10",
            "0.2: 76.0 %, mean 2.50",
            "0.3: 60.0 %, mean 1.40",
        ]
        bars: Any = axes[1].patches
        assert [(bar.get_center()[0], bar.get_height(), to_hex(bar.get_facecolor())) for bar in bars] == [
            (pytest.approx(layer), pytest.approx(share), colour)
            for layer, share, colour in (
                (1, 30, EXECUTED),
                (2, 30, EXECUTED),
                (3, 0, EXECUTED),
                (4, 40, SAVED),
            )
        ]
        (mean,) = lines(axes[1]).values()
        assert mean == near((2.5, 0.97))
        assert axes[0].get_ylim() == pytest.approx((0, 115 * 0.8))  # one scale: the highest bar is the last's

    @pytest.mark.parametrize(
        ("count", "shown"), [(4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (8, [0, 2, 5, 7]), (10, [0, 3, 6, 9])]
    )
    def test_of_many_thresholds_four_are_shown_from_the_first_to_the_last(
        self, count: int, shown: list[int]
    ) -> None:
        many = tuple(point(f"t{i}", 0.7, 0.8, (0, i, 0, 0, 20 - i)) for i in range(count))

        axes = panels(replace(FOUND, thresholds=many), "exit_layers")

        assert [one.get_title().split(":")[0] for one in axes] == [f"t{i}" for i in shown]


class TestTables:
    def test_a_threshold_has_its_scores_its_share_of_full_depths_and_what_it_saves(self) -> None:
        rows = {row[0]: row[1:] for row in state_evaluation(FOUND)["thresholds"].rows}

        assert list(rows) == ["full depth", "0.1", "0.2", "0.3", "0.9 sure", "static 2 (first)"]
        assert rows["0.2"] == ("76.00", "81.00", "95.00", "2.50", "1.60", "37.5", "32.5", "30.0", "22.5")
        assert rows["static 2 (first)"][-4:] == ("50.0", "25.0", "–", "–")

    def test_of_nothing_there_is_no_share(self) -> None:
        nothing = replace(FOUND, full=point("full depth", 0.0, 0.9, (0, 0, 0, 0, 10)))

        assert {row[3] for row in state_evaluation(nothing)["thresholds"].rows} == {"–"}

    def test_times_are_of_a_sample_alone_and_of_one_in_the_engine(self) -> None:
        table = state_evaluation(FOUND)["timings"]

        assert [row[0] for row in table.rows] == ["full depth", "0.1", "0.2", "0.3", "0.9 sure"]
        assert dict(zip(table.columns, table.rows[2], strict=True)) == {
            "threshold": "0.2",
            "expected saving, alone %": "40.0",
            "ms a sample, alone": "35.000",
            "time saved, alone %": "30.0",
            "expected saving, engine %": "32.5",
            "ms a sample, engine": "15.500",
            "time saved, engine %": "22.5",
        }
        assert (
            "Alone: 20 samples, one at a time, as in the paper. Engine: 50 samples handed over" in table.note
        )
        assert "The median of 3 rounds" in table.note
