"""Real runs of the command line that get killed, and what must hold whenever they stop and when they end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from pipeline.records import RunRecord
from pipeline.report import account
from pipeline.sabotage import POINTS
from tests.integration.conftest import sentences

THRESHOLD = 0.7
TIE = 1e-4
"""Nats from the threshold within which float32 sums in another order may decide otherwise."""
DEADLINE_SECONDS = 540


@dataclass
class Run:
    """A command line and its output folder."""

    model: Path
    source: Path
    output: Path
    threshold: float = THRESHOLD
    shard_rows: int = 400
    replicas: int = 1
    extra: Sequence[str] = ()
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "jobs.classify", "--model", self.model, "--input", self.source]
        command += ["--output", self.output, "--entropy-threshold", self.threshold, "--precision", "float32"]
        command += [
            "--shard-rows",
            self.shard_rows,
            "--replicas",
            self.replicas,
            "--threads",
            "1",
            *self.extra,
        ]
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

    def finish(self, **variables: str) -> str:
        """Run to the end; returns what it said."""
        process = self.start(**variables)
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, said
        return said

    def kill_all(self) -> None:
        """End whatever a run has left behind."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    @property
    def parts(self) -> list[Path]:
        return sorted(self.output.glob("part-*.parquet"))

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "_deebert" / "run.json").read_text())
        return found

    def dead_letters(self) -> list[dict[str, Any]]:
        files = sorted((self.output / "_deebert" / "dead_letters").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def replica_pids(self) -> set[int]:
        """Processes that have committed a shard in the latest attempt."""
        logs = sorted((self.output / "_deebert" / "shards").glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
        lines = logs[-1].read_text().splitlines() if logs else []
        return {int(json.loads(line)["replica"].rsplit(":", 1)[1]) for line in lines if line.endswith("}")}


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Poll until `condition` holds; fails when the run ends or the deadline passes before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, "the run ended before: make it longer"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write_corpus(folder: Path, *, files: int, rows: int, null_every: int = 0, seed: int = 0) -> None:
    """Parquet files of random sentences; every `null_every`-th text is null."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        texts: list[str | None] = [*sentences(rows, seed=seed + i)]
        if null_every:
            texts[::null_every] = [None] * len(texts[::null_every])
        pq.write_table(pa.table({"text": texts}), folder / f"{i}.parquet", row_group_size=4_000)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a finished output says, by input row."""

    rows: dict[tuple[str, int], tuple[int, int, float]]
    """(file, row) -> prediction, exit layer, entropy."""
    dead: frozenset[tuple[str, int]]


def read_answers(run: Run) -> Answers:
    """Every row of an output; fails when one is there twice or parts are out of order."""
    found: dict[tuple[str, int], tuple[int, int, float]] = {}
    for part in run.parts:
        table = pq.read_table(part)
        rows = table["source_row"].to_pylist()
        assert rows == sorted(set(rows)), f"{part.name} is out of order"
        columns = (table[name].to_pylist() for name in ("source_file", "prediction", "exit_layer", "entropy"))
        for row, file, prediction, layer, entropy in zip(rows, *columns, strict=True):
            key = (Path(file).name, row)
            assert key not in found, f"{key} is there twice"
            found[key] = (prediction, layer, entropy)
    letters = [(Path(letter["source_file"]).name, letter["source_row"]) for letter in run.dead_letters()]
    assert len(letters) == len(set(letters)), "a dead letter is there twice"
    return Answers(rows=found, dead=frozenset(letters))


def assert_same_answers(run: Run, expected: Answers) -> None:
    """All of the rows, once, and the answers of an undisturbed run, ties at the threshold aside."""
    found = read_answers(run)
    assert found.dead == expected.dead
    assert found.rows.keys() == expected.rows.keys()
    different = [key for key, answer in found.rows.items() if answer[:2] != expected.rows[key][:2]]
    ties = [key for key in different if abs(expected.rows[key][2] - run.threshold) < TIE]
    assert different == ties
    assert len(ties) <= len(found.rows) / 1000


def assert_complete(run: Run, expected: Answers) -> None:
    """What holds of an output whose run has succeeded."""
    assert_same_answers(run, expected)
    assert (run.output / "_SUCCESS").exists()
    assert not list((run.output / "_deebert" / "tmp").iterdir())
    assert not (run.output / "_deebert" / "aside").exists()
    record = run.record
    assert record["status"] == "succeeded"
    assert record["totals"]["rows"] == len(expected.rows)
    assert record["totals"]["bad_rows"] == len(expected.dead)
    table = pyarrow.dataset.dataset(str(run.output)).to_table(columns=["source_row"])
    assert table.num_rows == len(expected.rows)
    accounted = account(RunRecord.from_dict(record))
    assert accounted.layers[0].samples == len(expected.rows), "work that kills had done twice counts once"
    assert min(layer.saved_tokens for layer in accounted.layers) >= 0


def assert_sound(run: Run) -> None:
    """What holds whenever a run has stopped, however it did."""
    footers = [pq.read_metadata(part) for part in run.parts]  # every part that can be seen can be read
    assert len({footer.metadata[b"deebert.identity"] for footer in footers}) <= 1, "parts of two runs"
    for footer in footers:
        assert footer.num_rows == int(footer.metadata[b"deebert.rows"])
    if (run.output / "_SUCCESS").exists():
        record = run.record
        assert record["status"] == "succeeded"
        assert record["planned_shards"] == len(run.parts)


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill of a trial."""

    target: str
    """A point of `pipeline.sabotage`, or ``driver`` or ``replica`` at a moment."""
    number: int = 0
    """Which visit of the point."""
    delay_seconds: float = 0.0
    """From the first part of an attempt, for a kill at a moment."""

    def __str__(self) -> str:
        return f"{self.target}:{self.number}" if self.number else f"{self.target}@{self.delay_seconds:.1f}s"


_VISITS = {
    "driver-planned": 1,
    "driver-set-aside": 8,
    "shard-read": 40,
    "shard-classified": 40,
    "file-written": 40,
    "part-renamed": 40,
    "shard-recorded": 40,
    "run-finishing": 1,
    "run-recorded": 1,
}
"""The latest visit of a point at which a trial kills: every trial comes so far."""
assert tuple(_VISITS) == POINTS


def draw_kills(seed: int, count: int) -> list[Kill]:
    """Kills spread over points and moments, by a seed."""
    rng = random.Random(seed)
    targets = rng.sample([*POINTS, "driver", "driver", "replica", "replica"], count)
    return [
        Kill(target=t, number=rng.randint(1, _VISITS[t]))
        if t in _VISITS
        else Kill(target=t, delay_seconds=rng.uniform(0.0, 3.0))
        for t in targets
    ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended."""

    fired: tuple[str, ...]
    attempts: int
    seconds: float


def try_to_break(run: Run, kills: Sequence[Kill], folder: Path) -> Outcome:
    """Run the same command until it succeeds, killing on the way; checks soundness at every stop."""
    folder.mkdir()
    at_points = {kill: folder / kill.target for kill in kills if kill.number}
    wishes = ",".join(f"{kill.target}:{kill.number}:{file}" for kill, file in at_points.items())
    moments = [kill for kill in kills if not kill.number]
    fired: list[str] = []
    started = time.monotonic()
    for attempt in range(1, len(kills) + 2):
        process = run.start(DEEBERT_TEST_KILL=wishes)
        with _killing(run, process, moments, fired):
            _, said = process.communicate(timeout=DEADLINE_SECONDS)
        assert_sound(run)
        if process.returncode == 0:
            fired += [
                str(k) for k, file in at_points.items() if file.exists() and file.stat().st_size >= k.number
            ]
            return Outcome(fired=tuple(fired), attempts=attempt, seconds=time.monotonic() - started)
        assert process.returncode in (-signal.SIGKILL, 1), said
    raise AssertionError(f"not done after as many attempts as there were kills: {said}")


@contextmanager
def _killing(run: Run, process: Any, moments: list[Kill], fired: list[str]) -> Iterator[None]:
    """While the block runs, a thread kills at the next of `moments`."""
    before = len(run.parts)
    ended = threading.Event()

    def kill() -> None:
        while len(run.parts) == before:
            if ended.wait(0.02):
                return
        for moment in list(moments):
            if ended.wait(moment.delay_seconds):
                return
            pids = {process.pid} if moment.target == "driver" else run.replica_pids()
            if not pids:
                return
            with suppress(ProcessLookupError):
                os.kill(min(pids), signal.SIGKILL)
                moments.remove(moment)
                fired.append(str(moment))
            if moment.target == "driver":
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        ended.set()
        killer.join()
