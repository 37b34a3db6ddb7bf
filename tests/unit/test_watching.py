"""What shows a run's progress waits for nobody: neither the run's end nor Ctrl-C. Ray stands aside here."""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from pipeline.records import Totals
from pipeline.watching import showing_progress

RUN: Any = SimpleNamespace(
    config=SimpleNamespace(output="out"), model=SimpleNamespace(num_layers=2), estimated_rows=10
)
BOARD: Any = SimpleNamespace(total=SimpleNamespace(remote=lambda: None))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.watching._POLL_SECONDS", 0.001)
    monkeypatch.setattr("pipeline.watching.Gauges", lambda **labels: SimpleNamespace(set=lambda sample: None))


@pytest.mark.parametrize("end", [nullcontext(), pytest.raises(KeyboardInterrupt)])
def test_a_board_that_cannot_be_reached_does_not_keep_the_run(
    monkeypatch: pytest.MonkeyPatch, end: AbstractContextManager[object]
) -> None:
    asked = threading.Event()

    def never(reference: object, timeout: float | None = None) -> None:
        assert timeout is not None, "this would wait for ever"
        asked.set()
        raise GetTimeoutError

    monkeypatch.setattr("pipeline.watching.ray", SimpleNamespace(get=never))
    with end, showing_progress(BOARD, RUN, Totals.zero(2)):
        assert asked.wait(10)
        if not isinstance(end, nullcontext):
            raise KeyboardInterrupt


def test_the_last_word_is_asked_for_when_nobody_else_asks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.progress")
    before, asking, asked = threading.active_count(), list[int](), threading.Event()

    def answer(reference: object, timeout: float | None = None) -> tuple[int, int]:
        asking.append(threading.active_count() - before)
        asked.set()
        return len(asking), 2 * len(asking)

    monkeypatch.setattr("pipeline.watching.ray", SimpleNamespace(get=answer))
    with showing_progress(BOARD, RUN, Totals.zero(2)):
        assert asked.wait(10)
    assert asking[-1] == 0
    assert caplog.messages[-1].startswith(f"{len(asking)} of ~10 rows")
