"""Ends a process that hangs, so that another can take over its work.

Everything that can block for ever (a read, a micro-batch, a commit) runs under `Watchdog.limit`. What takes
longer than allowed ends the process, with the stack of every thread on stderr. Code that holds the interpreter
lock while it hangs stops this watch too, but not `faulthandler`'s timer, a native thread that the watch must
keep winding up. Knows nothing of what it watches.
"""

from __future__ import annotations

import faulthandler
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_STDERR = 2


class Watchdog:
    """Watches this process's operations from a thread of its own."""

    def __init__(self, seconds: float) -> None:
        """Watch operations that may take `seconds` each."""
        self._seconds = seconds
        self._names = itertools.count()
        self._running: dict[int, tuple[float, str]] = {}
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def limit(self, what: str) -> Iterator[None]:
        """The block ends in time, or the process does. Any thread, any number at once."""
        name = next(self._names)
        self._running[name] = (time.monotonic(), what)
        try:
            yield
        finally:
            del self._running[name]

    def _watch(self) -> None:
        while True:
            # Later than this watch itself would notice: only a process that cannot run Python gets there.
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=_STDERR)
            now = time.monotonic()
            for started, what in list(self._running.values()):
                if now - started > self._seconds:
                    self._end(what)
            time.sleep(min(1.0, self._seconds / 10))

    def _end(self, what: str) -> None:
        log.error("%s has taken more than %g s: this process ends, another takes over", what, self._seconds)
        faulthandler.dump_traceback(all_threads=True, file=_STDERR)
        os._exit(1)
