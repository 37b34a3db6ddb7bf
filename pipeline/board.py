"""What the replicas of a run tell each other and the driver: a Ray actor of its own, so that it outlives them.

Progress is for display and counts retries twice. Attempts are how a shard that kills its replica is found: the
replica that dies cannot say so, but it said that it began. Knows nothing of files or models.
"""

from __future__ import annotations

from collections import Counter


class Board:
    """The actor's class."""

    def __init__(self) -> None:
        self._rows = 0
        self._exit_layers = 0
        self._attempts: Counter[str] = Counter()

    def add(self, rows: int, exit_layers: int) -> None:
        """`rows` more have their answers; `exit_layers` is the sum of their exit layers."""
        self._rows += rows
        self._exit_layers += exit_layers

    def total(self) -> tuple[int, int]:
        """Rows and Σ exit layers so far."""
        return self._rows, self._exit_layers

    def begin(self, part: str) -> None:
        """A replica begins to work on the shard of `part`."""
        self._attempts[part] += 1

    def attempts(self, part: str) -> int:
        """How often a replica has begun with the shard of `part`."""
        return self._attempts[part]
