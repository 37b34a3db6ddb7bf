"""The product as a Ray job: submitted through the job API to a cluster that stands already."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.clusters import Head, wait_for

ROOT = Path(__file__).resolve().parents[2]
JOB_SECONDS = 300.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head node of our own on loopback; gives the address of its job API."""
    head = Head(cpus=2)
    yield head.jobs_address
    head.stop()


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


def submit(client: JobSubmissionClient, command: list[str]) -> str:
    """Submit as soon as the cluster takes jobs: its agent starts after the address answers."""
    submitted: list[str] = []

    def is_taken() -> bool:
        try:
            job = client.submit_job(
                entrypoint=shlex.join(command), runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
            )
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            return False
        submitted.append(job)
        return True

    wait_for(is_taken, JOB_SECONDS, "the cluster takes no jobs")
    return submitted[0]


def run_job(address: str, corpus: Corpus) -> tuple[str, str]:
    """Submit and wait: the final status and the log."""
    client = JobSubmissionClient(address)
    job = submit(client, [sys.executable, "-m", "jobs.classify", "--config", str(corpus.config)])
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
