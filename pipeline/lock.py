"""One driver at a time on one output.

On a file system the lock is the kernel's (`flock`): it goes with its holder, however that ends, and is never
stale. An object store has nothing like it; there the holder rewrites an object every few seconds, and whoever
finds one that no longer changes takes it over. Two that do so in the same second both go on: commits replace
each other, so rows are still never doubled. Knows nothing of runs.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NoReturn

from pipeline.errors import UsageError
from pipeline.sink import LOCK, Output

log = logging.getLogger(__name__)

_BEAT_SECONDS = 5.0


@contextmanager
def locked(output: Output, *, beat_seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Hold the output while the block runs.

    Args:
        output: prepared.
        beat_seconds: on object stores, how often the holder says that it lives.

    Raises:
        UsageError: another driver holds it (names host, process and since when), or it cannot be opened.
    """
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
    with _flocked(output, holder) if output.is_local else _beating(output, holder, beat_seconds):
        yield


@contextmanager
def _flocked(output: Output, holder: dict[str, Any]) -> Iterator[None]:
    path = Path(output.path(LOCK))
    with _opened(path, output) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _refuse(output, path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"the file system of the output {output.url!r} has no locks ({error.strerror}): mount it with them "
                "(Lustre: -o flock, NFS: lockd), or choose another output"
            ) from error
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()
        # The file stays: were it removed, two drivers could hold locks on two files of the same name.
        yield


def _opened(path: Path, output: Output) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+")
    except OSError as error:
        raise UsageError(
            f"cannot open the lock {path} of the output {output.url!r} ({error.strerror}): let its owner make it "
            "writable, or choose another output"
        ) from error


@contextmanager
def _beating(output: Output, holder: dict[str, Any], beat_seconds: float) -> Iterator[None]:
    found = output.read(LOCK)
    if found is not None and _changes(lambda: output.read(LOCK), found, within_seconds=3 * beat_seconds):
        _refuse(output, found)
    ended, name = threading.Event(), uuid.uuid4().hex

    def beat() -> None:
        is_heard = True
        for number in itertools.count():
            try:
                output.write(LOCK, json.dumps({**holder, "beat": f"{name}-{number}"}).encode())
                is_heard = True
            except Exception as error:  # stores' drivers raise types of their own; the next beat may be heard
                if is_heard:
                    log.warning("cannot say that the output %r is taken, trying on: %s", output.url, error)
                is_heard = False
            if ended.wait(beat_seconds):
                return

    beating = threading.Thread(target=beat, name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        try:
            # Whoever took it over while we were not heard keeps it.
            if name.encode() in (output.read(LOCK) or b""):
                output.remove([LOCK])
        except Exception as error:  # it goes stale by itself, and what the run has done is done
            log.warning("the lock of the output %r could not be removed: %s", output.url, error)


def _changes(read: Callable[[], bytes | None], found: bytes, *, within_seconds: float) -> bool:
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        if (now := read()) != found:
            return now is not None
        time.sleep(within_seconds / 30)
    return False


def _refuse(output: Output, found: bytes) -> NoReturn:
    try:
        holder = json.loads(found)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has taken the lock and not yet said its name
        who = "a process that has just started"
    raise UsageError(
        f"the output {output.url!r} is being written by {who}: wait for it, or choose another output"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
