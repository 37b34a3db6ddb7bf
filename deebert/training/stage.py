"""What every stage has: its number, its folder, its log, its clock. And what it leaves: a `StageReport`.

A stage whose losses or weights are no longer numbers is refused there. Knows nothing of models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deebert.errors import RecipeError
from deebert.training.config import Recipe
from deebert.training.log import Record, TrainingLog, read_log, seconds_of

_RECORDS_PER_STAGE = 100
_JUDGED = ("loss", "held_out_loss", "certainty_loss")


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What a stage took and reached."""

    number: int
    """1 to 3."""
    seconds: float
    """Over all attempts; without what a kill threw away."""
    steps: int
    loss: float
    """Mean over the last logged steps."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StageContext:
    """Where a stage stands."""

    number: int
    recipe: Recipe
    work_dir: Path
    log: TrainingLog
    """Writes in one process only."""
    log_path: Path
    resume: bool
    show_progress: bool
    _started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """Where the stage may keep checkpoints."""
        return self.work_dir / f"stage-{self.number}"

    def log_every(self, steps: int) -> int:
        """Steps between records of a stage of `steps`."""
        return max(1, steps // _RECORDS_PER_STAGE)

    def begin(self, step: int) -> Clock:
        """Go on after `step`: the log forgets what came later, the clock remembers what came before."""
        self.log.rewind(self.number, step)
        before = seconds_of(self._records(), self.number) if step else 0.0
        return Clock(before=before, started=self._started)

    def done(self, report: StageReport, weights: Iterable[Tensor]) -> StageReport:
        """Write the stage's last record.

        Raises:
            RecipeError: some of the `weights` that it ends with are not finite.
        """
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise self._diverged(report.steps, "its weights are not finite")
        self._append(done=True, step=report.steps, loss=report.loss, seconds=report.seconds)
        return report

    def finished(self) -> StageReport | None:
        """The report that an earlier attempt wrote, if it came to the end."""
        for record in self._records():
            if record["stage"] == self.number and record.get("done"):
                return StageReport(
                    number=self.number, seconds=record["seconds"], steps=record["step"], loss=record["loss"]
                )
        return None

    def last_loss(self) -> float:
        """Of the latest record of this stage; NaN where there is none."""
        losses = [r["loss"] for r in self._records() if r["stage"] == self.number and "loss" in r]
        return float(losses[-1]) if losses else float("nan")

    def write(self, **record: Any) -> None:
        """One record of this stage's progress, of all processes.

        Raises:
            RecipeError: a loss in it is not finite, and no later one would be.
        """
        for name in _JUDGED:
            if not math.isfinite(loss := record.get(name, 0.0)):
                raise self._diverged(record["step"], f"its {name.replace('_', ' ')} is {loss}")
        self._append(**record)

    def _append(self, **record: Any) -> None:
        self.log.append({"stage": self.number, **record})

    def _diverged(self, step: int, how: str) -> RecipeError:
        other = ", or bfloat16 or float32 instead of float16" if self.recipe.precision == "float16" else ""
        return RecipeError(
            f"stage {self.number} diverged, {how} at step {step}: begin again with a smaller learning rate{other}"
        )

    def _records(self) -> list[Record]:
        return read_log(self.log_path) if self.log_path.exists() else []


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds of a stage over all its attempts."""

    before: float
    started: float

    @property
    def seconds(self) -> float:
        """So far."""
        return round(self.before + time.monotonic() - self.started, 3)
