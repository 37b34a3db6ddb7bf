"""Repetitions that take turns, and what is said of them: median and spread.

Contenders run one after another, round after round, so that a machine that slows down slows them all. Knows
nothing of what runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    least: float
    most: float
    spread: float
    """Interquartile range over the median: 0.02 means that the middle half lies within 2 %."""
    values: tuple[float, ...]
    """In the order measured."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value; the spread of a single one is 0."""
        middle = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0, 0, 0)
        return cls(
            median=middle,
            least=min(values),
            most=max(values),
            spread=(high - low) / middle if middle else 0.0,
            values=tuple(values),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, four significant digits."""
        return {
            name: [_rounded(v) for v in value] if isinstance(value, tuple) else _rounded(value)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Timed(Generic[T]):
    """One contender's repetitions."""

    seconds: Spread
    outcomes: tuple[T, ...]
    """What each repetition returned."""

    @property
    def outcome(self) -> T:
        """The last one."""
        return self.outcomes[-1]


def take_turns(
    contenders: Mapping[str, Callable[[], T]],
    *,
    repetitions: int,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    title: str = "bench",
) -> dict[str, Timed[T]]:
    """Time each contender `repetitions` times, in turn; progress on stderr.

    Args:
        contenders: by name; each call does the whole work once.
        repetitions: timed rounds.
        warm_up: rounds before them that are not counted.
        device: waited for before and after each call.
        title: of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    outcomes: dict[str, list[T]] = {name: [] for name in contenders}
    rounds = warm_up + repetitions
    with tqdm(total=rounds * len(contenders), desc=title, unit="run") as bar:
        for turn in range(rounds):
            for name, contender in contenders.items():
                bar.set_postfix_str(name)
                taken, outcome = _timed(contender, device)
                if turn >= warm_up:
                    seconds[name].append(taken)
                    outcomes[name].append(outcome)
                bar.update()
    return {
        name: Timed(seconds=Spread.of(values), outcomes=tuple(outcomes[name]))
        for name, values in seconds.items()
    }


def paired_ratios(over: Spread, under: Spread) -> Spread:
    """``over / under`` of each round: what both suffered in a round cancels out."""
    return Spread.of([a / b for a, b in zip(over.values, under.values, strict=True)])


def _timed(contender: Callable[[], T], device: torch.device | str) -> tuple[float, T]:
    wait_for(device)
    started = time.perf_counter()
    outcome = contender()
    wait_for(device)
    return time.perf_counter() - started, outcome


def wait_for(device: torch.device | str) -> None:
    """Return when the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
