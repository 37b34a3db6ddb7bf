"""Keeps the terminal for what the user should read, and shows there how far long work is.

Ray's C++ side writes to descriptor 2, at every start, warnings about Ray Data's own actors that nobody can
act on, and Ray's driver prints to stdout what it hears of dying processes. While a command runs, both go to a
file, which is kept when the command fails, or dies without a word: Ray's C++ side ends the process itself when
it loses its node, and says why in that file alone.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)


def quiet_libraries() -> None:
    """No bars but our own; costs an import of transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def showing(
    what: str,
    total: int,
    unit: str,
    *,
    interval_seconds: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], object]]:
    """Yields what takes note of units as they are done: a bar on a terminal, a log line now and then elsewhere."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True, leave=False) as bar:
            yield bar.update
        return
    started = shown = clock()
    done = 0

    def seen(count: int) -> None:
        nonlocal done, shown
        done, now = done + count, clock()
        if done < total and now - shown >= interval_seconds:
            shown, rate = now, done / (now - started)
            left = tqdm.format_interval((total - done) / rate)
            log.info(
                "%s: %s of %s %s, %s %s/s, %s left",
                what,
                f"{done:,}",
                f"{total:,}",
                unit,
                f"{rate:,.0f}",
                unit,
                left,
            )

    yield seen


@contextmanager
def native_messages_aside() -> Iterator[None]:
    """While the block runs, descriptors 1 and 2 are a file; Python's stderr and logging keep the terminal.

    Nothing of ours is written to stdout meanwhile; Ray reports there that a process has died.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before, kept_output, kept_descriptor = sys.stderr, os.dup(1), os.dup(2)
    terminal = os.fdopen(kept_descriptor, "w", buffering=1, closefd=False)
    with tempfile.NamedTemporaryFile(prefix="deebert-messages-", suffix=".log", delete=False) as messages:
        os.dup2(messages.fileno(), 1)
        os.dup2(messages.fileno(), 2)
    path = Path(messages.name)
    is_kept = False
    _point_python_at(terminal, instead_of=before)
    try:
        yield
    except Exception:
        if is_kept := path.stat().st_size > 0:
            log.error("Ray's own messages are in %s", path)
        raise
    finally:
        sys.stdout.flush()
        os.dup2(kept_output, 1)
        os.dup2(kept_descriptor, 2)
        _point_python_at(before, instead_of=terminal)
        os.close(kept_output)
        os.close(kept_descriptor)
        if not is_kept:
            path.unlink()


def _point_python_at(stream: TextIO, *, instead_of: TextIO) -> None:
    sys.stderr = stream
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is instead_of:
            handler.setStream(stream)
