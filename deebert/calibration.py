"""From a trace on held-out labelled rows to an operating point.

Thin for now: one threshold for all layers, chosen by accuracy kept; of the entropy, or where the problem has
none, of the certainty. Knows nothing of how the trace was made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from deebert.evaluation import OperatingPointScore, Trace, score
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, LearningToExit, StoredPolicy


def choose_threshold(
    trace: Trace, labels: Tensor, *, keep_accuracy: float, steps: int = 140
) -> OperatingPointScore:
    """The largest saving whose accuracy is at least `keep_accuracy` × that of full depth.

    Args:
        trace: of rows that training has not seen, nor any test that will judge the choice.
        labels: N, in the form that the problem gives them.
        keep_accuracy: share of the full depth's accuracy to keep, e.g. 0.99.
        steps: how many thresholds are tried, between 0 and ln(labels), or between 0 and 1.

    Returns:
        The chosen point; full depth itself where no threshold keeps enough.
    """
    full = score(trace, labels, FULL_DEPTH)
    points = (score(trace, labels, policy) for policy in _candidates(trace, steps))
    kept = [p for p in points if p.accuracy >= keep_accuracy * full.accuracy]
    return max(kept, key=lambda p: p.saving, default=full)


def _candidates(trace: Trace, steps: int) -> Iterator[StoredPolicy]:
    outcomes = trace.problem.outcomes(trace.logits.shape[-1])
    if outcomes is not None:
        # Rounded down: ln(5) rounded up is a threshold above the largest entropy there is, which `check` refuses.
        grid = np.linspace(0.0, math.log(outcomes), steps + 1)[1:]
        yield from (EntropyThreshold(math.floor(t * 1e6) / 1e6) for t in grid)
    elif trace.certainties is not None:
        yield from (LearningToExit(round(t, 6)) for t in np.linspace(0.0, 1.0, steps + 1)[:-1].tolist())
