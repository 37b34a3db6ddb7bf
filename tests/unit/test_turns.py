"""Many together or one alone, and nobody starves."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import pytest

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


def inside(
    place: AbstractContextManager[None], entered: threading.Event, leave: threading.Event
) -> threading.Thread:
    """A thread that waits for `place`, says that it is there, and leaves it when told."""

    def run() -> None:
        with place:
            entered.set()
            leave.wait(PATIENCE_SECONDS)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["alone", "together"])
def test_who_is_alone_keeps_out_whoever_comes(kind: str) -> None:
    turns, leave = Turns(), threading.Event()
    first_is_in, other_is_in = threading.Event(), threading.Event()
    inside(turns.alone(), first_is_in, leave)
    assert first_is_in.wait(PATIENCE_SECONDS)

    other = turns.alone() if kind == "alone" else turns.together()
    inside(other, other_is_in, leave)

    assert not other_is_in.wait(0.1)
    leave.set()
    assert other_is_in.wait(PATIENCE_SECONDS)


def test_all_who_waited_go_on_when_who_was_alone_leaves() -> None:
    turns, first_may_leave, others_may_leave = Turns(), threading.Event(), threading.Event()
    first_is_in, others = threading.Event(), [threading.Event() for _ in range(3)]
    inside(turns.alone(), first_is_in, first_may_leave)
    assert first_is_in.wait(PATIENCE_SECONDS)
    for other_is_in in others:
        inside(turns.together(), other_is_in, others_may_leave)
    while len(turns._changed._waiters) < 3:  # type: ignore[attr-defined]
        assert not others_may_leave.wait(0.001)

    first_may_leave.set()

    # All three are in before any of them leaves.
    assert all(other_is_in.wait(PATIENCE_SECONDS) for other_is_in in others)
    others_may_leave.set()
