"""What a classification run is asked to do: one dataclass for Python, the command line and job files.

Each field is described once, by `flag`; `jobs.flags` turns the same fields into flags and YAML keys. Values
that depend on the machine or the model (``auto``) are settled by `pipeline.run`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError

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


def flag(
    help: str,  # argparse's own word
    *,
    default: Any = dataclasses.MISSING,
    parse: Callable[[str], Any] = str,
    metavar: str | None = None,
    several: bool = False,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag and a job-file key.

    Args:
        help: one line for ``--help``.
        default: value when neither flag nor file gives one; without it the flag is required. False makes a
            switch.
        parse: from text to the value; a ValueError's message is shown.
        metavar: placeholder in ``--help``.
        several: takes one or more values, as a tuple.
        choices: the only values allowed.
    """
    metadata = {"help": help, "parse": parse, "metavar": metavar, "several": several, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def comma_list(text: str) -> tuple[str, ...]:
    """``a,b`` -> ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


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


def integer(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number{_as_integer(text)}") from None


def _as_integer(text: str) -> str:
    """How to write what ``50,000`` and ``1e6`` mean."""
    try:
        value = float(text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else text)
    except ValueError:
        return ""
    return f": write {int(value)}" if value.is_integer() else ""


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number{_as_share(text)}") from None


def _as_share(text: str) -> str:
    """How to write what ``5%`` means."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        return ""
    return f": write {percent / 100:g} for {percent:g} %"


def positive(text: str) -> int:
    """A whole number above 0."""
    value = integer(text)
    if value < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return value


def whole(text: str) -> int:
    """A whole number from 0."""
    value = integer(text)
    if value < 0:
        raise ValueError(f"{text!r} is not a whole number from 0")
    return value


def random_seed(text: str) -> int:
    """A whole number that seeds every generator there is: numpy's take 32 bits."""
    value = whole(text)
    if value >= 2**32:
        raise ValueError(f"{text!r} is not a whole number below 2^32")
    return value


def positive_number(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{text!r} is not a share between 0 and 1")
    return value


def check_fields(job: Any) -> None:
    """Refuse values that no flag could have given, by the flags' own parsers: from Python, any value comes.

    Args:
        job: a dataclass whose fields were made by `flag`.

    Raises:
        UsageError: names the field.
    """
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if value is None and field.default is None:
            continue
        try:
            _check_value(field, value)
        except ValueError as error:
            raise UsageError(f"{field.name}: {error}") from error


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    parse, choices, several = (field.metadata[name] for name in ("parse", "choices", "several"))
    if field.default is False:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not a switch: give True or False")
    elif choices is not None:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    elif several or parse is comma_list:
        if not (isinstance(value, Sequence) and all(isinstance(item, str) for item in _listed(value))):
            raise ValueError(f"{value!r} is neither a str nor a tuple of them: give one of the two")
        if several and not value:
            raise ValueError(f"{value!r} is empty: give at least one")
    elif parse in (thresholds, certainties):
        values = value if isinstance(value, tuple) else (value,)
        if not values or not all(item is None or _is_number(item) for item in values):
            raise ValueError(
                f"{value!r} is neither a number nor a tuple of one for each layer: give one of the two"
            )
    elif parse is str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a str: give one")
    elif parse == Replicas.parse:
        if not isinstance(value, Replicas | int):
            raise ValueError(f"{value!r} is neither an int nor Replicas(MIN, MAX): give one of the two")
        parse(str(value))
    elif not _is_number(value):
        raise ValueError(f"{value!r} is neither an int nor a float: give one of the two")
    else:
        parse(str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """What `classify` takes. The docstrings of the fields are the flags' help.

    Raises:
        UsageError: a value that no flag could have given.
    """

    model: str = flag("folder or hub id of a DeeBERT model")
    input: str | Sequence[str] = flag(
        "files, folders, globs or URLs: Parquet, JSONL, CSV, text (gzip, zstd) by suffix; saved data sets",
        several=True,
        metavar="PATH",
    )
    output: str = flag("folder or URL for the parts; one folder belongs to one model and policy")
    text_column: str = flag("column to classify", default="text")
    text_pair_column: str | None = flag("second text of a pair", default=None)
    id_column: str | None = flag("column copied to row_id; else source_file:source_row", default=None)
    keep_columns: str | Sequence[str] = flag(
        "columns copied to the output", default=(), parse=comma_list, metavar="C,C"
    )
    entropy_threshold: Thresholds | None = flag(
        "nats below which a sample leaves: one, one per layer, or none for full depth; "
        "left out, the model's own operating point",
        default=None,
        parse=thresholds,
        metavar="S",
    )
    certainty_threshold: Thresholds | None = flag(
        "of a model that learns to exit: certainty, 0 to 1, above which a sample leaves: one, or one per layer",
        default=None,
        parse=certainties,
        metavar="C",
    )
    replicas: Replicas | int | None = flag(
        "N, MIN:MAX or auto; left out, auto: one per GPU that Ray has, else one per core",
        default=None,
        parse=Replicas.parse,
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
        return _listed(self.input)

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """`keep_columns`, of which one alone may be a str."""
        return _listed(self.keep_columns)

    @property
    def replica_range(self) -> Replicas | None:
        """`replicas`, of which a fixed number may be an int."""
        return Replicas(self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas
