"""Real kills of real runs: the driver, a replica. Afterwards every row is there once, as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from tests.faults.harness import DEADLINE_SECONDS, Run, wait_until
from tests.integration.conftest import sentences, write_parquet

FILES, ROWS_PER_FILE, SHARD_ROWS = 3, 8_000, 400
PLANNED = FILES * ROWS_PER_FILE // SHARD_ROWS


@pytest.fixture
def run(saved_model: Path, tmp_path: Path) -> Iterator[Run]:
    for i in range(FILES):
        texts = sentences(ROWS_PER_FILE, seed=i)
        write_parquet(tmp_path / "in" / f"{i}.parquet", texts, row_group_size=4_000)
    run = Run(saved_model, tmp_path / "in", tmp_path / "out", shard_rows=SHARD_ROWS)
    yield run
    run.kill_all()


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
    run.replicas = 2
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
