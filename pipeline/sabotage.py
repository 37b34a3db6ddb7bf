"""Breaks a run on purpose where an environment variable says so: for fault tests, and nothing else.

    DEEBERT_TEST_POISON=TEXT           a row with this text kills its process, as a bug in native code would
    DEEBERT_TEST_HANG=TEXT             a row with this text is never done
    DEEBERT_TEST_KILL=POINT:N:FILE,…   whoever reaches POINT as the Nth of all processes kills itself there

FILE counts, so that a point kills once in all the attempts of a run. Knows nothing of what it breaks.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Literal, NoReturn, get_args

Point = Literal[
    "driver-planned",
    "driver-set-aside",
    "shard-read",
    "shard-classified",
    "file-written",
    "part-renamed",
    "shard-recorded",
    "run-finishing",
    "run-recorded",
]
"""Where a process can be killed, in the order of a run."""
POINTS: tuple[Point, ...] = get_args(Point)


def reach(point: Point) -> None:
    """Die here, if that is wished."""
    for wish in filter(None, os.environ.get("DEEBERT_TEST_KILL", "").split(",")):
        where, number, counter = wish.split(":", 2)
        if where == point and _count(counter) == int(number):
            die()


def taste(texts: Sequence[str]) -> None:
    """Die, or hang, of the texts that are wished to do that."""
    if os.environ.get("DEEBERT_TEST_POISON") in texts:
        die()
    if os.environ.get("DEEBERT_TEST_HANG") in texts:
        threading.Event().wait()


def die() -> NoReturn:
    """End this process as the kernel would, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError  # not reached


def _count(counter: str) -> int:
    """How many processes' visits the file has seen, this one included: appending is atomic."""
    descriptor = os.open(counter, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, b".")
        return os.lseek(descriptor, 0, os.SEEK_CUR)
    finally:
        os.close(descriptor)
