"""The product as a Ray job: submitted through the job API to a cluster that stands already."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
JOB_SECONDS = 180.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.2


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head node of our own on loopback; gives the address of its job API."""
    # Unix sockets have short paths, and pytest's folders are long.
    temp_dir = Path(tempfile.mkdtemp(prefix="dbj-", dir="/tmp"))
    port, dashboard_port, agent_port = free_ports(3)
    words = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={temp_dir}"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        *(f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats", "--num-gpus=0"),
        "--object-store-memory=200000000",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with (temp_dir / "start.log").open("w") as log:
        head = subprocess.Popen(
            words,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        wait_for(lambda: answers(head, address, temp_dir), START_SECONDS, "the head node does not answer")
        yield address
    finally:
        stop(head)
        shutil.rmtree(temp_dir, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(POLL_SECONDS)


def answers(head: subprocess.Popen[bytes], address: str, temp_dir: Path) -> bool:
    """Whether the job API is there."""
    assert head.poll() is None, (temp_dir / "start.log").read_text()
    try:
        return requests.get(f"{address}/api/jobs/", timeout=5).ok
    except requests.RequestException:
        return False


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head node and what it started: nothing else on this machine, as `ray stop` would."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, how)  # its session is its process group
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(STOP_SECONDS)


class Corpus:
    """Input files, the job's configuration and its output."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.input, self.output, self.config = folder / "in", folder / "out", folder / "job.yaml"
        self.input.mkdir()
        self.config.write_text(
            yaml.safe_dump(
                {
                    "model": str(model),
                    "input": [str(self.input)],
                    "output": str(self.output),
                    "id-column": "id",
                    "entropy-threshold": 0.6,
                    "precision": "float32",
                    "replicas": "1",
                    "threads": 1,
                    "shard-rows": 50,
                }
            )
        )

    def add(self, name: str, rows: int) -> list[str]:
        """Write an input file; its ids."""
        ids = [f"{name}-{i}" for i in range(rows)]
        texts = [f"the film is {('good', 'bad', 'dull')[i % 3]} number {i}" for i in range(rows)]
        pq.write_table(pa.table({"id": ids, "text": texts}), self.input / f"{name}.parquet")
        return ids

    def answered(self) -> list[str]:
        """The ids in the output, sorted."""
        return sorted(pq.read_table(self.output, columns=["row_id"])["row_id"].to_pylist())

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.output / "_deebert" / "run.json").read_text())
        return record


def run_job(address: str, corpus: Corpus) -> tuple[str, str]:
    """Submit and wait: the final status and the log."""
    client = JobSubmissionClient(address)
    job = client.submit_job(
        entrypoint=shlex.join([sys.executable, "-m", "jobs.classify", "--config", str(corpus.config)]),
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    wait_for(lambda: client.get_job_status(job).is_terminal(), JOB_SECONDS, "the job does not end")
    return client.get_job_status(job), client.get_job_logs(job)


def test_a_submitted_job_classifies_and_its_rerun_does_only_what_is_new(
    cluster: str, saved_model: Path, tmp_path: Path
) -> None:
    corpus = Corpus(tmp_path, saved_model)
    first = corpus.add("monday", 120)

    status, log = run_job(cluster, corpus)
    assert status == JobStatus.SUCCEEDED, log
    assert corpus.answered() == sorted(first)
    assert corpus.record()["attempts"][-1]["committed_shards"] == 3
    assert (corpus.output / "_SUCCESS").exists()
    before = {path: path.stat().st_mtime_ns for path in corpus.output.glob("part-*")}

    second = corpus.add("tuesday", 70)
    status, log = run_job(cluster, corpus)
    assert status == JobStatus.SUCCEEDED, log
    assert corpus.answered() == sorted(first + second)
    record = corpus.record()
    assert [attempt["committed_shards"] for attempt in record["attempts"]] == [3, 2]
    assert (record["planned_shards"], record["totals"]["rows"]) == (5, 190)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    corpus.config.write_text(corpus.config.read_text() + "text-column: body\n")
    status, log = run_job(cluster, corpus)
    assert status == JobStatus.FAILED
    assert "has no column 'body'; its columns are: id, text" in log
    assert "Traceback" not in log
    assert corpus.answered() == sorted(first + second)
