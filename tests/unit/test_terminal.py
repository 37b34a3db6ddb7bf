"""Native messages go aside, Python's own stay, and a failure names where the others are."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.terminal import showing

PROGRAM = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from jobs.terminal import native_messages_aside
print("before", file=sys.stderr)
try:
    with native_messages_aside():
        os.write(2, b"native\\n")
        print("to stdout")
        print("printed", file=sys.stderr)
        logging.info("logged")
        if "fail" in sys.argv: raise ValueError("no")
        if "die" in sys.argv: os._exit(1)
except ValueError:
    logging.info("caught")
os.write(2, b"after\\n")
"""


def run(folder: Path, *arguments: str) -> list[str]:
    """What the program says; its temporary files go to `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert done.returncode == int("die" in arguments)
    return done.stderr.splitlines()


def test_a_good_run_shows_its_own_words_only(tmp_path: Path) -> None:
    assert run(tmp_path) == ["before", "printed", "logged", "after"]
    assert not list(tmp_path.iterdir())


def test_a_failed_run_keeps_the_messages_and_says_where(tmp_path: Path) -> None:
    *said, where, caught, after = run(tmp_path, "fail")
    assert (said, caught, after) == (["before", "printed", "logged"], "caught", "after")
    file = Path(where.removeprefix("Ray's own messages are in "))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "native\nto stdout\n"


def test_a_process_that_is_ended_from_below_leaves_the_messages(tmp_path: Path) -> None:
    assert run(tmp_path, "die") == ["before", "printed", "logged"]
    (file,) = tmp_path.iterdir()
    assert file.read_text().startswith("native\n")


def test_tokens_done_are_logged_now_and_then_and_never_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    seconds = iter([0.0, 4.0, 8.0, 11.0, 13.0, 40.0])
    caplog.set_level(logging.INFO, "jobs.terminal")
    with showing("tracing", 5_000, "tokens", interval_seconds=5.0, clock=lambda: next(seconds)) as seen:
        for _ in range(5):
            seen(1_000)
    assert caplog.messages == [
        "tracing: 2,000 of 5,000 tokens, 250 tokens/s, 00:12 left",
        "tracing: 4,000 of 5,000 tokens, 308 tokens/s, 00:03 left",
    ]
