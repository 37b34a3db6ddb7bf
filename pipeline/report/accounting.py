"""Turns a run record into its account: what the run did, what full depth would have been, what that saved.

Arithmetic only. Knows nothing of files or of how numbers are shown. Every quantity that the record cannot
support is None: nothing is guessed, and what is derived rather than measured says so (`Basis`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from deebert.cost import ModelShape, expected_saving, mean_exit_layer
from pipeline.engine.stats import EngineStats
from pipeline.records import Attempt, ModelRecord, RunRecord, Totals

Basis = Literal["measured", "bounded", "expected"]
"""``measured``: the control sample ran at full depth and was timed. ``bounded``: it did, but took longer than the exit
lane's own time, scaled by FLOPs, which counts instead. ``expected``: that, without a control sample."""

SECONDS_PER_HOUR = 3600.0
DOCUMENTS_PER_PRICE = 1_000_000
NORMAL_QUANTILE_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often the label a row left with is the label of full depth."""

    audited_rows: int
    agreeing_rows: int
    share: float
    low: float
    """Lower end of the 95 % Wilson interval."""
    high: float
    """Upper end of the 95 % Wilson interval."""


@dataclass(frozen=True, kw_only=True)
class FullDepth:
    """Compute seconds of the same rows without exits."""

    seconds: float
    """Never more than the exit lane's own seconds per FLOP give: a control sample in fewer and emptier micro-batches
    is slower than a run at full depth would have been, and must not count as a saving."""
    control_seconds: float | None
    """What the control sample took, scaled to all tokens; None when expected."""
    basis: Basis
    control_rows: int
    """Rows of the control sample; 0 when expected."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Money per million documents for the model's compute; reading, start-up and idle time are not in it."""

    price_per_hour: float
    """Price of one replica (its machine, or its share of one) for an hour."""
    currency: str
    with_exits: float
    full_depth: float
    wall: float
    """Of all replicas for the wall time of all attempts, whatever they did in it."""
    basis: Basis
    """How `full_depth` is known."""


@dataclass(frozen=True, kw_only=True)
class LayerAccount:
    """One layer of the model, or its embeddings where they have an off-ramp."""

    layer: int
    """1-based; 0: the embeddings."""
    has_off_ramp: bool
    exit_rows: int
    """Rows that left after this layer; a row in windows with the deepest of them."""
    exit_windows: int
    """The same, each window of a longer row by itself."""
    samples: int
    """Rows, or windows of longer ones, that ran through it."""
    tokens: int
    """Tokens that ran through it."""
    saved_tokens: int
    """Tokens that full depth would have run through it, and the exits spared."""
    steps: int | None
    """Micro-batches; not counted for the embeddings."""
    seconds: float
    full_depth_seconds: float | None
    """What the control sample measured for this layer, scaled to all tokens; None without one."""


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """The account of a run."""

    rows: int
    windows: int
    """What was run: rows, each window of a longer one by itself."""
    tokens: int
    mean_exit_layer: float | None
    """Of what was run: a row, or each window of a longer one."""
    layer_work_saved: float | None
    """1 - mean exit layer / layers (DeeBERT, Eq. 2); every sample counts the same, whatever its length."""
    executed_flops: float
    """Layers and off-ramps that ran, at the lengths of the rows that ran through them."""
    full_depth_flops: float
    """All rows, or their windows, through all layers and the final classifier."""
    flops_saved: float | None
    """Share of full-depth FLOPs, 0 to 1."""
    compute_seconds: float
    """The exit lane, summed over replicas; of the committed rows, each once."""
    repeated_seconds: float
    """The exit lane on rows that a replica had in hand when it died, and that another one did again, or that are
    not committed yet; not part of `compute_seconds`. What had not been reported when it died is not counted."""
    control_seconds: float
    """The audit lane: what measuring cost; not part of `compute_seconds`."""
    full_depth: FullDepth | None
    seconds_saved: float | None
    """Share of full-depth seconds; negative when exits cost more than they saved. See `full_depth.basis`."""
    exit_batch_samples: float | None
    """Mean samples per micro-batch in layer 1 of the exit lane."""
    control_batch_samples: float | None
    """Mean samples per micro-batch of the audit lane; a much smaller one makes full depth look slow."""
    agreement: Agreement | None
    """None without control rows, and of a regression, which has `difference` instead."""
    difference: float | None
    """Of a regression: mean |number - full depth's| of the control rows."""
    wall_seconds: float
    """Summed over attempts."""
    rows_per_second: float | None
    """Committed rows per wall second, start-up included."""
    cost: Cost | None
    layers: tuple[LayerAccount, ...]


def account(record: RunRecord, *, price_per_hour: float | None = None, currency: str = "$") -> Accounting:
    """The account of the rows committed so far.

    Args:
        record: The run; it need not be finished.
        price_per_hour: Price of one replica for an hour; without it no cost is stated.
        currency: Shown in front of amounts.
    """
    ran = record.totals.compute
    record = replace(record, totals=replace(record.totals, compute=_once(record.totals)))
    totals, shape = record.totals, _shape(record.model)
    executed = executed_flops(shape, totals.compute)
    at_full_depth = full_depth_flops(shape, totals)
    full_depth = _full_depth(totals, executed, at_full_depth)
    wall_seconds = sum(attempt.wall_seconds for attempt in record.attempts)
    has_rows = totals.rows > 0
    is_regression = record.model.problem_type == "regression"
    return Accounting(
        rows=totals.rows,
        windows=sum(totals.exit_windows),
        tokens=totals.tokens,
        mean_exit_layer=mean_exit_layer(totals.exit_windows) if has_rows else None,
        layer_work_saved=expected_saving(totals.exit_windows) if has_rows else None,
        executed_flops=executed,
        full_depth_flops=at_full_depth,
        flops_saved=_saved_share(executed, at_full_depth),
        compute_seconds=totals.compute.total_seconds,
        repeated_seconds=ran.total_seconds - totals.compute.total_seconds,
        control_seconds=totals.control.total_seconds,
        full_depth=full_depth,
        seconds_saved=_saved_share(totals.compute.total_seconds, full_depth.seconds) if full_depth else None,
        exit_batch_samples=_batch_samples(totals.compute),
        control_batch_samples=_batch_samples(totals.control),
        agreement=None if is_regression else _agreement(totals.audited_rows, totals.audit_agreements),
        difference=totals.audit_distance / totals.audited_rows
        if is_regression and totals.audited_rows
        else None,
        wall_seconds=wall_seconds,
        rows_per_second=_rows_per_second(record.attempts),
        cost=_cost(record, full_depth, price_per_hour, currency),
        layers=_layers(record),
    )


def _once(totals: Totals) -> EngineStats:
    """The exit lane's work on the committed rows, each once.

    A part's record says what its replica's lanes did since the part before, whichever shards it was for. When a
    replica dies, work on shards that it had in hand has been reported already, and comes again with them; when a
    part is removed because its input changed, work on others goes with it. What committed rows took a layer to run
    is known, in samples and (but for windows, which leave one by one) in tokens: all else of it is scaled by that.
    """
    ran = totals.compute
    samples = (max(ran.off_ramp_samples[0], ran.samples[0]), *ran.samples)
    by_samples = _passing(totals.exit_windows) / np.maximum(1, samples)
    if totals.exit_windows == totals.exit_rows:
        by_tokens = _passing(totals.exit_tokens)[1:] / np.maximum(1, ran.tokens)
    else:
        by_tokens = np.minimum(by_samples[1:], totals.tokens / np.maximum(1, ran.tokens))
    return EngineStats(
        steps=_scaled(ran.steps, by_samples[1:]),
        samples=_scaled(ran.samples, by_samples[1:]),
        tokens=_scaled(ran.tokens, by_tokens),
        squared_tokens=_scaled(ran.squared_tokens, by_tokens),
        off_ramp_samples=_scaled(ran.off_ramp_samples, by_samples),
        seconds=tuple((np.array(ran.seconds) * by_tokens).tolist()),
        embedding_seconds=ran.embedding_seconds * float(by_samples[0]),
    )


def _passing(leaving: Sequence[int]) -> npt.NDArray[np.int64]:
    """How many run through each layer, of how many leave after it."""
    return np.cumsum(leaving[::-1])[::-1]


def _scaled(counts: Sequence[int], shares: npt.NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(round(count * share) for count, share in zip(counts, shares.tolist(), strict=True))


def executed_flops(shape: ModelShape, stats: EngineStats) -> float:
    """FLOPs of counted work."""
    layers = zip(stats.tokens, stats.squared_tokens, strict=True)
    return sum(shape.layer_flops(*layer) for layer in layers) + shape.off_ramp_flops(
        sum(stats.off_ramp_samples)
    )


def full_depth_flops(shape: ModelShape, totals: Totals) -> float:
    """FLOPs of all written rows, or of their windows, through all layers and the final classifier."""
    layer = shape.layer_flops(totals.tokens, totals.squared_tokens)
    return shape.num_layers * layer + shape.off_ramp_flops(sum(totals.exit_windows))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion; sound near 0 and 1 and for few trials."""
    share, z2 = successes / trials, NORMAL_QUANTILE_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = NORMAL_QUANTILE_95 * spread / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def _shape(model: ModelRecord) -> ModelShape:
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_labels=len(model.labels),
        off_ramp_pooling=model.off_ramp_pooling,
    )


def _saved_share(spent: float, full: float) -> float | None:
    return 1.0 - spent / full if full > 0 else None


def _control_scale(totals: Totals) -> float | None:
    """All tokens over control tokens; None when nothing was timed at full depth."""
    control_tokens = totals.control.tokens[-1]
    measured = control_tokens > 0 and totals.control.total_seconds > 0
    return totals.tokens / control_tokens if measured else None


def _full_depth(totals: Totals, executed: float, at_full_depth: float) -> FullDepth | None:
    spent, scale = totals.compute.total_seconds, _control_scale(totals)
    by_flops = spent * at_full_depth / executed if executed > 0 and spent > 0 else math.inf
    if scale is not None:
        found, rows = totals.control.total_seconds * scale, totals.audited_rows
        basis: Basis = "measured" if found <= by_flops else "bounded"
        return FullDepth(seconds=min(found, by_flops), control_seconds=found, basis=basis, control_rows=rows)
    if by_flops < math.inf:
        return FullDepth(seconds=by_flops, control_seconds=None, basis="expected", control_rows=0)
    return None


def _batch_samples(stats: EngineStats) -> float | None:
    return stats.samples[0] / stats.steps[0] if stats.steps[0] else None


def _agreement(audited: int, agreeing: int) -> Agreement | None:
    if audited == 0:
        return None
    low, high = wilson_interval(agreeing, audited)
    return Agreement(
        audited_rows=audited, agreeing_rows=agreeing, share=agreeing / audited, low=low, high=high
    )


def _rows_per_second(attempts: Sequence[Attempt]) -> float | None:
    seconds = sum(attempt.wall_seconds for attempt in attempts)
    return sum(attempt.committed_rows for attempt in attempts) / seconds if seconds > 0 else None


def _cost(
    record: RunRecord, full_depth: FullDepth | None, price_per_hour: float | None, currency: str
) -> Cost | None:
    totals = record.totals
    if price_per_hour is None or full_depth is None or totals.rows == 0:
        return None
    price_per_second = price_per_hour / SECONDS_PER_HOUR * DOCUMENTS_PER_PRICE / totals.rows
    return Cost(
        price_per_hour=price_per_hour,
        currency=currency,
        with_exits=totals.compute.total_seconds * price_per_second,
        full_depth=full_depth.seconds * price_per_second,
        wall=sum(a.wall_seconds * _most_replicas(a) for a in record.attempts) * price_per_second,
        basis=full_depth.basis,
    )


def _most_replicas(attempt: Attempt) -> int:
    """Of a pool that grows, what it could grow to."""
    return int(attempt.replicas.rpartition(":")[2])


def _layers(record: RunRecord) -> tuple[LayerAccount, ...]:
    totals, compute, scale = record.totals, record.totals.compute, _control_scale(record.totals)
    layers = tuple(
        LayerAccount(
            layer=i + 1,
            has_off_ramp=i + 1 in record.model.off_ramp_layers,
            exit_rows=totals.exit_rows[i + 1],
            exit_windows=totals.exit_windows[i + 1],
            samples=compute.samples[i],
            tokens=compute.tokens[i],
            saved_tokens=totals.tokens - compute.tokens[i],
            steps=compute.steps[i],
            seconds=compute.seconds[i],
            full_depth_seconds=None if scale is None else totals.control.seconds[i] * scale,
        )
        for i in range(record.model.num_layers)
    )
    return (_embeddings(totals), *layers) if 0 in record.model.off_ramp_layers else layers


def _embeddings(totals: Totals) -> LayerAccount:
    """The embeddings run every row, or window."""
    scale = _control_scale(totals)
    return LayerAccount(
        layer=0,
        has_off_ramp=True,
        exit_rows=totals.exit_rows[0],
        exit_windows=totals.exit_windows[0],
        samples=sum(totals.exit_windows),
        tokens=totals.tokens,
        saved_tokens=0,
        steps=None,
        seconds=totals.compute.embedding_seconds,
        full_depth_seconds=None if scale is None else totals.control.embedding_seconds * scale,
    )
