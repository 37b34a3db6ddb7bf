"""The engine against padded batches and against itself: same weights, token ids, dtype and threads.

Tokenization is left out: every contender starts from token ids on the host and ends with label ids there. On
CPUs every contender runs as `classify` does, and as serves throughput best: one replica on each core.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH, ExitPolicy
from deebert.precision import DTYPES, cpu_multiplies_bfloat16
from jobs.benchmarks import rivals, roofline
from jobs.benchmarks.contenders import Outcome, Packed, Shared, every_kth
from jobs.benchmarks.profiles import ScriptedExits, Shares, nobody_leaves, shares_with_mean
from jobs.benchmarks.settings import BenchSettings
from jobs.benchmarks.side_by_side import SideBySide
from jobs.benchmarks.timing import Spread, Timed, paired_ratios, take_turns
from jobs.benchmarks.workload import Workload

log = logging.getLogger(__name__)

FULL, REGROUPING, SHRINKING, RIVAL = "full depth", "regrouping", "shrinking", "rival"
_DEPTH = 12
"""Of the model that mean exit layers are given for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """A contender and what it is."""

    kind: str
    """One of `FULL`, `REGROUPING`, `SHRINKING`, `RIVAL`."""
    run: Callable[[], Outcome]
    precision: str
    micro_batch_tokens: int | None = None
    profile: str | None = None
    """Who leaves: ``own``, ``nobody`` or a scripted mean exit layer."""


def run(workload: Workload, settings: BenchSettings) -> dict[str, Any]:
    """Time every contender; JSON-ready."""
    skipped = dict(_left_out(workload, settings))
    replicas = SideBySide(settings.replicas, threads=settings.threads_each)
    with replicas, tempfile.TemporaryDirectory() as folder:
        entries = {
            **_rivals(workload, settings, replicas, Path(folder), skipped),
            **_ours(workload, settings, replicas),
        }
        products = roofline.products(
            workload.shape,
            settings.micro_batch_tokens[0],
            device=settings.torch_device,
            dtype=settings.dtype,
            together=replicas,
        )
        timed: dict[str, Timed[Any]] = take_turns(
            {**{name: entry.run for name, entry in entries.items()}, **products},
            repetitions=settings.repetitions,
            device=settings.torch_device,
            title="engine",
        )
    truth = _float32_labels(workload, settings) if workload.has_real_weights else None
    return {
        "contenders": [
            _row(name, entry, timed[name], workload, truth, baseline=timed[next(iter(entries))])
            for name, entry in entries.items()
        ],
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "savings": list(_savings(entries, timed)),
        "roofline": _roofline(entries, timed, {name: timed[name] for name in products}, workload),
    }


def _rivals(
    workload: Workload, settings: BenchSettings, together: SideBySide, folder: Path, skipped: dict[str, str]
) -> dict[str, Entry]:
    makers: dict[str, Callable[[], dict[str, Sequence[rivals.Classifier]]]] = {
        "transformers": lambda: {
            settings.float_precision: [_transformers(workload, settings)] * settings.replicas
        },
        "onnxruntime": lambda: _onnxruntime(workload, settings, folder),
        "openvino": lambda: _openvino(workload, settings, folder),
    }
    entries: dict[str, Entry] = {}
    for library in rivals.LIBRARIES:
        reason = (
            rivals.missing(library, settings.torch_device)
            if library in settings.rivals
            else "not asked for (--rivals)"
        )
        if reason is not None:
            skipped[library] = reason
            log.info("%s is left out: %s", library, reason)
            continue
        for precision, replicas in makers[library]().items():
            for order in ("input order", "length-sorted"):
                entries[f"{library} {precision}, {order}"] = Entry(
                    kind=RIVAL,
                    run=_padded(workload, settings, replicas, together, sort=order == "length-sorted"),
                    precision=precision,
                )
    return entries


def _transformers(workload: Workload, settings: BenchSettings) -> rivals.Classifier:
    return rivals.transformers_classifier(
        workload.checkpoint.model, device=settings.torch_device, dtype=DTYPES[settings.float_precision]
    )


def _onnxruntime(
    workload: Workload, settings: BenchSettings, folder: Path
) -> dict[str, Sequence[rivals.Classifier]]:
    exported = _exported(workload, folder)
    paths = {rivals.FLOAT32: exported, rivals.INT8: rivals.quantize_onnx(exported)}
    return {
        # One session: its runs on several threads share the weights and nothing else.
        precision: [rivals.onnxruntime_classifier(path, threads=settings.threads_each)] * settings.replicas
        for precision, path in paths.items()
    }


def _openvino(
    workload: Workload, settings: BenchSettings, folder: Path
) -> dict[str, Sequence[rivals.Classifier]]:
    # Its fastest: where a CPU has no bfloat16, OpenVINO takes minutes for what float32 does in seconds.
    precision = rivals.BFLOAT16 if cpu_multiplies_bfloat16() else rivals.FLOAT32
    exported = _exported(workload, folder)
    made = rivals.openvino_classifiers(
        exported, threads=settings.threads, streams=settings.replicas, precision=precision
    )
    return {precision: made}


def _exported(workload: Workload, folder: Path) -> Path:
    path = folder / "float32.onnx"
    return path if path.exists() else rivals.export_onnx(workload.checkpoint.model, folder)


def _padded(
    workload: Workload,
    settings: BenchSettings,
    replicas: Sequence[rivals.Classifier],
    together: SideBySide,
    *,
    sort: bool,
) -> Shared:
    return Shared(
        parts=[
            rivals.Padded(
                classify=classify,
                tokens=every_kth(workload.tokens, i, len(replicas)),
                batch_size=settings.batch_size,
                sort_by_length=sort,
                num_layers=workload.shape.num_layers,
                padding_id=int(workload.checkpoint.tokenizer.pad_token_id or 0),
            )
            for i, classify in enumerate(replicas)
        ],
        together=together,
    )


def _ours(workload: Workload, settings: BenchSettings, together: SideBySide) -> dict[str, Entry]:
    encoder = PackedEncoder.of(workload.checkpoint.model, device=settings.torch_device, dtype=settings.dtype)
    entries = {}
    for budget in settings.micro_batch_tokens:
        for name, kind, profile, make_policy in _ways_to_run(workload, settings):
            entries[f"{name} @{budget}"] = Entry(
                kind=kind,
                run=Shared(
                    parts=[
                        Packed(
                            encoder=encoder,
                            tokens=every_kth(workload.tokens, i, settings.replicas),
                            micro_batch_tokens=max(budget, workload.tokens.max_seqlen),
                            make_policy=make_policy,
                            regroups=kind != SHRINKING,
                        )
                        for i in range(settings.replicas)
                    ],
                    together=together,
                ),
                precision=settings.precision,
                micro_batch_tokens=budget,
                profile=profile,
            )
    return entries


def _ways_to_run(
    workload: Workload, settings: BenchSettings
) -> Iterator[tuple[str, str, str | None, Callable[[], ExitPolicy]]]:
    """(name, kind, profile, policy maker) of each of our contenders."""
    yield "ours, full depth", FULL, None, lambda: FULL_DEPTH
    depth = workload.shape.num_layers
    yield "ours, nobody leaves", REGROUPING, "nobody", _scripted(nobody_leaves(depth))
    policies: dict[str, Callable[[], ExitPolicy]] = {}
    if any(settings.policy.can_fire(layer) for layer in range(depth)):
        policies["own"] = lambda: settings.policy
    for scaled in _scaled_means(workload, settings):
        if scaled > 1:
            policies[f"mean {scaled:g}"] = _scripted(shares_with_mean(scaled, depth))
    for profile, make_policy in policies.items():
        yield f"ours, {profile}, regrouping", REGROUPING, profile, make_policy
        yield f"ours, {profile}, shrinking", SHRINKING, profile, make_policy


def _scaled_means(workload: Workload, settings: BenchSettings) -> list[float]:
    return [mean * workload.shape.num_layers / _DEPTH for mean in settings.mean_exit_layers]


def _left_out(workload: Workload, settings: BenchSettings) -> Iterator[tuple[str, str]]:
    """Scripted profiles of so shallow a model that all would leave after its first layer, or before; and why."""
    for scaled in _scaled_means(workload, settings):
        if scaled <= 1:
            depth = workload.shape.num_layers
            yield f"ours, mean {scaled:g}", f"no profile of {depth} layers has this mean exit layer"


def _scripted(shares: Shares) -> Callable[[], ExitPolicy]:
    return lambda: ScriptedExits(shares.tolist())


def _float32_labels(workload: Workload, settings: BenchSettings) -> npt.NDArray[np.int64]:
    """The answers that all others are held to."""
    exact = Packed(
        encoder=PackedEncoder.of(
            workload.checkpoint.model, device=settings.torch_device, dtype=torch.float32
        ),
        tokens=workload.tokens,
        micro_batch_tokens=max(settings.micro_batch_tokens[0], workload.tokens.max_seqlen),
        make_policy=lambda: FULL_DEPTH,
    )
    return exact().predictions


def _row(
    name: str,
    entry: Entry,
    timed: Timed[Any],
    workload: Workload,
    truth: npt.NDArray[np.int64] | None,
    *,
    baseline: Timed[Any],
) -> dict[str, Any]:
    outcome: Outcome = timed.outcome
    seconds = timed.seconds
    return {
        "name": name,
        "kind": entry.kind,
        "precision": entry.precision,
        "micro_batch_tokens": entry.micro_batch_tokens,
        "profile": entry.profile,
        "seconds": seconds.to_dict(),
        "samples_per_second": round(len(workload.tokens) / seconds.median, 2),
        "tokens_per_second": round(workload.tokens.layout.total_tokens / seconds.median, 1),
        "speed_up": paired_ratios(baseline.seconds, seconds).to_dict(),
        "work": outcome.work(workload.shape),
        "achieved_gflops": round(outcome.encoder_flops(workload.shape) / seconds.median / 1e9, 2),
        "label_agreement": None if truth is None else round(float((outcome.predictions == truth).mean()), 5),
    }


def _savings(entries: Mapping[str, Entry], timed: Mapping[str, Timed[Any]]) -> Iterator[dict[str, Any]]:
    """For each profile and budget: how much of the saved layer-tokens became saved time."""
    full = {e.micro_batch_tokens: timed[name] for name, e in entries.items() if e.kind == FULL}
    for name, entry in entries.items():
        if entry.kind not in (REGROUPING, SHRINKING):
            continue
        mine, whole = timed[name], full[entry.micro_batch_tokens]
        faster = paired_ratios(whole.seconds, mine.seconds)
        fewer = whole.outcome.layer_tokens / mine.outcome.layer_tokens
        yield {
            "profile": entry.profile,
            "kind": entry.kind,
            "micro_batch_tokens": entry.micro_batch_tokens,
            "mean_exit_layer": round(float(mine.outcome.exit_layers.mean()), 3),
            "layer_tokens_full": whole.outcome.layer_tokens,
            "layer_tokens": mine.outcome.layer_tokens,
            "times_fewer_layer_tokens": round(fewer, 4),
            "times_faster": faster.to_dict(),
            "savings_realised": Spread.of([ratio / fewer for ratio in faster.values]).to_dict(),
            "steps_full": whole.outcome.steps,
            "steps": mine.outcome.steps,
        }


def _roofline(
    entries: Mapping[str, Entry],
    timed: Mapping[str, Timed[Any]],
    products: Mapping[str, Timed[Any]],
    workload: Workload,
) -> dict[str, Any]:
    """What the full-depth engine reaches of what this machine multiplies, best layout of weights each."""
    rates = {name: t.outcome / t.seconds.median / 1e9 for name, t in products.items()}
    spreads = {name: t.seconds.spread for name, t in products.items()}
    layer, large = (
        max(rate for name, rate in rates.items() if name.startswith(k)) for k in ("layer", "large")
    )
    reached = {
        str(entry.micro_batch_tokens): timed[name].outcome.encoder_flops(workload.shape)
        / timed[name].seconds.median
        / 1e9
        for name, entry in entries.items()
        if entry.kind == FULL
    }
    return {
        "gemm_gflops": {
            name: {"gflops": round(rate, 1), "spread": round(spreads[name], 4)}
            for name, rate in rates.items()
        },
        "layer_gemm_gflops": round(layer, 1),
        "large_gemm_gflops": round(large, 1),
        "full_depth": [
            {
                "micro_batch_tokens": int(budget),
                "encoder_gflops": round(rate, 1),
                "of_layer_gemm": round(rate / layer, 4),
                "of_large_gemm": round(rate / large, 4),
            }
            for budget, rate in reached.items()
        ],
    }
