"""Other operating points of a run, read off a trace of its model.

Knows nothing of seconds, money or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deebert.calibration import disagreement
from deebert.evaluation import flop_saving, predictions, score
from deebert.exit_policy import FULL_DEPTH, StoredPolicy, policy_from_dict
from deebert.problem import REGRESSION, problem_of
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
        UsageError: the trace is of another model, of texts cut otherwise, or of several sets.
        DataError: the file is not a trace.
    """
    file = read_traces(Path(path))
    _check(path, file, record.identity)
    (traced,) = file.sets.values()
    policies = traced_policies(file, thresholds=thresholds, certainty_thresholds=certainty_thresholds)
    origin, trace, labels = file.origin, traced.trace, traced.labels
    problem = problem_of(origin.problem_type)
    task = find_task(origin.task) if origin.task else None
    metric = metrics_of(task, origin.labels, problem)[0]

    def point(mark: str, policy: StoredPolicy) -> TracedPoint:
        other = None if problem is REGRESSION else disagreement(trace, policy, confidence=0.95).share
        return TracedPoint(
            name=str(policy),
            mark=mark,
            score=metric.compute(labels, predictions(trace, policy)),
            other_answers=other,
            mean_exit_layer=score(trace, labels, policy).mean_exit_layer,
            flops_saved=flop_saving(trace, policy, origin.shape),
        )

    own = policy_from_dict(record.identity.exit_policy)
    return WhatIf(
        texts=len(labels),
        metric=metric.name,
        full=point("full depth", FULL_DEPTH),
        own=point("this run", own),
        others=tuple(point(mark, policy) for mark, policy in policies.items() if policy != own),
    )


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
