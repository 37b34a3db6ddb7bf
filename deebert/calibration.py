"""From a trace on held-out labelled rows to an operating point.

Thin for now: one entropy threshold for all layers, chosen by accuracy kept. Knows nothing of how the trace
was made.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from deebert.evaluation import OperatingPointScore, Trace, score
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold


def choose_threshold(
    trace: Trace, labels: Tensor, *, keep_accuracy: float, steps: int = 140
) -> OperatingPointScore:
    """The largest saving whose accuracy is at least `keep_accuracy` × that of full depth.

    Args:
        trace: of rows that training has not seen, nor any test that will judge the choice.
        labels: (N,) int64.
        keep_accuracy: share of the full depth's accuracy to keep, e.g. 0.99.
        steps: how many thresholds between 0 and ln(labels) are tried.

    Returns:
        The chosen point; full depth itself where no threshold keeps enough.
    """
    full = score(trace, labels, FULL_DEPTH)
    grid = np.linspace(0.0, math.log(trace.logits.shape[-1]), steps + 1)[1:]
    # Rounded down: ln(5) rounded up is a threshold above the largest entropy there is, which `check` refuses.
    points = (score(trace, labels, EntropyThreshold(math.floor(t * 1e6) / 1e6)) for t in grid)
    kept = [p for p in points if p.accuracy >= keep_accuracy * full.accuracy]
    return max(kept, key=lambda p: p.saving, default=full)
