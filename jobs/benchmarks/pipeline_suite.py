"""`classify` end to end on a real Ray, between what bounds it and what it replaces.

Above it: the engine alone (token ids in memory, no files, no Ray) and the host ceiling (everything but the
model). Beside it: Ray Data with a transformers pipeline. Each Ray job's start-up is measured as the same job
over one row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH
from jobs.benchmarks import ray_jobs
from jobs.benchmarks.contenders import Packed
from jobs.benchmarks.ray_jobs import ClassifyJob, RayDataJob
from jobs.benchmarks.settings import BenchSettings
from jobs.benchmarks.timing import Timed, paired_ratios, take_turns
from jobs.benchmarks.workload import Workload
from pipeline.cluster import RaySession, place

CLASSIFY, EXITS, CEILING = "classify, full depth", "classify, exits", "host ceiling"
ENGINE, RAY_DATA = "engine alone", "Ray Data + transformers"
_START = ", one row"


def run(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Time every contender; JSON-ready."""
    with tempfile.TemporaryDirectory() as folder:
        timed = take_turns(
            _contenders(workload, settings, Path(folder)),
            repetitions=settings.repetitions,
            warm_up=settings.ray_warm_up,
            device=settings.torch_device,
            title="pipeline",
        )
    names = [name for name in timed if not name.endswith(_START)]
    return {"contenders": [_row(name, timed, workload) for name in names]}


def _contenders(workload: Workload, settings: BenchSettings, folder: Path) -> dict[str, Callable[[], int]]:
    corpora = {
        "": ray_jobs.write_corpus(workload.texts, folder / "corpus.parquet"),
        _START: ray_jobs.write_corpus(workload.texts[:1], folder / "row.parquet"),
    }
    whole = ray_jobs.save_whole(workload.checkpoint, folder / "model")
    plain = ray_jobs.save_plain(workload.checkpoint, folder / "plain")
    one_layer = ray_jobs.save_one_layer(workload.checkpoint, folder / "one-layer")
    there_is = RaySession().resources()
    placement = place(
        there_is, on_gpus=settings.device == "cuda", replicas=None, threads=None, weight_bytes=0
    )
    shared = {"settings": settings, "max_length": workload.max_length}
    contenders: dict[str, Callable[[], int]] = {ENGINE: _engine_alone(workload, settings)}
    for suffix, corpus in corpora.items():
        # Shards enough for every replica to have several in hand.
        shard_rows = max(1, len(workload.texts) // (8 * placement.replicas.most))
        sized = {"corpus": corpus, "shard_rows": shard_rows, "replicas": placement.replicas}
        contenders[CLASSIFY + suffix] = ClassifyJob(model=whole, **shared, **sized)  # type: ignore[arg-type]
        contenders[CEILING + suffix] = ClassifyJob(model=one_layer, **shared, **sized)  # type: ignore[arg-type]
        contenders[RAY_DATA + suffix] = RayDataJob(
            model=plain,
            corpus=corpus,
            settings=settings,
            max_length=workload.max_length,
            replicas=placement.replicas.most,
            threads=placement.threads,
            num_cpus=min(1.0, (there_is.cores - 1) / placement.replicas.most),
        )
        if any(settings.policy.can_fire(layer) for layer in range(workload.shape.num_layers)):
            contenders[EXITS + suffix] = ClassifyJob(
                model=whole,
                full_depth=False,
                **shared,  # type: ignore[arg-type]
                **sized,  # type: ignore[arg-type]
            )
    return contenders


def _engine_alone(workload: Workload, settings: BenchSettings) -> Callable[[], int]:
    packed = Packed(
        encoder=PackedEncoder(workload.checkpoint.model, device=settings.torch_device, dtype=settings.dtype),
        tokens=workload.tokens,
        micro_batch_tokens=max(settings.micro_batch_tokens[0], workload.tokens.max_seqlen),
        make_policy=lambda: FULL_DEPTH,
    )
    return lambda: len(packed().predictions)


def _row(name: str, timed: Mapping[str, Timed[int]], workload: Workload) -> dict[str, Any]:
    seconds, start = timed[name].seconds, timed.get(name + _START)
    rows, tokens = len(workload.texts), workload.tokens.layout.total_tokens
    assert timed[name].outcome == rows  # every row was answered
    after = None if start is None else max(seconds.median - start.seconds.median, 1e-9)
    return {
        "name": name,
        "seconds": seconds.to_dict(),
        "start_up_seconds": None if start is None else start.seconds.to_dict(),
        "rows_per_second": round(rows / seconds.median, 2),
        "tokens_per_second": round(tokens / seconds.median, 1),
        "rows_per_second_after_start": None if after is None else round(rows / after, 2),
        "of_engine_alone": paired_ratios(timed[ENGINE].seconds, seconds).to_dict(),
    }
