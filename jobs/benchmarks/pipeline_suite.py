"""`classify` end to end on a real Ray, between what bounds it and what it replaces.

Above it: the engine alone (as many engines and threads as `classify` has replicas and threads, token ids in
memory, no files, no Ray) and the host ceiling (everything but the model). Beside it: Ray Data with a
transformers pipeline, on a part of the rows, for its rate does not depend on how many there are. Each Ray
job's start-up is measured as the same job over one row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH
from jobs.benchmarks import ray_jobs
from jobs.benchmarks.contenders import Packed, every_kth
from jobs.benchmarks.ray_jobs import ClassifyJob, RayDataJob
from jobs.benchmarks.settings import BenchSettings
from jobs.benchmarks.side_by_side import SideBySide
from jobs.benchmarks.timing import Spread, Timed, take_turns
from jobs.benchmarks.workload import Workload
from pipeline.cluster import Placement, RaySession, place

CLASSIFY, EXITS, CEILING = "classify, full depth", "classify, exits", "host ceiling"
ENGINE, RAY_DATA = "engine alone", "Ray Data + transformers"
_START = ", one row"
_SHARDS_PER_REPLICA = 8
_MOST_SHARD_ROWS = 4096
_MOST_RIVAL_ROWS = 20_000


def run(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Time every contender; JSON-ready."""
    there_is = RaySession().resources()
    placement = place(
        there_is, on_gpus=settings.device == "cuda", replicas=None, threads=None, weight_bytes=0
    )
    engines = SideBySide(placement.replicas.most, threads=placement.threads)
    with engines, tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Callable[[], int]] = {
            ENGINE: EnginesAlone(workload=workload, settings=settings, together=engines),
            **_classify_jobs(workload, settings, placement, Path(folder)),
            **_ray_data_jobs(workload, settings, placement, there_is.cores, Path(folder)),
        }
        timed = take_turns(
            contenders,
            repetitions=settings.repetitions,
            warm_up=settings.job_warm_up,
            device=settings.torch_device,
            title="pipeline",
        )
    return {
        "replicas": placement.replicas.most,
        "threads": placement.threads,
        "contenders": [_row(name, timed, workload) for name in timed if not name.endswith(_START)],
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class EnginesAlone:
    """What `classify` would be if there were nothing but its engines: one per replica, at full depth."""

    workload: Workload
    settings: BenchSettings
    together: SideBySide
    _engines: list[Packed] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_engines", [self._engine(i) for i in range(self.together.replicas)])

    def __call__(self) -> int:
        """Run every sample once; returns how many there were."""
        done = self.together(self._engines)
        if self.settings.torch_device.type == "cuda":
            torch.cuda.empty_cache()  # the jobs that come next are other processes, and ask what is free
        return sum(len(outcome.predictions) for outcome in done)

    def _engine(self, number: int) -> Packed:
        tokens, settings = self.workload.tokens, self.settings
        return Packed(
            encoder=PackedEncoder.of(
                self.workload.checkpoint.model,
                device=own_device(settings.torch_device, number),
                dtype=settings.dtype,
            ),
            tokens=every_kth(tokens, number, self.together.replicas),
            micro_batch_tokens=max(settings.micro_batch_tokens[0], tokens.max_seqlen),
            make_policy=lambda: FULL_DEPTH,
        )


def own_device(device: torch.device, number: int) -> torch.device:
    """Of one of several engines: each GPU has one, the CPU has them all."""
    return torch.device("cuda", number) if device.type == "cuda" else device


def _corpora(texts: Sequence[str], folder: Path, name: str) -> dict[str, Path]:
    """The texts, and one of them, by what is added to a contender's name."""
    return {
        "": ray_jobs.write_corpus(texts, folder / f"{name}.parquet"),
        _START: ray_jobs.write_corpus(texts[:1], folder / f"{name}-row.parquet"),
    }


def _classify_jobs(
    workload: Workload, settings: BenchSettings, placement: Placement, folder: Path
) -> dict[str, Callable[[], int]]:
    whole = ray_jobs.save_whole(workload.checkpoint, folder / "model")
    one_layer = ray_jobs.save_one_layer(workload.checkpoint, folder / "one-layer")
    can_exit = any(settings.policy.can_fire(layer) for layer in range(workload.shape.num_layers))
    kinds = [(CLASSIFY, whole, True), (CEILING, one_layer, True), *[(EXITS, whole, False)] * can_exit]
    # Shards enough for every replica to have several in hand.
    rows = len(workload.texts) // (_SHARDS_PER_REPLICA * placement.replicas.most)
    return {
        name + suffix: ClassifyJob(
            model=model,
            corpus=corpus,
            settings=settings,
            max_length=workload.max_length,
            replicas=placement.replicas,
            shard_rows=min(max(1, rows), _MOST_SHARD_ROWS),
            full_depth=full_depth,
        )
        for suffix, corpus in _corpora(workload.texts, folder, "corpus").items()
        for name, model, full_depth in kinds
    }


def _ray_data_jobs(
    workload: Workload, settings: BenchSettings, placement: Placement, cores: int, folder: Path
) -> dict[str, Callable[[], int]]:
    if "transformers" not in settings.rivals:
        return {}
    plain = ray_jobs.save_plain(workload.checkpoint, folder / "plain")
    return {
        RAY_DATA + suffix: RayDataJob(
            model=plain,
            corpus=corpus,
            settings=settings,
            max_length=workload.max_length,
            replicas=placement.replicas.most,
            threads=placement.threads,
            num_cpus=min(1.0, (cores - 1) / placement.replicas.most),
        )
        for suffix, corpus in _corpora(workload.texts[:_MOST_RIVAL_ROWS], folder, "rival").items()
    }


def _row(name: str, timed: Mapping[str, Timed[int]], workload: Workload) -> dict[str, Any]:
    seconds, start, rows = timed[name].seconds, timed.get(name + _START), timed[name].outcome
    if name != RAY_DATA:
        assert rows == len(workload.texts)  # every row was answered
    tokens = int(workload.tokens.layout.lengths[:rows].sum())
    alone = timed[ENGINE]
    alone_rates = [alone.outcome / s for s in alone.seconds.values]
    after = None if start is None else rate_after_start(seconds, start.seconds, rows)
    return {
        "name": name,
        "rows": rows,
        "seconds": seconds.to_dict(),
        "start_up_seconds": None if start is None else start.seconds.to_dict(),
        "rows_per_second": round(rows / seconds.median, 2),
        "tokens_per_second": round(tokens / seconds.median, 1),
        "rows_per_second_after_start": None if after is None else round(after, 2),
        # Of each round: what both suffered in a round cancels out.
        "of_engine_alone": Spread.of(
            [rows / s / rate for s, rate in zip(seconds.values, alone_rates, strict=True)]
        ).to_dict(),
        "of_engine_alone_after_start": None
        if after is None
        else round(after / (alone.outcome / alone.seconds.median), 4),
    }


def rate_after_start(whole: Spread, start: Spread, rows: int) -> float | None:
    """Rows a second once a job is up; None where it was over before that could be told from noise."""
    seconds = whole.median - start.median
    noise = (whole.most - whole.least) + (start.most - start.least)
    return rows / seconds if seconds > noise else None
