"""What the engine counts: samples, tokens, steps and seconds per layer.

Counters are plain sums, so that statistics of engines, shards and runs add up. Knows nothing of FLOPs or
money: `deebert.cost` turns counted work into cost.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Work done so far. Tuples have one entry per transformer layer, entry 0 is layer 1; `off_ramp_samples` has one
    more in front, for the embeddings."""

    steps: tuple[int, ...]
    """Micro-batches run through the layer."""
    samples: tuple[int, ...]
    """Samples run through the layer."""
    tokens: tuple[int, ...]
    """Tokens run through the layer."""
    squared_tokens: tuple[int, ...]
    """Σ (sequence length)² of the samples run through the layer: what attention costs."""
    off_ramp_samples: tuple[int, ...]
    """Samples for which the layer's off-ramp (layer n: the final classifier) was computed; entry i is layer i."""
    seconds: tuple[float, ...]
    """Seconds spent in the layer and its off-ramp, decision and regrouping included."""
    embedding_seconds: float
    """Seconds spent in the embeddings and their off-ramp."""

    @classmethod
    def zero(cls, num_layers: int) -> EngineStats:
        """No work yet, for a model of `num_layers` layers."""
        none = (0,) * num_layers
        return cls(
            steps=none,
            samples=none,
            tokens=none,
            squared_tokens=none,
            off_ramp_samples=(0, *none),
            seconds=(0.0,) * num_layers,
            embedding_seconds=0.0,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineStats:
        """The inverse of `to_dict`."""
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if len(made["off_ramp_samples"]) == len(made["steps"]):  # written before embeddings had off-ramps
            made["off_ramp_samples"] = (0, *made["off_ramp_samples"])
        return cls(**made)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __add__(self, other: EngineStats) -> EngineStats:
        return self._combine(other, 1)

    def __sub__(self, other: EngineStats) -> EngineStats:
        return self._combine(other, -1)

    def _combine(self, other: EngineStats, sign: int) -> EngineStats:
        values: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, tuple):
                values[field.name] = tuple(a + sign * b for a, b in zip(mine, theirs, strict=True))
            else:
                values[field.name] = mine + sign * theirs
        return EngineStats(**values)

    @property
    def total_seconds(self) -> float:
        """Seconds of compute, embeddings included."""
        return sum(self.seconds) + self.embedding_seconds

    @property
    def layer_tokens(self) -> int:
        """Σ over layers of tokens run: the unit in which early exit saves."""
        return sum(self.tokens)


class StatsCounter:
    """The mutable counter behind `EngineStats`; one per engine, touched once per step."""

    def __init__(self, num_layers: int) -> None:
        # Lists: an array takes ten times as long to change one number of.
        self._steps, self._samples, self._tokens, self._squared_tokens = ([0] * num_layers for _ in range(4))
        self._off_ramp_samples = [0] * (num_layers + 1)
        self._seconds = [0.0] * num_layers
        self._embedding_seconds = 0.0

    def count_layers(
        self, first: int, last: int, *, samples: int, tokens: int, squared_tokens: int, seconds: float
    ) -> None:
        """One micro-batch ran through layers `first`..`last` (0-based, inclusive) in `seconds` altogether.

        Through -1..-1: through the off-ramp on the embeddings alone.
        """
        self._off_ramp_samples[last + 1] += samples
        self.count_seconds(first, last, seconds)
        for layer in range(max(first, 0), last + 1):
            self._steps[layer] += 1
            self._samples[layer] += samples
            self._tokens[layer] += tokens
            self._squared_tokens[layer] += squared_tokens

    def count_seconds(self, first: int, last: int, seconds: float) -> None:
        """More seconds in layers `first`..`last`; see `count_layers`."""
        if last < 0:
            self._embedding_seconds += seconds
            return
        for layer in range(first, last + 1):
            self._seconds[layer] += seconds / (last + 1 - first)

    def count_embedding(self, seconds: float) -> None:
        """The embeddings of one micro-batch took `seconds`."""
        self._embedding_seconds += seconds

    def snapshot(self) -> EngineStats:
        """The counts so far, immutable."""
        return EngineStats(
            steps=tuple(self._steps),
            samples=tuple(self._samples),
            tokens=tuple(self._tokens),
            squared_tokens=tuple(self._squared_tokens),
            off_ramp_samples=tuple(self._off_ramp_samples),
            seconds=tuple(self._seconds),
            embedding_seconds=self._embedding_seconds,
        )
