"""Many together or one alone, and nobody starves."""

from __future__ import annotations

import threading

from pipeline.turns import Turns

PATIENCE_SECONDS = 5.0


def test_together_is_together() -> None:
    turns, meeting = Turns(), threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def run() -> None:
        with turns.together():
            meeting.wait()  # passes only when both are inside

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not meeting.broken


def test_alone_waits_for_the_others_and_keeps_later_ones_out() -> None:
    turns, events = Turns(), list[str]()
    first_is_in, first_may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with turns.together():
            first_is_in.set()
            first_may_leave.wait(PATIENCE_SECONDS)
            events.append("first leaves")

    def suspect() -> None:
        with turns.alone():
            events.append("suspect")

    def later() -> None:
        with turns.together():
            events.append("later")

    threads = [threading.Thread(target=f) for f in (first, suspect, later)]
    threads[0].start()
    assert first_is_in.wait(PATIENCE_SECONDS)
    threads[1].start()
    while not turns._waiting_alone:
        assert threads[1].is_alive()
    threads[2].start()
    first_may_leave.set()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert events == ["first leaves", "suspect", "later"]


def test_the_place_is_given_back_after_an_error() -> None:
    turns = Turns()
    for place in (turns.alone, turns.together, turns.alone):
        try:
            with place():
                raise RuntimeError
        except RuntimeError:
            continue
    with turns.alone():
        pass
