"""The product as a Ray job: submitted through the job API to a cluster that stands already."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.clusters import Head, wait_for
from tests.conftest import REPOSITORY

JOB_SECONDS = 300.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A head node of our own on loopback."""
    head = Head(cpus=2)
    yield head
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
                entrypoint=shlex.join(command), runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
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


def scraped(head: Head, output: Path) -> dict[str, float]:
    """What Prometheus would read of a run: a metric's name, without what all have in common -> its value."""
    lines = requests.get(head.metrics_address, timeout=10).text.splitlines()
    series = [line.partition("ray_deebert_")[2] for line in lines if f'output="{output}"' in line]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in series}


def test_a_submitted_job_classifies_and_its_rerun_does_only_what_is_new(
    cluster: Head, saved_model: Path, tmp_path: Path
) -> None:
    corpus = Corpus(tmp_path, saved_model)
    first = corpus.add("monday", 120)

    status, log = run_job(cluster.jobs_address, corpus)
    assert status == JobStatus.SUCCEEDED, log
    assert corpus.answered() == sorted(first)
    assert corpus.record()["attempts"][-1]["committed_shards"] == 3
    assert (corpus.output / "_SUCCESS").exists()
    exits = Counter(pq.read_table(corpus.output, columns=["exit_layer"])["exit_layer"].to_pylist())
    mean = sum(layer * rows for layer, rows in exits.items()) / 120
    wait_for(lambda: "saving" in scraped(cluster, corpus.output), JOB_SECONDS, "no metrics are exported")
    assert scraped(cluster, corpus.output) == {
        "rows": 120.0,
        "rows_planned": 120.0,
        "mean_exit_layer": pytest.approx(mean),
        "saving": pytest.approx(1 - mean / corpus.record()["model"]["num_layers"]),
    }
    before = {path: path.stat().st_mtime_ns for path in corpus.output.glob("part-*")}

    second = corpus.add("tuesday", 70)
    status, log = run_job(cluster.jobs_address, corpus)
    assert status == JobStatus.SUCCEEDED, log
    assert corpus.answered() == sorted(first + second)
    record = corpus.record()
    assert [attempt["committed_shards"] for attempt in record["attempts"]] == [3, 2]
    assert (record["planned_shards"], record["totals"]["rows"]) == (5, 190)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    corpus.config.write_text(corpus.config.read_text() + "text-column: body\n")
    status, log = run_job(cluster.jobs_address, corpus)
    assert status == JobStatus.FAILED
    assert "has no column 'body'; its columns are: id, text" in log
    assert "Traceback" not in log
    assert corpus.answered() == sorted(first + second)
