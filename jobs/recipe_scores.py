"""What each training recipe reached: a trained model's scores, and tables of many over several seeds.

A model is judged twice: along the whole curve of thresholds on the rows to judge by, and at thresholds chosen on
held-out training rows, as a user would choose them. Knows nothing of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from deebert.evaluation import LabelledSequences, Metric, OperatingPointScore, Trace, off_ramp_scores, sweep
from jobs.rival_policies import POLICIES, points
from pipeline.report.evaluated import to_markdown
from pipeline.report.ledger import Table

_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class ModelScore:
    """What one trained model reached."""

    full: float
    """At full depth."""
    off_ramps: tuple[float, ...] = ()
    """Each alone, shallowest first, the final classifier last."""
    points: tuple[tuple[float, float], ...] = ()
    """(layer speed-up, score) of rising thresholds, full depth first."""
    chosen: Mapping[str, tuple[float, float]] | None = None
    """By the layer speed-up that a threshold reached on held-out rows: its own (layer speed-up, score) here."""
    by_policy: Mapping[str, Mapping[str, float | None]] | None = None
    """Scores of other exit policies, by name and layer speed-up; None beyond the last that a policy reaches."""
    depth_speed_up: float = 1.0
    """Layer speed-up of `full`: more than 1 for a static baseline."""
    seconds: float = 0.0
    """Of training, without what it builds on."""
    total_seconds: float = 0.0
    """With it."""

    def at(self, speed_up: float) -> float | None:
        """Score at a layer speed-up, between the two operating points around it; None beyond the last."""
        return score_at(self.points, speed_up)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ModelScore:
        """From its JSON form."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def judge(
    judged: tuple[Trace, LabelledSequences],
    held_out: tuple[Trace, LabelledSequences],
    speed_ups: Sequence[float],
    metric: Metric,
    policies: Sequence[str] = (),
) -> ModelScore:
    """Score a model by its traces.

    Args:
        judged: trace and labels of the rows to judge by.
        held_out: of training rows that no stage has seen; thresholds are chosen on them.
        speed_ups: layer speed-ups to choose thresholds for.
        metric: the task's score.
        policies: exit policies of `jobs.rival_policies` to judge too.
    """
    (trace, data), (their_trace, their_data) = judged, held_out
    most = math.log(trace.logits.shape[-1])
    thresholds = (None, *np.linspace(0, most, _STEPS + 1)[1:].tolist())
    here = sweep(trace, data.labels, thresholds, metric)
    there = sweep(their_trace, their_data.labels, thresholds, metric)
    return ModelScore(
        full=here[0].score,
        off_ramps=tuple(off_ramp_scores(trace, data.labels, metric)),
        points=tuple((p.speed_up, p.score) for p in here),
        chosen={f"{s:g}": _chosen(s, here, there) for s in speed_ups},
        by_policy={name: _by_policy(name, trace, data, speed_ups, metric) for name in policies},
    )


def _by_policy(
    name: str, trace: Trace, data: LabelledSequences, speed_ups: Sequence[float], metric: Metric
) -> dict[str, float | None]:
    found = points(trace, data.labels, POLICIES[name], metric)
    return {f"{s:g}": score_at(found, s) for s in speed_ups}


def _chosen(
    speed_up: float, here: Sequence[OperatingPointScore], there: Sequence[OperatingPointScore]
) -> tuple[float, float]:
    """What the least threshold that reaches a speed-up there does here; the largest, where none does."""
    place = next((i for i, point in enumerate(there) if point.speed_up >= speed_up), len(there) - 1)
    return here[place].speed_up, here[place].score


def score_at(points: Sequence[Sequence[float]], speed_up: float) -> float | None:
    """See `ModelScore.at`.

    Args:
        points: (layer speed-up, score) of rising thresholds.
        speed_up: where to read.
    """
    speeds, scores = zip(*points, strict=True)
    if speed_up > speeds[-1]:
        return None
    return float(np.interp(speed_up, speeds, scores))


def tables(results: Mapping[str, Sequence[ModelScore]], speed_ups: Sequence[float], base: str) -> str:
    """Markdown: scores, and what thresholds chosen on held-out rows give; medians over seeds.

    Args:
        results: by variant, one score a seed.
        speed_ups: layer speed-ups to compare at.
        base: the variant whose full depth is 100 %.
    """
    whole = median(score.full for score in results[base])
    seeds = max(map(len, results.values()))
    of_seeds = f"the median of {seeds} seeds" if seeds > 1 else "one seed"
    curve = Table(
        title="Score at equal layer speed-up",
        columns=(
            "variant",
            "full depth",
            *(f"{s:g}×" for s in speed_ups),
            "seconds",
            "with what it builds on",
        ),
        rows=tuple((name, *_curve_cells(scores, speed_ups, whole)) for name, scores in results.items()),
        note=f"{of_seeds}; in brackets, % of {100 * whole:.2f}, the full depth of {base}. One threshold for all "
        "layers; between two, the straight line.",
    )
    chosen = Table(
        title="Thresholds chosen on held-out training rows",
        columns=("variant", *(f"chosen for {s:g}×" for s in speed_ups)),
        rows=tuple((name, *_chosen_cells(s, speed_ups)) for name, s in results.items() if s[0].chosen),
        note=f"Score at the layer speed-up that it comes with; {of_seeds}.",
    )
    policies = Table(
        title="Exit policies",
        columns=("variant", "policy", *(f"{s:g}×" for s in speed_ups)),
        rows=tuple(
            (variant, name, *_policy_cells(scores, name, speed_ups))
            for variant, scores in results.items()
            for name in _policies_of(scores)
        ),
        note=f"Score at equal layer speed-up; {of_seeds}; their thresholds are swept as finely as they have steps.",
    )
    every = (curve, chosen, policies)
    return "\n\n".join(f"{t.title}\n\n{to_markdown(t)}\n\n{t.note}" for t in every if t.rows)


def _policies_of(scores: Sequence[ModelScore]) -> Sequence[str]:
    """Those that every seed was judged by."""
    first, *others = (score.by_policy or {} for score in scores)
    return [name for name in first if all(name in other for other in others)]


def _policy_cells(scores: Sequence[ModelScore], name: str, speed_ups: Sequence[float]) -> list[str]:
    return [
        _percent([(s.by_policy or {})[name][f"{speed_up:g}"] for s in scores], 0) for speed_up in speed_ups
    ]


def _curve_cells(scores: Sequence[ModelScore], speed_ups: Sequence[float], whole: float) -> tuple[str, ...]:
    if not scores[0].points:  # a static baseline has one speed-up
        cells = [
            _percent([s.full for s in scores], whole) if math.isclose(s_up, scores[0].depth_speed_up) else "–"
            for s_up in (1.0, *speed_ups)
        ]
    else:
        cells = [_percent([s.full for s in scores], whole)]
        cells += [_percent([s.at(speed_up) for s in scores], whole) for speed_up in speed_ups]
    seconds = (median(s.seconds for s in scores), median(s.total_seconds for s in scores))
    return (*cells, *(f"{one:.0f}" for one in seconds))


def _chosen_cells(scores: Sequence[ModelScore], speed_ups: Sequence[float]) -> tuple[str, ...]:
    cells = []
    for speed_up in speed_ups:
        points = [(s.chosen or {})[f"{speed_up:g}"] for s in scores]
        cells.append(
            f"{100 * median(score for _, score in points):.2f} at {median(speed for speed, _ in points):.2f}×"
        )
    return tuple(cells)


def _percent(scores: Sequence[float | None], whole: float) -> str:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return "–"
    kept = f" ({100 * median(known) / whole:.1f})" if whole else ""
    return f"{100 * median(known):.2f}{kept}"
