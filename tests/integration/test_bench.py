"""The benchmark's whole jobs on a real Ray: each reads every row and writes every row."""

from __future__ import annotations

from pathlib import Path

import pytest

from deebert.exit_policy import FULL_DEPTH
from jobs.benchmarks import ray_jobs
from jobs.benchmarks.settings import BenchSettings
from jobs.benchmarks.workload import prepare

SETTINGS = BenchSettings(
    device="cpu",
    precision="float32",
    threads=1,
    repetitions=1,
    batch_size=8,
    micro_batch_tokens=(256,),
    mean_exit_layers=(),
    policy=FULL_DEPTH,
    rivals=(),
    shards=(2,),
)


@pytest.mark.parametrize("job", ["classify", "ray data"])
def test_every_row_is_answered(job: str, tmp_path: Path) -> None:
    work = prepare("tiny", texts=None, lengths="short", samples=30, max_length=None, seed=0)
    corpus = ray_jobs.write_corpus(work.texts, tmp_path / "corpus.parquet")
    shared = {"corpus": corpus, "settings": SETTINGS, "max_length": work.max_length}
    run = (
        ray_jobs.ClassifyJob(
            model=ray_jobs.save_one_layer(work.checkpoint, tmp_path / "one-layer"),
            shard_rows=10,
            **shared,  # type: ignore[arg-type]
        )
        if job == "classify"
        else ray_jobs.RayDataJob(
            model=ray_jobs.save_plain(work.checkpoint, tmp_path / "plain"),
            replicas=1,
            threads=1,
            num_cpus=0.5,
            **shared,  # type: ignore[arg-type]
        )
    )

    assert run() == 30
