"""Runs that meet the end of something: the disk, the memory, our own promises."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ClassifyConfig, classify
from pipeline.errors import RunFailedError
from pipeline.replica import Replica, ReplicaSpec
from tests.faults.harness import DEADLINE_SECONDS, Run, assert_sound, read_answers, wait_until, write_corpus

ROWS = 8_000


@pytest.fixture
def run(saved_model: Path, tmp_path: Path) -> Iterator[Run]:
    write_corpus(tmp_path / "in", files=1, rows=ROWS)
    run = Run(saved_model, tmp_path / "in", tmp_path / "out")
    yield run
    run.kill_all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: less than the parts take."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(folder: Path, *options: str) -> None:
    command = ["mount", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(run: Run, small_disk: Path) -> None:
    run.output = small_disk / "out"
    process = run.start()
    _, said = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 1
    last = next((line for line in said.splitlines() if line.startswith("deebert classify: ")), said)
    assert "No space left on device; make room, the same command resumes" in last
    assert "Traceback" not in said
    assert 0 < len(run.parts) < ROWS / run.shard_rows
    assert_sound(run)
    assert not list((run.output / "_deebert" / "tmp").iterdir()), "what could not be written takes room"

    _mount(small_disk, "-o", "remount,size=64m")
    run.finish()
    assert len(read_answers(run).rows) == ROWS


def test_whoever_reads_the_folder_meanwhile_sees_whole_parts(run: Run) -> None:
    """DuckDB and pyarrow read again and again while the run commits."""
    process = run.start()
    wait_until(lambda: run.parts, process)
    seen = []
    while process.poll() is None:
        ((rows,),) = duckdb.sql(f"select count(*) from '{run.output}/part-*.parquet'").fetchall()
        seen.append(rows)
        assert_sound(run)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert seen == sorted(seen)
    assert all(rows % run.shard_rows == 0 for rows in seen)
    assert len(set(seen)) > 1, "the run was over before it could be watched"


def peak_memory_bytes(pid: int) -> int:
    """The most resident memory that a process ever had; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def test_a_replica_s_memory_does_not_grow_with_the_corpus(run: Run) -> None:
    """Documents from nothing to 50,000 characters: ten times the corpus, the same memory."""
    peaks = []
    for name, shards in (("small", 6), ("large", 60)):
        rng = np.random.default_rng(0)
        lengths = rng.permuted(np.geomspace(1, 10_000, 100).astype(int))
        texts = [("good " * n) for n in np.tile(lengths, shards)]
        source = run.source.parent / name
        source.mkdir()
        pq.write_table(pa.table({"text": texts}), source / "a.parquet", row_group_size=100)
        one = Run(run.model, source, run.source.parent / f"out-{name}", shard_rows=100, replicas=1)
        process = one.start()
        try:
            wait_until(one.replica_pids, process)
            (pid,) = one.replica_pids()
            peak = 0
            while process.poll() is None:
                peak = max(peak, peak_memory_bytes(pid))
            assert process.returncode == 0
        finally:
            one.kill_all()
        assert len(one.parts) == shards
        peaks.append(peak)
    small, large = peaks
    assert large < 1.1 * small


class Forgetful(Replica):
    """A replica whose engine believes that it was given one sample more."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self._lanes._exit_lane._in_flight += 1


def test_a_broken_promise_is_fatal_and_says_so(
    saved_model: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "in", files=1, rows=200)
    monkeypatch.setattr("pipeline.pool.Replica", Forgetful)
    config = ClassifyConfig(
        model=str(saved_model),
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        precision="float32",
    )
    with pytest.raises(
        RunFailedError, match=r"InvariantError: .* samples are in flight but .* wait or are under way"
    ):
        classify(config)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
