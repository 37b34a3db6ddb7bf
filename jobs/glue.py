"""The GLUE tasks: files, columns, label names, metric.

Facts of the benchmark (Wang et al., 2018) and of its two forms, the TSV folders and the hub's data set, which
name columns differently and number MNLI's labels differently. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from deebert.errors import DataError
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a form of the data keeps text and label."""

    text: str
    pair: str | None = None
    label: str

    def all(self) -> tuple[str, ...]:
        """Those there are."""
        return tuple(filter(None, (self.text, self.pair, self.label)))


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task of GLUE."""

    name: str
    """As `--task` takes it."""
    folder: str
    """In GLUE's TSV form."""
    configuration: str
    """Of the hub's data set."""
    columns: tuple[Columns, ...]
    """TSV form first, then the hub's where it differs."""
    labels: tuple[str, ...]
    """Names in the order that models are trained with; none of a regression."""
    values: dict[str, str] = field(default_factory=dict)
    """What the TSVs write instead of names."""
    positive: str | None = None
    """The label whose F1 is the score; None where accuracy is."""
    evaluation_sets: tuple[str, ...] = ("",)
    """Suffixes of the development sets: MNLI has two."""
    has_fixed_order: bool = True
    """Whether a label's number means the same everywhere: MNLI's does not."""
    problem_type: str = "single_label_classification"
    """Hugging Face's."""

    def dev_splits(self, stem: str) -> tuple[str, ...]:
        """Names of the development sets: (``dev``,), or (``dev_matched``, ``dev_mismatched``)."""
        return tuple(f"{stem}_{suffix}" if suffix else stem for suffix in self.evaluation_sets)


_BINARY = {"0": 0, "1": 1}


def _numbered(labels: tuple[str, ...]) -> dict[str, str]:
    return {value: labels[i] for value, i in _BINARY.items()}


_SENTIMENT = ("negative", "positive")
_EQUIVALENT = ("not_equivalent", "equivalent")
_DUPLICATE = ("not_duplicate", "duplicate")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS = (
    GlueTask(
        name="sst-2",
        folder="SST-2",
        configuration="sst2",
        columns=(Columns(text="sentence", label="label"),),
        labels=_SENTIMENT,
        values=_numbered(_SENTIMENT),
    ),
    GlueTask(
        name="mrpc",
        folder="MRPC",
        configuration="mrpc",
        columns=(
            Columns(text="#1 String", pair="#2 String", label="Quality"),
            Columns(text="sentence1", pair="sentence2", label="label"),
        ),
        labels=_EQUIVALENT,
        values=_numbered(_EQUIVALENT),
        positive="equivalent",
    ),
    GlueTask(
        name="qnli",
        folder="QNLI",
        configuration="qnli",
        columns=(Columns(text="question", pair="sentence", label="label"),),
        labels=_ENTAILMENT,
    ),
    GlueTask(
        name="rte",
        folder="RTE",
        configuration="rte",
        columns=(Columns(text="sentence1", pair="sentence2", label="label"),),
        labels=_ENTAILMENT,
    ),
    GlueTask(
        name="qqp",
        folder="QQP",
        configuration="qqp",
        columns=(
            Columns(text="question1", pair="question2", label="is_duplicate"),
            Columns(text="question1", pair="question2", label="label"),
        ),
        labels=_DUPLICATE,
        values=_numbered(_DUPLICATE),
        positive="duplicate",
    ),
    GlueTask(
        name="mnli",
        folder="MNLI",
        configuration="mnli",
        columns=(
            Columns(text="sentence1", pair="sentence2", label="gold_label"),
            Columns(text="premise", pair="hypothesis", label="label"),
        ),
        labels=("contradiction", "entailment", "neutral"),
        evaluation_sets=("matched", "mismatched"),
        has_fixed_order=False,
    ),
    GlueTask(
        name="sts-b",
        folder="STS-B",
        configuration="stsb",
        columns=(
            Columns(text="sentence1", pair="sentence2", label="score"),
            Columns(text="sentence1", pair="sentence2", label="label"),
        ),
        labels=(),
        problem_type="regression",
    ),
)
TASK_NAMES = tuple(task.name for task in TASKS)


def find_task(name: str) -> GlueTask:
    """The task of this name; case and hyphens do not matter.

    Raises:
        UsageError: there is none.
    """
    plain = name.lower().replace("-", "")
    for task in TASKS:
        if task.configuration == plain:
            return task
    raise UsageError(f"unknown GLUE task {name!r}: choose one of {', '.join(TASK_NAMES)}")


def task_of_hub_id(source: str) -> GlueTask | None:
    """The task of ``nyu-mll/glue:sst2`` and its like; None for other data."""
    name, _, configuration = source.partition(":")
    if name.split("/")[-1].lower() != "glue" or not configuration:
        return None
    return next((task for task in TASKS if task.configuration == configuration.lower()), None)


def tsv_path(glue_dir: str, task: GlueTask, split: str) -> Path:
    """The file of a split, in GLUE's folder or in the task's own.

    Raises:
        DataError: it is not there.
    """
    folder = Path(glue_dir)
    inner = folder / task.folder
    path = (inner if inner.is_dir() else folder) / f"{split}.tsv"
    if not path.is_file():
        raise DataError(
            f"no {split}.tsv of {task.name} in {glue_dir!r}: give the folder that holds {task.folder}/{split}.tsv"
        )
    return path
