"""Scores of one traced set: each off-ramp, full depth, thresholds, static baselines.

From logits and seconds to what tables and figures show; no model is run. Knows nothing of files or flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from deebert.cost import ModelShape
from deebert.evaluation import flop_saving, off_ramp_scores, predictions, score, static_flop_saving
from deebert.exit_policy import FULL_DEPTH, StoredPolicy
from deebert.problem import problem_of
from jobs.glue import find_task
from jobs.metrics import NamedMetric, metrics_of
from jobs.timing import Measure, Timing
from jobs.traces import StaticRecord, TracedSet, TraceFile
from pipeline.report.evaluated import FULL_DEPTH_NAME, EvaluatedPoint, EvaluatedSet, Measured


def evaluated(
    name: str, file: TraceFile, policies: Mapping[str, StoredPolicy], statics: Sequence[StaticRecord]
) -> EvaluatedSet:
    """Everything to show of the set `name`.

    Args:
        name: of one of the file's sets.
        file: traces and what was measured on them.
        policies: to score, by the name that tables give them.
        statics: baselines to score.
    """
    task = file.origin.task
    scorer = _SetScorer(
        traced=file.sets[name],
        shape=file.origin.shape,
        metrics=metrics_of(
            find_task(task) if task else None, file.origin.labels, problem_of(file.origin.problem_type)
        ),
        timings={timing.name: timing for timing in file.timings.get(name, ())},
    )
    return EvaluatedSet(
        name=name,
        samples=len(scorer.traced.labels),
        metrics=tuple(metric.name for metric in scorer.metrics),
        off_ramps=scorer.off_ramps(),
        full=scorer.point(FULL_DEPTH_NAME, FULL_DEPTH),
        thresholds=tuple(scorer.point(n, p) for n, p in policies.items() if not p.reads_certainty),
        certainties=tuple(scorer.point(n, p) for n, p in policies.items() if p.reads_certainty),
        statics=tuple(map(scorer.static_point, statics)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _SetScorer:
    """One traced set and what it is scored by."""

    traced: TracedSet
    shape: ModelShape
    metrics: tuple[NamedMetric, ...]
    timings: Mapping[str, Timing]
    """By contender; empty where nothing was measured."""

    def off_ramps(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(layer, score by each metric)."""
        trace, labels = self.traced.trace, self.traced.labels
        by_metric = [off_ramp_scores(trace, labels, metric.compute) for metric in self.metrics]
        return tuple(zip(trace.layers, zip(*by_metric, strict=True), strict=True))

    def point(self, name: str, policy: StoredPolicy) -> EvaluatedPoint:
        trace, labels = self.traced.trace, self.traced.labels
        found = score(trace, labels, policy)
        return EvaluatedPoint(
            name=name,
            scores=self._scores(predictions(trace, policy)),
            mean_exit_layer=found.mean_exit_layer,
            speed_up=found.speed_up,
            saving=found.saving,
            flop_saving=flop_saving(trace, policy, self.shape),
            exit_histogram=found.exit_histogram,
            alone=self._measured(name, "alone"),
            engine=self._measured(name, "engine"),
        )

    def static_point(self, static: StaticRecord) -> EvaluatedPoint:
        depth, num_layers = static.depth, self.shape.num_layers
        return EvaluatedPoint(
            name=static.name,
            scores=self._scores(self.traced.static_predictions[static.name]),
            mean_exit_layer=float(depth),
            speed_up=num_layers / depth,
            saving=1.0 - depth / num_layers,
            flop_saving=static_flop_saving(self.traced.trace, depth, self.shape),
            exit_histogram=(),
            alone=self._measured(static.name, "alone"),
            engine=self._measured(static.name, "engine"),
        )

    def _scores(self, found: Tensor) -> tuple[float, ...]:
        return tuple(metric.compute(self.traced.labels, found) for metric in self.metrics)

    def _measured(self, name: str, way: Literal["alone", "engine"]) -> Measured | None:
        if name not in self.timings or FULL_DEPTH_NAME not in self.timings:
            return None
        mine: Measure = getattr(self.timings[name], way)
        full: Measure = getattr(self.timings[FULL_DEPTH_NAME], way)
        return Measured(
            samples=mine.samples,
            rounds=self.timings[name].rounds,
            seconds=mine.seconds,
            saving=1.0 - mine.seconds / (mine.full_depth_seconds or full.seconds),
            expected_saving=1.0 - mine.mean_exit_layer / self.shape.num_layers,
            in_earlier_rounds=mine.full_depth_seconds is not None,
        )
