"""`deebert bench`: the engine and the pipeline against baselines, in one run; the last line is JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.flags import comma_list, flag, parse_job
from jobs.terminal import native_messages_aside, quiet_libraries
from pipeline.config import PRECISION_HELP, PRECISIONS, Thresholds, thresholds
from pipeline.errors import UsageError
from pipeline.fields import each, number, positive, random_seed

if TYPE_CHECKING:
    from deebert.checkpoint import Checkpoint
    from jobs.benchmarks.settings import BenchSettings
    from jobs.benchmarks.workload import Workload

SUITES = ("engine", "pipeline", "scaling", "training")
FORMAT_VERSION = 1


def _layers(text: str) -> tuple[float, ...]:
    values = each(number)(text)
    if not all(1 < value < 12 for value in values):
        raise ValueError("give mean exit layers between 1 and 12")
    return values


def _lengths(text: str) -> str:
    if text not in ("short", "long") and not text.isdigit():
        raise ValueError(f"{text!r} is neither short, long nor a number of tokens")
    return text


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What `deebert bench` takes."""

    suite: str = flag(
        "engine: contenders over token ids; pipeline: whole jobs on Ray; scaling: replicas and shards; training: what "
        "its stages cost",
        default="engine",
        choices=(*SUITES, "all"),
    )
    model: str | None = flag(
        "DeeBERT folder or hub id, or random weights of a shape: bert-base, bert-large, e5-small, tiny; "
        "left out, bert-base",
        default=None,
    )
    texts: str | None = flag("file of texts to run on; left out, random ones", default=None)
    text_column: str = flag("column of the text", default="text")
    lengths: str = flag(
        "of random texts: short (mean 25 tokens), long (mean 230), or a number of tokens",
        default="short",
        parse=_lengths,
    )
    samples: int = flag("how many texts", default=1024, parse=positive)
    max_length: int | None = flag(
        "tokens a text is cut to; left out, what the model was trained with", default=None, parse=positive
    )
    entropy_threshold: Thresholds | None = flag(
        "operating point to run beside the scripted ones; left out, the model's own",
        default=None,
        parse=thresholds,
        metavar="S",
    )
    mean_exit_layers: tuple[float, ...] = flag(
        "scripted profiles, by their mean exit layer of 12 (scaled to other depths)",
        default=(3.0, 5.0, 7.0, 9.0, 11.0),
        parse=_layers,
        metavar="M,M",
    )
    micro_batch_tokens: tuple[int, ...] = flag(
        "most tokens in a micro-batch; several are compared; left out, what classify chooses",
        default=(),
        parse=each(positive),
        metavar="N,N",
    )
    batch_size: int = flag("samples in a padded batch of the rivals", default=32, parse=positive)
    rivals: tuple[str, ...] = flag(
        "libraries to compare with, or none",
        default=("transformers", "onnxruntime", "openvino"),
        parse=comma_list,
        metavar="L,L",
    )
    precision: str = flag(
        PRECISION_HELP,
        default="auto",
        choices=PRECISIONS,
    )
    device: str = flag("auto is cuda where there is one", default="auto", choices=("auto", "cpu", "cuda"))
    threads: int | None = flag("CPU threads; left out, all cores", default=None, parse=positive)
    replicas: int | None = flag(
        "how many of each contender run side by side, the threads shared out among them; left out, one per "
        "thread on CPUs, as classify has it, and one on a GPU",
        default=None,
        parse=positive,
    )
    repetitions: int = flag("timed rounds, after one that warms up", default=5, parse=positive)
    shards: tuple[int, ...] = flag(
        "numbers of shards of the scaling suite", default=(10, 100, 1_000, 10_000), parse=each(positive)
    )
    memory_rows: tuple[int, ...] = flag(
        "numbers of rows at which the scaling suite looks at memory",
        default=(100_000, 1_000_000),
        parse=each(positive),
        metavar="N,N",
    )
    seed: int = flag("of random weights and texts", default=42, parse=random_seed)
    quick: bool = flag(
        "seconds instead of minutes: a tiny model, few texts, one round; proves only that it runs",
        default=False,
    )
    output: str = flag("folder of the dated result", default="jobs/bench_results")


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Parse, measure, print the tables, write the result, end with it as one line."""
    job = parse_job(
        BenchJob,
        argv,
        prog=prog,
        description="Measure engine and pipeline against baselines, in turn, in one run.",
    )
    from jobs.benchmarks import results

    result = {**bench(job), "command": [*prog.split(), *argv]}
    path = results.write(result, Path(job.output))
    print(results.tables(result), end="\n\n")
    print(json.dumps({**result, "path": str(path)}))
    return 0


def bench(job: BenchJob) -> dict[str, Any]:
    """Run the suites asked for; JSON-ready."""
    import torch

    from jobs.benchmarks import machine

    quiet_libraries()
    logging.getLogger("pipeline").setLevel(logging.WARNING)  # a line per shard between the bar's
    job = _quick(job) if job.quick else job
    _check(job)
    workload = _workload(job)
    settings = _settings(job, workload.checkpoint)
    torch.set_num_threads(settings.threads_each)
    names = SUITES if job.suite == "all" else (job.suite,)
    return {
        "format_version": FORMAT_VERSION,
        "suite": job.suite,
        "started_at": machine.now(),
        "machine": machine.describe(),
        "settings": settings.to_dict(),
        "workload": workload.describe(),
        "suites": {name: _run_suite(name, workload, settings) for name in names},
    }


def _run_suite(name: str, workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    if name == "engine":
        from jobs.benchmarks import engine_suite

        return engine_suite.run(workload, settings)
    if name == "training":
        from jobs.benchmarks import training_suite

        return training_suite.run(workload, settings)
    from jobs.benchmarks import pipeline_suite, scaling_suite

    with native_messages_aside():
        if name == "pipeline":
            return pipeline_suite.run(workload, settings)
        return scaling_suite.run(workload, settings)


def _quick(job: BenchJob) -> BenchJob:
    """The smallest run that goes everywhere; what was asked for beyond the defaults stays."""
    default = BenchJob()
    small: dict[str, Any] = {
        "model": "tiny",
        "samples": 48,
        "repetitions": 1,
        "mean_exit_layers": (6.0,),
        "micro_batch_tokens": (256,),
        "shards": (2, 8),
        "memory_rows": (100, 200),
    }
    asked = {name for name in small if getattr(job, name) != getattr(default, name)}
    return replace(job, **{name: value for name, value in small.items() if name not in asked})


def _check(job: BenchJob) -> None:
    import torch

    from jobs.benchmarks.rivals import LIBRARIES

    if job.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU: run on a machine that has one, or on the CPU")
    unknown = [name for name in job.rivals if name not in (*LIBRARIES, "none")]
    if unknown:
        raise UsageError(f"unknown rival {unknown[0]!r}: choose from {', '.join(LIBRARIES)}, or none")


def _workload(job: BenchJob) -> Workload:
    from jobs.benchmarks import workload

    texts = None if job.texts is None else workload.read_texts(job.texts, job.text_column)
    return workload.prepare(
        job.model or "bert-base",
        texts=texts,
        lengths=job.lengths,
        samples=job.samples,
        max_length=job.max_length,
        seed=job.seed,
    )


def _settings(job: BenchJob, checkpoint: Checkpoint) -> BenchSettings:
    import torch

    from deebert.precision import DTYPES, resolve_precision
    from jobs.benchmarks import machine
    from jobs.benchmarks.settings import BenchSettings
    from pipeline.engine.budget import micro_batch_tokens
    from pipeline.planning import resolve_policy

    on_gpu = job.device == "cuda" or (job.device == "auto" and torch.cuda.is_available())
    threads = job.threads or machine.available_cores()
    config = checkpoint.config
    precision = resolve_precision(job.precision, has_gpu=on_gpu, int8_agreement=config.int8_agreement)
    suitable = micro_batch_tokens(
        torch.device("cuda" if on_gpu else "cpu"),
        DTYPES[precision],
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        segments=config.num_hidden_layers,
    )
    return BenchSettings(
        device="cuda" if on_gpu else "cpu",
        precision=precision,
        threads=threads,
        replicas=job.replicas or (1 if on_gpu else threads),
        repetitions=job.repetitions,
        batch_size=job.batch_size,
        micro_batch_tokens=job.micro_batch_tokens or (suitable,),
        mean_exit_layers=job.mean_exit_layers,
        policy=resolve_policy(job.entropy_threshold, None, checkpoint),
        rivals=job.rivals,
        shards=job.shards,
        memory_rows=job.memory_rows,
    )


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("bench"))
