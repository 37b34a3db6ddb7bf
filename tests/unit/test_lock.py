"""One driver at a time; a dead one's lock is no lock."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import OutputError, UsageError
from pipeline.lock import locked
from pipeline.sink import LOCK, Output

BEAT_SECONDS = 0.05

HOLDER = """
import sys, threading
from pipeline.lock import locked
from pipeline.sink import Output
with locked(Output(sys.argv[1])):
    print("held", flush=True)
    threading.Event().wait()
"""


@pytest.fixture(params=["file", "object store"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out") if request.param == "file" else f"memory://{uuid.uuid4()}")


def test_a_second_holder_is_refused_by_name(output: Output) -> None:
    named = rf"is being written by process {os.getpid()} on .*, since 20.*: wait for it"
    with locked(output, beat_seconds=BEAT_SECONDS):
        while output.read(LOCK) is None:
            assert threading.active_count() > 1
        with pytest.raises(UsageError, match=named), locked(output, beat_seconds=BEAT_SECONDS):
            pass


def test_a_released_lock_is_free(output: Output) -> None:
    for _ in range(2):
        with locked(output, beat_seconds=BEAT_SECONDS):
            pass


def test_an_error_releases_it(output: Output) -> None:
    with pytest.raises(RuntimeError), locked(output, beat_seconds=BEAT_SECONDS):
        raise RuntimeError
    with locked(output, beat_seconds=BEAT_SECONDS):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} "), locked(Output(str(tmp_path))):
            pass
        os.kill(holder.pid, signal.SIGKILL)
    with locked(Output(str(tmp_path))):
        pass


def test_a_holder_that_has_not_said_its_name_yet_holds_it(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.write(LOCK, b"")
    with Path(output.path(LOCK)).open("a+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with (
            pytest.raises(UsageError, match="is being written by a process that has just started: wait"),
            locked(output),
        ):
            pass


OTHER = b'{"host": "other", "pid": 1, "since": "2020-01-01", "beat": "a"}'


def test_an_object_that_no_longer_beats_is_taken_over() -> None:
    output = Output(f"memory://{uuid.uuid4()}")
    output.write(LOCK, OTHER)
    with locked(output, beat_seconds=BEAT_SECONDS):
        pass
    assert output.read(LOCK) is None


def test_an_object_that_goes_while_its_beat_is_awaited_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(f"memory://{uuid.uuid4()}")
    output.write(LOCK, OTHER)
    read = Output.read

    def release_after(self: Output, name: str) -> bytes | None:
        found = read(self, name)
        if found == OTHER:
            self.remove([LOCK])
        return found

    monkeypatch.setattr(Output, "read", release_after)
    with locked(output, beat_seconds=BEAT_SECONDS):
        wait_for(lambda: output.read(LOCK) not in (None, OTHER))


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(UsageError, match=r"has no locks \(Function not implemented\): mount it with them"),
        locked(Output(str(tmp_path))),
    ):
        pass


def test_a_lock_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir(parents=True)
    said = r"cannot open the lock .* of the output .* \(Is a directory\): let its owner make it writable"
    with pytest.raises(UsageError, match=said), locked(Output(str(tmp_path))):
        pass


def test_a_lock_that_cannot_be_removed_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = Output(f"memory://{uuid.uuid4()}")

    def remove(self: Output, names: list[str]) -> None:
        raise ConnectionError("no network")

    with locked(output, beat_seconds=BEAT_SECONDS):
        wait_for(lambda: output.read(LOCK) is not None)
        monkeypatch.setattr(Output, "remove", remove)
    assert caplog.messages == [f"the lock of the output {output.url!r} could not be removed: no network"]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the next writes of a lock raise, first to last, each once."""
    to_raise: list[Exception] = []
    write = Output.write

    def flaky(self: Output, name: str, data: bytes) -> None:
        if name == LOCK and to_raise:
            raise to_raise.pop(0)
        write(self, name, data)

    monkeypatch.setattr(Output, "write", flaky)
    return to_raise


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(BEAT_SECONDS / 10)


def wait_for_a_beat(output: Output) -> None:
    before = output.read(LOCK)
    wait_for(lambda: output.read(LOCK) != before)


def test_the_heart_beats_on_after_puts_that_failed(
    fails: list[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    output = Output(f"memory://{uuid.uuid4()}")

    def all_raised() -> bool:
        return not fails

    with locked(output, beat_seconds=BEAT_SECONDS):
        for streak in range(2):
            fails.extend(
                [OutputError("a PUT timed out"), RuntimeError("a driver's own"), OutputError("again")]
            )
            wait_for(all_raised)
            wait_for_a_beat(output)
            assert [r.levelname for r in caplog.records] == ["WARNING"] * (streak + 1), "one for each streak"
        with (
            pytest.raises(UsageError, match="is being written by"),
            locked(output, beat_seconds=BEAT_SECONDS),
        ):
            pass
    assert output.read(LOCK) is None
    said = f"cannot say that the output {output.url!r} is taken, trying on: a PUT timed out"
    assert caplog.messages == [said] * 2


def test_a_lock_that_another_has_taken_over_is_left_to_it(fails: list[Exception]) -> None:
    output = Output(f"memory://{uuid.uuid4()}")
    with locked(output, beat_seconds=BEAT_SECONDS):
        wait_for(lambda: output.read(LOCK) is not None)
        fails += [OutputError("no network")] * 10_000
        wait_for(lambda: len(fails) < 10_000)
        fsspec.filesystem("memory").pipe_file(output.path(LOCK).removeprefix("memory:/"), OTHER)
    assert output.read(LOCK) == OTHER


def test_setting_an_output_aside_keeps_the_lock(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    with locked(output):
        output.write("_deebert/run.json", b"{}")
        output.set_aside()
        assert not (tmp_path / "_deebert" / "run.json").exists()
        with pytest.raises(UsageError, match="is being written by"), locked(output):
            pass
