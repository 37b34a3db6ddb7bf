"""Other operating points of a run, read off a trace of its model.

Knows nothing of seconds, money or pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deebert.calibration import disagreement
from deebert.evaluation import Trace, flop_saving, predictions, score
from deebert.exit_policy import FULL_DEPTH, StoredPolicy, policy_from_dict
from deebert.problem import REGRESSION
from jobs.glue import find_task
from jobs.metrics import metrics_of
from jobs.traces import TraceFile, TraceOrigin, read_traces, traced_policies
from pipeline.errors import UsageError
from pipeline.records import Identity, RunRecord
from pipeline.report.outlook import TracedPoint, WhatIf


def read_what_if(
    path: str,
    record: RunRecord,
    *,
    thresholds: Sequence[float],
    certainty_thresholds: Sequence[float],
) -> WhatIf:
    """The trace at `path` at the run's operating point and at others.

    Args:
        path: Parquet file of `deebert evaluate --trace`.
        record: of the run whose model was traced.
        thresholds: of the entropy, to try; left out where answers have none.
        certainty_thresholds: to try where the model learns to exit.

    Raises:
        UsageError: there is no file, or the trace is of another model, of texts cut otherwise, or of several sets.
        PolicyError: a threshold that the model cannot have.
        DataError: the file is not a trace.
    """
    file = _read(path)
    _check(path, file, record.identity)
    (traced,) = file.sets.values()
    origin, trace, labels = file.origin, traced.trace, traced.labels
    own = policy_from_dict(record.identity.exit_policy)
    others = traced_policies(file, thresholds=thresholds, certainty_thresholds=certainty_thresholds)
    for policy in (own, *others.values()):
        policy.check(
            problem=trace.problem,
            num_labels=len(origin.labels),
            num_layers=trace.num_layers,
            learns_to_exit=trace.certainties is not None,
        )
    metric = metrics_of(find_task(origin.task) if origin.task else None, origin.labels, trace.problem)[0]

    def point(mark: str, policy: StoredPolicy) -> TracedPoint:
        other = None if trace.problem is REGRESSION else disagreement(trace, policy, confidence=0.95).share
        return TracedPoint(
            name=str(policy),
            mark=mark,
            score=metric.compute(labels, predictions(trace, policy)),
            other_answers=other,
            mean_exit_layer=score(trace, labels, policy).mean_exit_layer,
            flops_saved=flop_saving(trace, policy, origin.shape),
        )

    return WhatIf(
        texts=len(labels),
        precision=origin.precision,
        metric=metric.name,
        full=point("full depth", FULL_DEPTH),
        own=point("this run", own),
        others=tuple(point(mark, policy) for mark, policy in _unlike((FULL_DEPTH, own), others, trace)),
    )


def _unlike(
    known: Sequence[StoredPolicy], policies: Mapping[str, StoredPolicy], trace: Trace
) -> Iterator[tuple[str, StoredPolicy]]:
    """Those of `policies` that do otherwise than all before them, on the layers that have an off-ramp."""

    def rule(policy: StoredPolicy) -> tuple[object, ...]:
        exits = tuple(policy.at(layer) if policy.can_fire(layer) else None for layer in trace.layers[:-1])
        return ("never",) if all(at is None for at in exits) else (policy.name, *exits)

    seen = set(map(rule, known))
    for mark, policy in policies.items():
        if rule(policy) not in seen:
            seen.add(rule(policy))
            yield mark, policy


def _read(path: str) -> TraceFile:
    if not Path(path).is_file():
        raise UsageError(f"there is no trace file {path!r} here: make one with `deebert evaluate --trace`")
    return read_traces(Path(path))


def _check(path: str, file: TraceFile, identity: Identity) -> None:
    """A trace of something else would be silently wrong."""
    if len(file.sets) != 1:
        raise UsageError(
            f"the trace {path!r} holds {len(file.sets)} sets: trace one, with `evaluate --split`"
        )
    origin: TraceOrigin = file.origin
    for what, theirs, ours in (
        ("another model", origin.model_digest, identity.model_digest),
        ("texts cut to another length", origin.max_length, identity.max_length),
        ("texts in other windows", origin.window_stride, identity.window_stride),
    ):
        if theirs != ours:
            raise UsageError(
                f"the trace {path!r} is of {what} than the run ({str(theirs)[:12]}, not {str(ours)[:12]}): trace the "
                "run's model as the run was, with `deebert evaluate --trace`"
            )
