"""What a classification run is asked to do: one dataclass for Python, the command line and job files.

Each field is described once, by `pipeline.fields.flag`; `jobs.flags` turns the same fields into flags and YAML
keys. Values that depend on the machine or the model (``auto``, or left out) are settled by `pipeline.planning`,
`pipeline.cluster` and `pipeline.engine`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.fields import (
    check_fields,
    check_names,
    check_some_names,
    comma_list,
    flag,
    is_number,
    listed,
    positive,
    positive_number,
    share,
    whole,
)

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "int8")
"""`deebert.precision.DTYPES`, known without torch."""
PRECISION_HELP = (
    "int8, on CPUs with VNNI, is the fastest and changes a few labels in a thousand: auto is int8 where the model was "
    "found to keep 99.5 % (`deebert evaluate --store-agreement`), else bfloat16 where the hardware multiplies it "
    "natively, else float32"
)
MICRO_BATCH_HELP = (
    "most tokens in a micro-batch; left out, as many as suit the model, the device and its memory"
)
WINDOW_STRIDE_HELP = (
    "do not cut longer texts but classify them in windows of --max-length, of which neighbours share so many "
    "tokens (0: none), and average the windows' probabilities"
)
Thresholds = float | tuple[float | None, ...]


def thresholds(text: str) -> Thresholds:
    """``0.2``, ``none`` (full depth), or one for each layer but the last: ``none,0.1,0.2``.

    One more in front is for an off-ramp on the embeddings (`pipeline.planning.resolve_policy`).
    """
    values = tuple(_number_or_none(part, "a number of nats") for part in comma_list(text))
    if not values:
        raise ValueError("give a number of nats, `none`, or a comma-separated list of them")
    # A single "none" means full depth whatever the model's stored operating point says: below 0 never fires.
    return (-1.0 if values[0] is None else values[0]) if len(values) == 1 else values


def certainties(text: str) -> Thresholds:
    """``0.9``, or one for each layer but the last: ``none,0.9,0.8``."""
    values = tuple(_number_or_none(part, "a certainty between 0 and 1") for part in comma_list(text))
    if not values:
        raise ValueError("give a certainty between 0 and 1, or a comma-separated list of them")
    # As with nats, a single "none" means full depth: no certainty is above 1.
    return (1.0 if values[0] is None else values[0]) if len(values) == 1 else values


def _number_or_none(text: str, what: str) -> float | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {what}") from None


@dataclass(frozen=True)
class Replicas:
    """How many replicas: a fixed number, or a range for Ray to scale in."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Replicas | None:
        """``2``, ``1:4`` or ``auto`` (None: by the machine)."""
        if text == "auto":
            return None
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        found = cls(int(match[1]), int(match[2] or match[1])) if match else None
        if found is None or not 1 <= found.least <= found.most:
            raise ValueError(f"{text!r} is not a number of replicas: write N, MIN:MAX or auto")
        return found

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}:{self.most}"


def _check_thresholds(value: Any) -> None:
    values = value if isinstance(value, tuple) else (value,)
    if not values or not all(item is None or is_number(item) for item in values):
        raise ValueError(
            f"{value!r} is neither a number nor a tuple of one for each layer: give one of the two"
        )


def _check_replicas(value: Any) -> None:
    if not isinstance(value, Replicas | int):
        raise ValueError(f"{value!r} is neither an int nor Replicas(MIN, MAX): give one of the two")
    Replicas.parse(str(value))


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """What `classify` takes. Each field's `flag` holds the flag's help.

    Raises:
        UsageError: a value that no flag could have given.
    """

    model: str = flag("folder or hub id of a DeeBERT model")
    input: str | Sequence[str] = flag(
        "files, folders, globs or URLs: Parquet, JSONL, CSV, text (gzip, zstd) by suffix; saved data sets",
        several=True,
        check=check_some_names,
        metavar="PATH",
    )
    output: str = flag("folder or URL for the parts; one folder belongs to one model and policy")
    text_column: str = flag("column to classify", default="text")
    text_pair_column: str | None = flag("second text of a pair", default=None)
    id_column: str | None = flag("column copied to row_id; else source_file:source_row", default=None)
    keep_columns: str | Sequence[str] = flag(
        "columns copied to the output", default=(), parse=comma_list, check=check_names, metavar="C,C"
    )
    entropy_threshold: Thresholds | None = flag(
        "nats below which a sample leaves: one, one per layer, or none for full depth; "
        "left out, the model's own operating point",
        default=None,
        parse=thresholds,
        check=_check_thresholds,
        metavar="S",
    )
    certainty_threshold: Thresholds | None = flag(
        "of a model that learns to exit: certainty, 0 to 1, above which a sample leaves: one, or one per layer",
        default=None,
        parse=certainties,
        check=_check_thresholds,
        metavar="C",
    )
    replicas: Replicas | int | None = flag(
        "N, MIN:MAX or auto; left out, auto: one per GPU that Ray has, else one per core",
        default=None,
        parse=Replicas.parse,
        check=_check_replicas,
        metavar="N|MIN:MAX",
    )
    device: str = flag(
        "auto is cuda where the cluster has GPUs now; say cuda to a cluster that has yet to scale up to them",
        default="auto",
        choices=("auto", "cpu", "cuda"),
    )
    threads: int | None = flag(
        "CPU threads per replica; left out, the cores are shared out", default=None, parse=positive
    )
    micro_batch_tokens: int | None = flag(MICRO_BATCH_HELP, default=None, parse=positive)
    max_length: int | None = flag(
        "tokens a text is cut to; left out, what the model was trained with", default=None, parse=positive
    )
    window_stride: int | None = flag(
        WINDOW_STRIDE_HELP,
        default=None,
        parse=whole,
        metavar="TOKENS",
    )
    precision: str = flag(
        PRECISION_HELP,
        default="auto",
        choices=PRECISIONS,
    )
    shard_rows: int | None = flag(
        "rows per shard: the unit of work, commit and retry; left out, 4,096, in a corpus of more than 67 million "
        "rows up to 65,536; CSV and compressed files are one shard each",
        default=None,
        parse=positive,
    )
    control: float = flag(
        "share of rows that also run at full depth, to measure the saving", default=0.0, parse=share
    )
    probabilities: bool = flag("also write every label's probability", default=False)
    max_bad_rows: int | None = flag(
        "fail when more rows than this cannot be classified; left out, 0.1 % of them, at least 100",
        default=None,
        parse=whole,
    )
    on_changed: str = flag(
        "what to do with an input file that changed since it was classified",
        default="refuse",
        choices=("refuse", "redo"),
    )
    overwrite: bool = flag(
        "start over on an output that holds another run or a finished one; the old parts go when the new are complete",
        default=False,
    )
    hang_seconds: float = flag(
        "what one read, micro-batch or commit may take before its replica is replaced",
        default=600.0,
        parse=positive_number,
        metavar="S",
    )
    ray_address: str | None = flag(
        "an existing Ray cluster; left out, RAY_ADDRESS, else a local Ray for this run", default=None
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def inputs(self) -> tuple[str, ...]:
        """`input`, of which one alone may be a str."""
        return listed(self.input)

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """`keep_columns`, of which one alone may be a str."""
        return listed(self.keep_columns)

    @property
    def replica_range(self) -> Replicas | None:
        """`replicas`, of which a fixed number may be an int."""
        return Replicas(self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas
