"""The display says what it was told, at the pace it was told, without ever sleeping."""

from __future__ import annotations

import io
import logging

import pytest

from pipeline.progress import Progress, ProgressSample


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pipeline.progress")
    return caplog


def sample(rows_done: int, *, exit_layer_sum: int = 0, resumed_rows: int = 0) -> ProgressSample:
    return ProgressSample(
        rows_done=rows_done, exit_layer_sum=exit_layer_sum, num_layers=12, resumed_rows=resumed_rows
    )


def lines(clock: FakeClock, total_rows: int | None = 4000) -> Progress:
    return Progress(
        total_rows=total_rows, stream=io.StringIO(), is_terminal=False, interval_seconds=5.0, clock=clock
    )


def test_a_log_line_states_all_facts(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock)
    clock.seconds += 10
    progress.update(sample(1000, exit_layer_sum=6000))
    assert log.messages == [
        "1,000 of ~4,000 rows, 100 rows/s, 00:30 left, 50.0 % saved, mean exit layer 6.00/12"
    ]


def test_log_lines_keep_their_interval(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock)
    for second in range(1, 12):
        clock.seconds = 100.0 + second
        progress.update(sample(second * 10, exit_layer_sum=second * 60))
    assert [message.split()[0] for message in log.messages] == ["50", "100"]


def test_close_shows_the_last_sample_once(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock)
    clock.seconds += 1
    progress.update(sample(7, exit_layer_sum=7))
    assert log.messages == []
    progress.close()
    progress.close()
    assert len(log.messages) == 1
    assert log.messages[0].startswith("7 of ~4,000 rows")


def test_closing_before_the_first_sample_says_nothing(
    clock: FakeClock, log: pytest.LogCaptureFixture
) -> None:
    lines(clock).close()
    assert log.messages == []


def test_resumed_rows_count_as_done_but_not_as_speed(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock)
    clock.seconds += 10
    progress.update(sample(3000, exit_layer_sum=18_000, resumed_rows=2000))
    assert "3,000 of ~4,000 rows, 100 rows/s, 00:10 left" in log.messages[0]


def test_no_speed_before_the_first_new_row(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock)
    clock.seconds += 10
    progress.update(sample(2000, exit_layer_sum=12_000, resumed_rows=2000))
    assert "rows/s" not in log.messages[0]
    assert "left" not in log.messages[0]


def test_no_rows_no_mean(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock)
    clock.seconds += 10
    progress.update(sample(0))
    assert log.messages == ["0 of ~4,000 rows"]


def test_beyond_the_estimate_the_time_left_is_unknown(
    clock: FakeClock, log: pytest.LogCaptureFixture
) -> None:
    progress = lines(clock)
    clock.seconds += 10
    progress.update(sample(5000, exit_layer_sum=5000))
    assert "left" not in log.messages[0]


def test_without_a_total_the_count_stands_alone(clock: FakeClock, log: pytest.LogCaptureFixture) -> None:
    progress = lines(clock, total_rows=None)
    clock.seconds += 10
    progress.update(sample(5, exit_layer_sum=30))
    assert log.messages[0].startswith("5 rows, 0.5 rows/s, 50.0 % saved, mean exit layer 6.00/12")


@pytest.mark.parametrize("total_rows", [4000, None])
def test_a_terminal_gets_a_bar_and_no_log_line(
    clock: FakeClock, log: pytest.LogCaptureFixture, total_rows: int | None
) -> None:
    stream = io.StringIO()
    with Progress(
        total_rows=total_rows, stream=stream, is_terminal=True, interval_seconds=5.0, clock=clock
    ) as progress:
        clock.seconds += 10
        progress.update(sample(1000, exit_layer_sum=3000))
    shown = stream.getvalue()
    assert "1,000" in shown
    assert "100 rows/s" in shown
    assert "75.0 % saved" in shown
    assert ("25%" in shown) == (total_rows is not None)
    assert log.messages == []


def test_a_bar_survives_more_rows_than_estimated(clock: FakeClock) -> None:
    stream = io.StringIO()
    with Progress(total_rows=10, stream=stream, is_terminal=True, clock=clock) as progress:
        clock.seconds += 1
        progress.update(sample(25, exit_layer_sum=25))
    assert "100%" in stream.getvalue()
