"""The training log: one JSON object a line, readable while the training runs, without gaps or repeats after a kill.

Records of progress have ``stage``, ``step``, ``epoch``, ``loss`` (what is minimised), ``losses`` (against the labels
alone, by layer of each classifier that trains: `Problem.losses`, a mean since the record before), ``learning_rate`` and
``seconds`` of the stage so far; of a fast stage 2 with a learning-to-exit head also ``certainty_loss``, the head's,
summed over classifiers. Records of an evaluation have ``held_out_loss`` and ``held_out_losses``, the same of held-out
rows, instead of these; the last record of a stage has ``done``. Knows nothing of what is trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingLog:
    """The log file; where `path` is None, as in all processes but one, nothing is written."""

    path: Path | None

    def append(self, record: Record) -> None:
        """Write one record."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, stage: int, step: int) -> None:
        """Forget what came after `step` of `stage`: it will be done again."""
        self._keep(
            lambda r: r["stage"] < stage or (r["stage"] == stage and r["step"] <= step and "done" not in r)
        )

    def _keep(self, wanted: Callable[[Record], bool]) -> None:
        if self.path is None or not self.path.exists():
            return
        kept = [record for record in read_log(self.path) if wanted(record)]
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        unfinished.replace(self.path)


def read_log(path: Path) -> list[Record]:
    """All whole records; a line that a kill cut short is not one."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def seconds_of(records: list[Record], stage: int) -> float:
    """Seconds that `stage` has taken so far, over all attempts."""
    return max((float(r["seconds"]) for r in records if r["stage"] == stage and "seconds" in r), default=0.0)
