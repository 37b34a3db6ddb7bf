"""Real kills of real runs: the driver, a replica. Afterwards every row is there once, as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import sentences, write_parquet

FILES, ROWS_PER_FILE, SHARD_ROWS = 3, 8_000, 400
PLANNED = FILES * ROWS_PER_FILE // SHARD_ROWS
DEADLINE_SECONDS = 180


@dataclass
class Run:
    """A command line and its output folder; kills what it started, at the latest when the test ends."""

    model: Path
    source: Path
    output: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.classify", "--model", self.model, "--input", self.source]
        command += ["--output", self.output, "--entropy-threshold", "0.7", "--precision", "float32"]
        command += ["--shard-rows", str(SHARD_ROWS), "--replicas", "2", "--threads", "1"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
        environment.pop("RAY_ADDRESS", None)
        # Its own process group, so that the Ray it starts can be found and ended with it.
        process = subprocess.Popen(
            list(map(str, command)),
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def finish(self) -> str:
        """Run to the end; returns what it said."""
        process = self.start()
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, said
        return said

    @property
    def parts(self) -> list[Path]:
        return sorted(self.output.glob("part-*.parquet"))

    def replica_pids(self) -> set[int]:
        """Processes that have committed a shard in the latest attempt."""
        logs = sorted((self.output / "_deebert" / "shards").glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
        lines = logs[-1].read_text().splitlines() if logs else []
        return {int(json.loads(line)["replica"].rsplit(":", 1)[1]) for line in lines if line.endswith("}")}


@pytest.fixture
def run(saved_model: Path, tmp_path: Path) -> Iterator[Run]:
    for i in range(FILES):
        texts = sentences(ROWS_PER_FILE, seed=i)
        write_parquet(tmp_path / "in" / f"{i}.parquet", texts, row_group_size=4_000)
    run = Run(saved_model, tmp_path / "in", tmp_path / "out")
    yield run
    for process in run.started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Poll until `condition` holds; fails when the run ends or the deadline passes before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, "the run ended before the kill: make it longer"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_every_row_once(run: Run) -> pa.Table:
    table = pyarrow.dataset.dataset(str(run.output)).to_table(columns=["source_file", "source_row"])
    counted = table.group_by(["source_file", "source_row"]).aggregate([([], "count_all")])
    assert table.num_rows == counted.num_rows == FILES * ROWS_PER_FILE
    for part in run.parts:
        rows = pq.read_table(part)["source_row"].to_pylist()
        assert rows == list(range(rows[0], rows[0] + len(rows)))
    assert not list((run.output / "_deebert" / "tmp").iterdir())
    return table


def test_a_killed_driver_resumes(run: Run) -> None:
    process = run.start()
    wait_until(lambda: len(run.parts) >= 5, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run.output / "_SUCCESS").exists()
    assert 5 <= len(run.parts) < PLANNED
    assert list(Path(tempfile.gettempdir()).glob(f"deebert-ray-{process.pid}-*")), "what a kill leaves behind"

    said = run.finish()

    assert f"{PLANNED} shards" in said
    assert not list(Path(tempfile.gettempdir()).glob(f"deebert-ray-{process.pid}-*"))
    assert (run.output / "_SUCCESS").exists()
    assert_every_row_once(run)
    record = json.loads((run.output / "_deebert" / "run.json").read_text())
    assert record["totals"]["rows"] == FILES * ROWS_PER_FILE
    assert [a["status"] for a in record["attempts"]] == ["failed", "succeeded"]
    assert 0 < record["attempts"][-1]["committed_shards"] < PLANNED

    again = run.finish()
    assert f"nothing to do: all {PLANNED} shards" in again


def test_a_killed_replica_is_replaced(run: Run) -> None:
    process = run.start()
    wait_until(run.replica_pids, process)
    os.kill(next(iter(run.replica_pids())), signal.SIGKILL)
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    assert_every_row_once(run)


def test_an_interrupted_driver_says_so_and_resumes(run: Run) -> None:
    process = run.start()
    wait_until(lambda: len(run.parts) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith("interrupted; the same command goes on where it stopped")
    assert "Traceback" not in said
    assert json.loads((run.output / "_deebert" / "run.json").read_text())["status"] == "interrupted"

    run.finish()
    assert_every_row_once(run)


def test_a_shard_that_kills_its_replica_is_quarantined_alone(run: Run, tmp_path: Path) -> None:
    """The shards that were in hand beside it are not blamed; once the cause is gone, the same command finishes."""
    texts = sentences(ROWS_PER_FILE, seed=1)
    texts[5_000] = "poison"
    write_parquet(tmp_path / "in" / "1.parquet", texts, row_group_size=4_000)

    process = run.start(DEEBERT_TEST_POISON="poison")
    _, said = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 1
    assert f"1 of {PLANNED} shards are not committed" in said
    assert "1.parquet': quarantined: its replica died in each of 2 attempts" in said.splitlines()[-1]
    assert len(run.parts) == PLANNED - 1
    assert not (run.output / "_SUCCESS").exists()

    run.finish()
    assert_every_row_once(run)


def test_a_second_driver_is_refused_while_the_first_lives(run: Run) -> None:
    first = run.start()
    wait_until(lambda: run.parts, first)

    first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second has looked
    second = run.start()
    _, said = second.communicate(timeout=DEADLINE_SECONDS)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert re.search(rf"is being written by process {first.pid} on \S+, since \S+: wait for it", said)

    _, said = first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == 0, said
    assert_every_row_once(run)
