"""Half an hour of runs that are killed again and again: every row once, and memory that does not grow.

`python -m tests.faults.soak MINUTES` classifies a corpus with two replicas, kills the driver or a replica
every minute on average, starts the same command again, and begins with a new output when one is finished.
The last line is JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmarks.memory import replica_bytes
from tests.conftest import save_tiny_model
from tests.faults.harness import Run, assert_sound
from tests.integration.conftest import sentences

FILES, ROWS_PER_FILE, SHARD_ROWS = 4, 100_000, 1_000
MEAN_SECONDS_BETWEEN_KILLS = 60.0
POLL_SECONDS = 0.5
HANG_SECONDS = 600.0


@dataclass
class Soak:
    """What has happened so far."""

    started: float = field(default_factory=time.monotonic)
    kills: list[str] = field(default_factory=list)
    outputs: int = 0
    rows: int = 0
    next_kill: float = field(default_factory=time.monotonic)
    """Due across attempts: what was due while nothing could be killed is done as soon as something can."""
    replica_bytes: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and the largest replica's resident memory."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def attempt(run: Run, soak: Soak, rng: random.Random) -> int:
    """One start of the command, killed or not; its exit code."""
    process = run.start()
    give_up = time.monotonic() + HANG_SECONDS
    while not _ended(process):
        assert time.monotonic() < give_up, "hung"
        soak.replica_bytes += [
            (soak.seconds, size) for size in [max(replica_bytes(process.pid), default=0)] if size
        ]
        if time.monotonic() >= soak.next_kill and (victim := _victim(run, process.pid, rng)):
            name, pid = victim
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                soak.kills.append(name)
            soak.next_kill += rng.expovariate(1 / MEAN_SECONDS_BETWEEN_KILLS)
    run.kill_all()
    return int(process.returncode)


def _ended(process: subprocess.Popen[str]) -> bool:
    """Whether it ended within a moment; reads what it says meanwhile, or a full pipe would stop it."""
    try:
        process.communicate(timeout=POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _victim(run: Run, driver: int, rng: random.Random) -> tuple[str, int] | None:
    pids = run.replica_pids()
    if rng.random() < 0.5:
        return "driver", driver
    return ("replica", rng.choice(sorted(pids))) if pids else None


def check(run: Run) -> int:
    """All rows of the input, once, as readers see them; their number."""
    ((rows, distinct),) = duckdb.sql(
        f"select count(*), count(distinct (source_file, source_row)) from '{run.output}/part-*.parquet'"
    ).fetchall()
    assert rows == distinct == FILES * ROWS_PER_FILE
    assert not list((run.output / "_deebert" / "tmp").iterdir())
    return int(rows)


def soak(minutes: float, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run; returns what the last line says."""
    rng, state = random.Random(seed), Soak()
    model = save_tiny_model(folder / "model")
    source = folder / "in"
    source.mkdir()
    for i in range(FILES):
        pq.write_table(pa.table({"text": sentences(ROWS_PER_FILE, seed=i)}), source / f"{i}.parquet")
    while state.seconds < 60 * minutes:
        run = Run(model, source, folder / "out", shard_rows=SHARD_ROWS, replicas=2)
        while (code := attempt(run, state, rng)) != 0:
            assert code in (-signal.SIGKILL, 1), code
            assert_sound(run)
        state.rows += check(run)
        state.outputs += 1
        shutil.rmtree(run.output)
        print(f"{state.seconds:.0f} s: {state.outputs} outputs, {len(state.kills)} kills", file=sys.stderr)
    return summary(state)


def summary(state: Soak) -> dict[str, Any]:
    """Counts, and the memory of the first and the last third."""
    third = state.seconds / 3
    first = [size for when, size in state.replica_bytes if when < third]
    last = [size for when, size in state.replica_bytes if when > 2 * third]
    return {
        "minutes": round(state.seconds / 60, 1),
        "outputs": state.outputs,
        "rows_each_once": state.rows,
        "kills": {name: state.kills.count(name) for name in ("driver", "replica")},
        "seconds_between_kills": round(state.seconds / max(1, len(state.kills)), 1),
        "largest_replica_mib_first_third": round(max(first) / 2**20),
        "largest_replica_mib_last_third": round(max(last) / 2**20),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(soak(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0, Path(name))))
