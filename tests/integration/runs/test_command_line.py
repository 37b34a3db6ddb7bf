"""`deebert classify` as a process of its own: what its terminal shows, what it listens on, what it leaves."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass
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
def command(saved_model: Path, tmp_path: Path) -> list[str]:
    return words_of(saved_model, tmp_path)


def words_of(model: Path, folder: Path) -> list[str]:
    """A command over 20 shards in ``in``, into ``out``."""
    write_parquet(folder / "in" / "a.parquet", sentences(400 * SHARDS), row_group_size=400)
    places = ("--model", str(model), "--input", str(folder / "in"), "--output", str(folder / "out"))
    settings = ("--shard-rows", "400", "--precision", "float32", "--replicas", "1")
    return [sys.executable, "-m", "jobs.classify", *places, *settings]


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


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A run without a terminal that ended well, and who listened while it was under way."""

    stdout: str
    stderr: str
    listening: list[tuple[str, str, int]]
    """Process, address and port."""
    parts: set[str]


@pytest.fixture(scope="module")
def watched(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    process = subprocess.Popen(
        words_of(saved_model, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
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
    stdout, rest = process.communicate(timeout=DEADLINE_SECONDS)
    stderr = "".join(lines) + rest
    assert process.returncode == 0, stderr
    parts = {path.name for path in (folder / "out").glob("part-*")}
    return Watched(stdout=stdout, stderr=stderr, listening=listening, parts=parts)


def test_without_a_terminal_every_shard_is_a_line(watched: Watched) -> None:
    lines = re.findall(
        r"INFO shard=(part-\S+\.parquet) source_file=\S+ first_row=(\d+) rows=400 ", watched.stderr
    )
    assert {part for part, _ in lines} == watched.parts
    assert sorted(int(row) for _, row in lines) == [400 * i for i in range(SHARDS)]
    assert watched.stdout == ""


def test_a_local_ray_listens_on_loopback_only_and_has_no_dashboard(watched: Watched) -> None:
    assert watched.listening, "nothing was seen to listen"
    assert [one for one in watched.listening if one[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []
    assert [one for one in watched.listening if one[2] == 8265] == []


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
