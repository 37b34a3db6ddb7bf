"""`deebert classify` as a process of its own: what its terminal shows, what it listens on, what it leaves."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import sentences, write_parquet

DEADLINE_SECONDS = 300
SHARDS = 20
OURS = re.compile(
    r"(\d{4}-\d\d-\d\d [\d:,]+ INFO (\d+ files, \d+ shards: .*|\d+ rows in \d+ parts, 0 bad rows: .*))"
    r"|(starting|[\d,]+ of ~8,000 rows.*)"
)


@pytest.fixture
def command(saved_model: Path, tmp_path: Path) -> Iterator[list[str]]:
    write_parquet(tmp_path / "in" / "a.parquet", sentences(400 * SHARDS), row_group_size=400)
    words = [sys.executable, "-m", "jobs.classify", "--model", saved_model, "--input", tmp_path / "in"]
    words += [
        "--output",
        tmp_path / "out",
        "--shard-rows",
        "400",
        "--precision",
        "float32",
        "--replicas",
        "1",
    ]
    return [str(word) for word in words]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


@pytest.mark.parametrize("shard_rows", [400, 400 * SHARDS], ids=["many shards", "fewer than replicas"])
def test_a_terminal_shows_our_words_only(command: list[str], shard_rows: int) -> None:
    command = [*command, "--shard-rows", str(shard_rows), "--replicas", "2"]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env={**environment(), "COLUMNS": "150"}, start_new_session=True
    )
    os.close(theirs)
    shown = bytearray()
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # what Linux says when the other end has closed
        pass
    assert process.wait(DEADLINE_SECONDS) == 0, shown.decode()
    plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", shown.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]
    assert [line for line in lines if not OURS.search(line)] == []
    assert any("rows/s" in line and "saved, mean exit layer" in line for line in lines)


def test_without_a_terminal_every_shard_is_a_line(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    lines = re.findall(
        r"INFO shard=(part-\S+\.parquet) source_file=\S+ first_row=(\d+) rows=400 ", done.stderr
    )
    assert {part for part, _ in lines} == {path.name for path in (tmp_path / "out").glob("part-*")}
    assert sorted(int(row) for _, row in lines) == [400 * i for i in range(SHARDS)]
    assert done.stdout == ""


def test_a_local_ray_listens_on_loopback_only_and_has_no_dashboard(command: list[str]) -> None:
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "INFO shard=" in line:
            break
    listening = []
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            sockets = one.net_connections(kind="inet")
        except psutil.Error:
            continue
        listening += [
            (one.name(), s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN
        ]
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
    assert listening, "nothing was seen to listen"
    assert [one for one in listening if one[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []
    assert [one for one in listening if one[2] == 8265] == []


def test_a_failed_run_keeps_the_logs_of_its_replicas(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*command, "--hang-seconds", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), "DEEBERT_TEST_HANG": sentences(400 * SHARDS)[900]},
        check=True,
    )
    (folder,) = re.findall(r"the replicas' logs are in (\S+)", done.stderr)
    assert Path(folder).is_relative_to(tempfile.gettempdir())
    written = "".join(path.read_text() for path in Path(folder).iterdir())
    assert "the tokenization of a batch has taken more than 2 s" in written
    assert "pipeline/sabotage.py" in written, "the stacks of its threads"
