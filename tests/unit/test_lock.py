"""One driver at a time; a dead one's lock is no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from pipeline.errors import UsageError
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


def test_an_object_that_no_longer_beats_is_taken_over() -> None:
    output = Output(f"memory://{uuid.uuid4()}")
    output.write(LOCK, b'{"host": "gone", "pid": 1, "since": "2020-01-01", "beat": "a"}')
    with locked(output, beat_seconds=BEAT_SECONDS):
        pass
    assert output.read(LOCK) is None


def test_setting_an_output_aside_keeps_the_lock(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    with locked(output):
        output.write("_deebert/run.json", b"{}")
        output.set_aside()
        assert not (tmp_path / "_deebert" / "run.json").exists()
        with pytest.raises(UsageError, match="is being written by"), locked(output):
            pass
