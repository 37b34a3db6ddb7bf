"""Native messages go aside, Python's own stay, and a failure names where the others are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        if sys.argv[1:]: raise ValueError("no")
except ValueError:
    logging.info("caught")
os.write(2, b"after\\n")
"""


def run(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_a_good_run_shows_its_own_words_only() -> None:
    assert run() == ["before", "printed", "logged", "after"]


def test_a_failed_run_keeps_the_messages_and_says_where() -> None:
    *said, where, caught, after = run("fail")
    assert (said, caught, after) == (["before", "printed", "logged"], "caught", "after")
    file = Path(where.removeprefix("Ray's own messages are in "))
    assert file.read_text() == "native\nto stdout\n"
    file.unlink()
