"""The whole jobs that `deebert bench` times: they run, answer every row, and their memory is seen."""

from __future__ import annotations

from pathlib import Path

from jobs.bench import BenchJob, _quick, _settings, _workload
from jobs.benchmarks import ray_jobs
from jobs.benchmarks.memory import PeakMemory
from jobs.benchmarks.ray_jobs import ClassifyJob, RayDataJob
from pipeline.config import Replicas

JOB = _quick(BenchJob(quick=True, samples=60, precision="float32", device="cpu"))


def test_classify_answers_every_row_and_its_memory_is_seen(tmp_path: Path) -> None:
    work = _workload(JOB)
    job = ClassifyJob(
        model=ray_jobs.save_one_layer(work.checkpoint, tmp_path / "model"),
        corpus=ray_jobs.write_corpus(work.texts, tmp_path / "corpus.parquet"),
        settings=_settings(JOB, work.checkpoint),
        max_length=work.max_length,
        replicas=Replicas(1, 1),
        shard_rows=20,
    )

    with PeakMemory() as peak:
        assert job() == 60

    assert peak.largest_replica > 100 * 2**20  # Python and torch alone
    assert peak.own > 100 * 2**20


def test_ray_data_answers_every_row(tmp_path: Path) -> None:
    work = _workload(JOB)
    job = RayDataJob(
        model=ray_jobs.save_plain(work.checkpoint, tmp_path / "plain"),
        corpus=ray_jobs.write_corpus(work.texts, tmp_path / "corpus.parquet"),
        settings=_settings(JOB, work.checkpoint),
        max_length=work.max_length,
        replicas=1,
        threads=1,
        num_cpus=1.0,
    )

    assert job() == 60
