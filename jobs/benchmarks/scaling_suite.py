"""How `classify` scales.

In time with replicas, where the work is the model's, and with shards, where it is everything else; in memory
with rows, where it should not.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from jobs.benchmarks import ray_jobs
from jobs.benchmarks.memory import PeakMemory
from jobs.benchmarks.pipeline_suite import rate_after_start
from jobs.benchmarks.ray_jobs import ClassifyJob
from jobs.benchmarks.settings import BenchSettings
from jobs.benchmarks.timing import take_turns
from jobs.benchmarks.workload import Workload
from pipeline.cluster import RaySession
from pipeline.config import ClassifyConfig, Replicas

_REPLICAS = (1, 2, 4)
_SHARDS_PER_REPLICA = 8
_DRIVER = "import pickle, sys; from pipeline.run import classify; classify(pickle.load(sys.stdin.buffer))"


def run(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Time every size; JSON-ready."""
    there_is = RaySession().resources()
    most = there_is.gpus if settings.device == "cuda" else there_is.cores
    counts = [n for n in _REPLICAS if n <= max(1, most)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_layer = ray_jobs.save_one_layer(workload.checkpoint, folder / "one-layer")
        return {
            "replicas": _replicas(workload, settings, folder, counts),
            "shards": _shards(workload, settings, folder, one_layer),
            "memory": _memory(workload, settings, folder, one_layer),
        }


def _replicas(
    workload: Workload, settings: BenchSettings, folder: Path, counts: Sequence[int]
) -> list[dict[str, Any]]:
    model = ray_jobs.save_whole(workload.checkpoint, folder / "model")
    corpus = ray_jobs.write_corpus(workload.texts, folder / "corpus.parquet")
    row = ray_jobs.write_corpus(workload.texts[:1], folder / "row.parquet")
    # The same shards for all, enough to keep the most replicas busy.
    shard_rows = max(1, len(workload.texts) // (_SHARDS_PER_REPLICA * counts[-1]))
    jobs = {
        f"{n} replicas, {corpus_.stem}": ClassifyJob(
            model=model,
            corpus=corpus_,
            settings=settings,
            max_length=workload.max_length,
            replicas=Replicas(n, n),
            # On CPUs one replica alone would have all cores.
            threads=None if settings.device == "cuda" else settings.threads_each,
            shard_rows=shard_rows,
        )
        for n in counts
        for corpus_ in (corpus, row)
    }
    timed = take_turns(jobs, repetitions=settings.repetitions, warm_up=settings.job_warm_up, title="replicas")
    pairs = {n: (timed[f"{n} replicas, corpus"], timed[f"{n} replicas, row"]) for n in counts}
    rates = {
        n: rate_after_start(whole.seconds, start.seconds, len(workload.texts))
        for n, (whole, start) in pairs.items()
    }
    one = rates[counts[0]]
    return [
        {
            "replicas": n,
            "seconds": whole.seconds.to_dict(),
            "start_up_seconds": start.seconds.to_dict(),
            "rows_per_second": round(len(workload.texts) / whole.seconds.median, 2),
            "rows_per_second_after_start": None if rate is None else round(rate, 2),
            "efficiency": None if rate is None or one is None else round(rate / (n * one), 4),
        }
        for (n, (whole, start)), rate in zip(pairs.items(), rates.values(), strict=True)
    ]


def _shards(workload: Workload, settings: BenchSettings, folder: Path, model: str) -> list[dict[str, Any]]:
    """The same rows in more and more shards, through a model that costs next to nothing."""
    rows = max(settings.shards)
    corpus = _repeated(workload, rows, folder)
    jobs = {
        f"{shards} shards": ClassifyJob(
            model=model,
            corpus=corpus,
            settings=settings,
            max_length=workload.max_length,
            shard_rows=rows // shards,
        )
        for shards in settings.shards
    }
    timed = take_turns(jobs, repetitions=settings.repetitions, warm_up=settings.job_warm_up, title="shards")
    return [
        {
            "shards": shards,
            "rows": rows,
            "seconds": (seconds := timed[f"{shards} shards"].seconds).to_dict(),
            "milliseconds_per_shard": round(1000 * seconds.median / shards, 3),
        }
        for shards in settings.shards
    ]


def _memory(workload: Workload, settings: BenchSettings, folder: Path, model: str) -> list[dict[str, Any]]:
    """More and more rows in shards of one size: the most that a replica, and the driver, ever held."""
    measured = []
    for rows in settings.memory_rows:
        job = ClassifyJob(
            model=model,
            corpus=_repeated(workload, rows, folder),
            settings=settings,
            max_length=workload.max_length,
        )
        peak = peak_memory(job.config())
        measured.append(
            {
                "rows": rows,
                "largest_replica_mib": round(peak.largest_replica / 2**20),
                "driver_mib": round(peak.driver / 2**20),
            }
        )
    return measured


def peak_memory(config: ClassifyConfig) -> PeakMemory:
    """Of a run whose driver is a fresh process: this one holds the corpus that it made, and more."""
    with (
        subprocess.Popen(
            [sys.executable, "-c", _DRIVER], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        ) as driver,
        PeakMemory(driver.pid) as peak,
    ):
        _, said = driver.communicate(pickle.dumps(config))
    if driver.returncode:
        raise RuntimeError(f"the run over {config.inputs[0]!r} failed: {said.decode(errors='replace')}")
    return peak


def _repeated(workload: Workload, rows: int, folder: Path) -> Path:
    return ray_jobs.write_corpus(list(islice(cycle(workload.texts), rows)), folder / f"rows-{rows}.parquet")
