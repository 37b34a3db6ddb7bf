"""From a trace on held-out rows to an operating point: one threshold for all layers.

Four targets: a share of full depth's score to keep; a bound, with a confidence, on how often an answer is not full
depth's, or on how far accuracy drops; or a layer speed-up to reach. The threshold is of the entropy, or where the
problem has none, of the certainty. Knows nothing of how the trace was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta
from torch import Tensor

from deebert.errors import PolicyError
from deebert.evaluation import Metric, OperatingPointScore, Trace, predictions, score
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, ExitPolicy, LearningToExit, StoredPolicy
from deebert.problem import SINGLE_LABEL

_STEPS = 140


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """How often answers are not full depth's."""

    texts: int
    differing: int
    confidence: float
    bound: float
    """The share of all such texts is below it, with that confidence (Clopper and Pearson, 1934, one-sided)."""

    @property
    def share(self) -> float:
        """Of these texts."""
        return self.differing / self.texts


@dataclass(frozen=True, kw_only=True)
class Drop:
    """How far accuracy is below full depth's."""

    texts: int
    lost: int
    """Right at full depth, and wrong early."""
    won: int
    """Wrong at full depth, and right early."""
    confidence: float
    bound: float
    """Of all such texts, accuracy drops by less, with that confidence; two one-sided bounds after Clopper and Pearson,
    of what is lost and of what is won."""

    @property
    def share(self) -> float:
        """Of these texts; negative where more is won than lost."""
        return (self.lost - self.won) / self.texts


def choose_threshold(
    trace: Trace,
    labels: Tensor,
    *,
    keep_accuracy: float,
    metric: Metric | None = None,
    steps: int = _STEPS,
) -> OperatingPointScore:
    """The largest saving whose score is at least `keep_accuracy` × that of full depth.

    Args:
        trace: of rows that training has not seen, nor any test that will judge the choice.
        labels: N, in the form that the problem gives them.
        keep_accuracy: share of the full depth's score to keep, e.g. 0.99.
        metric: the task's score; accuracy where none is named.
        steps: how many thresholds are tried, between 0 and ln(labels), or between 0 and 1.

    Returns:
        The chosen point; full depth itself where no threshold keeps enough.

    Raises:
        PolicyError: full depth scores 0 or less, or no number.
    """
    full = score(trace, labels, FULL_DEPTH, metric)
    if keep_accuracy > 0 and not full.score > 0:
        raise PolicyError(
            "full depth scores 0 or less on these texts, of which no share can be kept: give texts with every "
            "label, or another target"
        )
    points = (score(trace, labels, policy, metric) for policy in _candidates(trace, steps))
    kept = [p for p in points if p.score >= keep_accuracy * full.score]
    return max(kept, key=lambda p: p.saving, default=full)


def choose_by_disagreement(
    trace: Trace, *, most: float, confidence: float, steps: int = _STEPS
) -> StoredPolicy:
    """The last of rising thresholds up to which the bound on disagreement with full depth stays below `most`.

    No labels are needed. Thresholds are tried in an order that was fixed before, up to the first that fails, so that
    the confidence is of the choice and not of one trial among many (fixed-sequence testing, as in Learn then Test,
    Angelopoulos et al., 2021).

    Args:
        trace: of texts like those that will be classified; training may not have seen them.
        most: share of texts whose answer may differ from full depth's.
        confidence: that the share stays below `most`, e.g. 0.95.
        steps: see `choose_threshold`.

    Raises:
        PolicyError: answers are numbers, which hardly ever are the same, or there are too few texts to show anything.
    """
    if trace.problem.outcomes(trace.logits.shape[-1]) is None:
        raise PolicyError(
            "a regression's answers are numbers, which never quite agree: calibrate by the score to keep"
        )
    return _last_within(
        trace,
        lambda policy: disagreement(trace, policy, confidence=confidence).bound,
        most=most,
        least_texts=fewest_texts(most, confidence),
        claim=f"less than {most:g} of all differ from full depth",
        steps=steps,
    )


def choose_by_drop(
    trace: Trace, labels: Tensor, *, most: float, confidence: float, steps: int = _STEPS
) -> StoredPolicy:
    """The last of rising thresholds up to which the bound on the drop in accuracy stays below `most`.

    Tried as in `choose_by_disagreement`; since right answers that early exits win count too, it may go further.

    Args:
        trace: of texts like those that will be classified; training may not have seen them.
        labels: (N,) ids.
        most: share of all texts by which accuracy may drop, e.g. 0.01 for one point of 100.
        confidence: that it drops by less than `most`, e.g. 0.95.
        steps: see `choose_threshold`.

    Raises:
        PolicyError: the model does not choose one label a text, or there are too few texts to show anything.
    """
    if trace.problem is not SINGLE_LABEL:
        raise PolicyError(
            "a drop in accuracy is of models that choose one label: calibrate by the score to keep"
        )
    return _last_within(
        trace,
        lambda policy: drop(trace, labels, policy, confidence=confidence).bound,
        most=most,
        least_texts=fewest_texts(most, (1 + confidence) / 2),
        claim=f"accuracy drops by less than {most:g}",
        steps=steps,
    )


def _last_within(
    trace: Trace,
    bound: Callable[[ExitPolicy], float],
    *,
    most: float,
    least_texts: int,
    claim: str,
    steps: int,
) -> StoredPolicy:
    """Fixed-sequence testing: the last policy before the first whose bound is above `most`."""
    chosen: StoredPolicy = FULL_DEPTH
    if bound(chosen) > most:
        raise PolicyError(
            f"{trace.num_texts} texts cannot show that {claim}: give at least "
            f"{least_texts}, or a larger share"
        )
    for policy in _candidates(trace, steps):
        if bound(policy) > most:
            break
        chosen = policy
    return chosen


def choose_by_speed_up(
    trace: Trace, labels: Tensor, *, speed_up: float, metric: Metric | None = None, steps: int = _STEPS
) -> OperatingPointScore:
    """The least saving that is a layer speed-up (depth over mean exit layer) of `speed_up` or more.

    Raises:
        PolicyError: no threshold reaches it.
    """
    points = [score(trace, labels, policy, metric) for policy in _candidates(trace, steps)]
    enough = [p for p in points if p.speed_up >= speed_up]
    if not enough:
        fastest = max((p.speed_up for p in points), default=1.0)
        raise PolicyError(
            f"no threshold makes the model {speed_up:g} times as fast: the most is {fastest:.2f} times"
        )
    return min(enough, key=lambda p: p.saving)


def disagreement(trace: Trace, policy: ExitPolicy, *, confidence: float) -> Disagreement:
    """How often `policy` answers otherwise than full depth; of many labels, any that differs counts."""
    early, full = predictions(trace, policy), trace.full_depth_predictions
    differing = int((early != full).reshape(len(full), -1).any(dim=1).sum())
    bound = _upper(differing, len(full), confidence)
    return Disagreement(texts=len(full), differing=differing, confidence=confidence, bound=bound)


def drop(trace: Trace, labels: Tensor, policy: ExitPolicy, *, confidence: float) -> Drop:
    """How many right answers `policy` loses and wins against full depth, of one label a text."""
    early, full = predictions(trace, policy) == labels, trace.full_depth_predictions == labels
    lost, won, texts = int((full & ~early).sum()), int((early & ~full).sum()), len(labels)
    # Each of the two bounds may fail half as often as both together.
    each = (1 + confidence) / 2
    bound = _upper(lost, texts, each) - _lower(won, texts, each)
    return Drop(texts=texts, lost=lost, won=won, confidence=confidence, bound=bound)


def fewest_texts(most: float, confidence: float) -> int:
    """Texts of which none may differ, so that less than the share `most` of all do, with that confidence."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-most))


def share_interval(found: int, trials: int, confidence: float) -> tuple[float, float]:
    """Between which the share of all lies, with that confidence (Clopper and Pearson, 1934, two-sided)."""
    each = (1 + confidence) / 2
    return _lower(found, trials, each), _upper(found, trials, each)


def _upper(found: int, trials: int, confidence: float) -> float:
    """The share is below it with that confidence (Clopper and Pearson, 1934, one-sided)."""
    return 1.0 if found == trials else float(beta.ppf(confidence, found + 1, trials - found))


def _lower(found: int, trials: int, confidence: float) -> float:
    """The share is above it with that confidence."""
    return 0.0 if found == 0 else float(beta.ppf(1 - confidence, found, trials - found + 1))


def _candidates(trace: Trace, steps: int) -> Iterator[StoredPolicy]:
    """From the one that lets fewest leave to the one that lets most."""
    outcomes = trace.problem.outcomes(trace.logits.shape[-1])
    if outcomes is not None:
        # Rounded down: ln(5) rounded up is a threshold above the largest entropy there is, which `check` refuses.
        grid = np.linspace(0.0, math.log(outcomes), steps + 1)[1:]
        yield from (EntropyThreshold(math.floor(t * 1e6) / 1e6) for t in grid)
    elif trace.certainties is not None:
        yield from (LearningToExit(round(t, 6)) for t in np.linspace(1.0, 0.0, steps + 1)[1:].tolist())
