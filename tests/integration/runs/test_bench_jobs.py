"""The whole jobs that `deebert bench` times: they run, answer every row, and their memory is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.bench import BenchJob, _quick, _settings, _workload
from jobs.benchmarks import ray_jobs
from jobs.benchmarks.ray_jobs import ClassifyJob, RayDataJob
from jobs.benchmarks.scaling_suite import peak_memory
from jobs.benchmarks.workload import Workload
from pipeline.config import Replicas

JOB = _quick(BenchJob(quick=True, samples=60, precision="float32", device="cpu"))


@pytest.fixture(scope="module")
def work() -> Workload:
    return _workload(JOB)


@pytest.fixture
def shared(work: Workload, tmp_path: Path) -> dict[str, Any]:
    """What both jobs are told."""
    return {
        "corpus": ray_jobs.write_corpus(work.texts, tmp_path / "corpus.parquet"),
        "settings": _settings(JOB, work.checkpoint),
        "max_length": work.max_length,
    }


def test_classify_answers_every_row_and_its_memory_is_seen_from_outside(
    work: Workload, shared: dict[str, Any], tmp_path: Path
) -> None:
    model = ray_jobs.save_one_layer(work.checkpoint, tmp_path / "model")
    job = ClassifyJob(model=model, replicas=Replicas(1, 1), shard_rows=20, **shared)

    peak = peak_memory(config := job.config())

    assert pq.read_table(config.output).num_rows == 60
    assert peak.largest_replica > 100 * 2**20  # Python and torch alone
    assert peak.driver > 100 * 2**20


def test_ray_data_answers_every_row_beside_int8_in_what_transformers_computes_in(
    work: Workload, shared: dict[str, Any], tmp_path: Path
) -> None:
    model = ray_jobs.save_plain(work.checkpoint, tmp_path / "plain")
    shared["settings"] = replace(shared["settings"], precision="int8")
    job = RayDataJob(model=model, replicas=1, threads=1, num_cpus=1.0, **shared)

    assert job() == 60
