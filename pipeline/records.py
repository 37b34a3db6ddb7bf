"""What a run remembers: one record per committed shard, one per run.

Plain frozen dataclasses that turn into JSON and back. Knows nothing of where they are stored
(`pipeline.sink`, `pipeline.run`) or how they are shown (`pipeline.report`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.engine.stats import EngineStats

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
"""Of version 1, exit-layer histograms have no entry for the embeddings."""
RunStatus = Literal["running", "succeeded", "failed", "interrupted"]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes two runs the same run: an output folder belongs to one identity."""

    model_digest: str
    """SHA-256 of the model's weights and architecture."""
    exit_policy: dict[str, Any]
    """The policy as its JSON form, e.g. ``{"type": "entropy", "thresholds": [0.2, ...]}``."""
    tokenizer_digest: str
    """SHA-256 of the tokenizer."""
    text_columns: tuple[str, ...]
    """One column, or two for pairs."""
    max_length: int
    """Tokens a sequence is truncated to."""
    precision: str
    """``float32``, ``bfloat16``, ``float16`` or ``int8``."""
    window_stride: int | None = None
    """Tokens that neighbouring windows of a longer text share; None: it is truncated."""
    digest: str
    """SHA-256 over all of the above."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model as reports need it."""

    path: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    labels: tuple[str, ...]
    off_ramp_layers: tuple[int, ...]
    """1-based layers that carry an off-ramp; 0 is the embeddings."""
    off_ramp_pooling: str
    problem_type: str = "single_label_classification"
    """Hugging Face's; records from before there were several do not say."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over committed shards. Tuples have n + 1 entries: entry i is exit layer i, entry 0 the embeddings."""

    shards: int
    rows: int
    """Rows written to parts."""
    bad_rows: int
    """Rows written to the dead letters."""
    truncated_rows: int
    tokens: int
    """Tokens of all written rows, special tokens included; of all their windows, where there are several."""
    squared_tokens: int
    """Σ (sequence length)² over written rows, or over their windows."""
    exit_rows: tuple[int, ...]
    """The exit-layer histogram; a row in windows counts with the deepest of them."""
    exit_windows: tuple[int, ...]
    """The exit-layer histogram of what was run: of rows, each window of a longer text by itself."""
    exit_tokens: tuple[int, ...]
    """Tokens of the rows that left after each layer."""
    compute: EngineStats
    """The exit lane's work."""
    control: EngineStats
    """The audit lane's work: the control sample run at full depth."""
    audited_rows: int
    """Rows that also ran at full depth."""
    audit_agreements: int
    """Audited rows whose full-depth answer (label, labels or number) equals the one they left with."""
    read_seconds: float
    """Reading and decoding input, summed over shards (overlaps compute)."""
    tokenize_seconds: float
    write_seconds: float
    audit_distance: float = 0.0
    """Of a regression: Σ |number - full depth's| over audited rows."""
    hardware: Mapping[str, int] = field(default_factory=dict)
    """Rows by the name of the processor or GPU that ran the model; what was recorded before lacks it."""

    @classmethod
    def zero(cls, num_layers: int) -> Totals:
        """No shard committed yet."""
        none = EngineStats.zero(num_layers)
        return cls(
            shards=0,
            rows=0,
            bad_rows=0,
            truncated_rows=0,
            tokens=0,
            squared_tokens=0,
            exit_rows=(0,) * (num_layers + 1),
            exit_windows=(0,) * (num_layers + 1),
            exit_tokens=(0,) * (num_layers + 1),
            compute=none,
            control=none,
            audited_rows=0,
            audit_agreements=0,
            read_seconds=0.0,
            tokenize_seconds=0.0,
            write_seconds=0.0,
        )

    def __add__(self, other: Totals) -> Totals:
        return self.plus([other])

    def plus(self, others: Iterable[Totals]) -> Totals:
        """The sum with all of `others`, each field summed over all at once: there may be very many."""
        total: Totals = _sum([self, *others])
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Totals:
        """The inverse of `to_dict`, also of what was recorded before there were windows: each row was one."""
        values = {"exit_windows": values["exit_rows"], **values}
        made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name in ("exit_rows", "exit_windows", "exit_tokens"):
            if len(made[name]) == len(values["compute"]["steps"]):  # before anyone left after the embeddings
                made[name] = (0, *made[name])
        made["compute"] = EngineStats.from_dict(values["compute"])
        made["control"] = EngineStats.from_dict(values["control"])
        return cls(**made)


def _sum(each: Sequence[Any]) -> Any:
    """Of numbers, of tuples and mappings of them entry by entry, of records of these field by field."""
    first = each[0]
    if isinstance(first, tuple):
        return tuple(map(sum, zip(*each, strict=True)))
    if isinstance(first, Mapping):
        counts = Counter[str]()
        for one in each:
            counts.update(one)
        return dict(+counts)
    if isinstance(first, Totals | EngineStats):
        names = [field.name for field in dataclasses.fields(first)]
        return replace(first, **{name: _sum([getattr(one, name) for one in each]) for name in names})
    return sum(each)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What the commit of one shard recorded; it also stands in the part's footer."""

    part: str
    """File name of the part."""
    source_file: str
    first_row: int
    """Index of the shard's first row in its source file, 0-based."""
    replica: str
    """Which replica ran it (host and process id)."""
    finished_at: str
    """ISO 8601, UTC."""
    totals: Totals

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShardRecord:
        """The inverse of `to_dict`."""
        return cls(**{**values, "totals": Totals.from_dict(values["totals"])})


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One invocation of the driver on an output folder."""

    started_at: str
    ended_at: str | None
    status: RunStatus
    host: str
    pid: int
    replicas: str
    """As asked for, but no more than there were shards: ``2`` or ``1:4``."""
    device: str
    """``cpu`` or ``cuda``; which processor or GPU that is, `Totals.hardware` says."""
    threads_per_replica: int
    wall_seconds: float
    committed_shards: int
    """Shards that this attempt committed."""
    committed_rows: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """``_deebert/run.json``."""

    status: RunStatus
    software_version: str
    identity: Identity
    model: ModelRecord
    inputs: tuple[str, ...]
    planned_shards: int
    planned_files: int
    other_shards: int = 0
    """Committed shards, among those of `totals`, of inputs that this command did not name."""
    shard_rows: int
    """The planner's shard size: a folder is planned with one size for ever."""
    columns: tuple[str, ...]
    """Name and Arrow type of each output column: a folder is one table."""
    id_column: str | None = None
    """The input column that ``row_id`` holds; "" where it is path and row number, None where an earlier version has
    not recorded it."""
    totals: Totals
    attempts: tuple[Attempt, ...]
    format_version: int = field(default=FORMAT_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunRecord:
        """The inverse of `to_dict`."""
        identity = {**values["identity"], "text_columns": tuple(values["identity"]["text_columns"])}
        model: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()
        }
        return cls(
            **{
                **values,
                "identity": Identity(**identity),
                "model": ModelRecord(**model),
                "inputs": tuple(values["inputs"]),
                "columns": tuple(values["columns"]),
                "totals": Totals.from_dict(values["totals"]),
                "attempts": tuple(Attempt(**a) for a in values["attempts"]),
            }
        )
