"""Labelled data for training and evaluation: files, data sets, GLUE's folders, the hub.

Turns any of them into texts with label ids, sets of them, or numbers, and those into packed samples. Knows
nothing of models beyond their label names and what they are asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deebert.errors import DataError
from deebert.evaluation import LabelledSequences
from deebert.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Problem, problem_of
from jobs.glue import Columns, GlueTask, find_task, task_of_hub_id, tsv_path
from jobs.label_ids import class_of, found_problem, label_places, labels_of, number_of
from jobs.labelled_rows import LabelledRows, read_rows
from pipeline.errors import UsageError
from pipeline.tokenization import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts (or pairs) and their labels, in memory."""

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[Any, ...]
    """Ids into `names`; tuples of such ids in multi-label data; numbers in a regression."""
    names: tuple[str, ...]
    """Label names, in the order of their ids."""
    problem: Problem = SINGLE_LABEL

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> LabelledTexts:
        """These rows, in this order."""
        pairs = None if self.pairs is None else tuple(self.pairs[i] for i in rows)
        texts, labels = (tuple(column[i] for i in rows) for column in (self.texts, self.labels))
        return replace(self, texts=texts, pairs=pairs, labels=labels)

    def tokenized(self, tokenizer: TextTokenizer) -> LabelledSequences:
        """The same as packed tokens."""
        batch = tokenizer(self.texts, self.pairs)
        return LabelledSequences(
            tokens=batch.tokens,
            labels=self.problem.label_tensor(self.labels, len(self.names)),
            windows=None if tokenizer.window_stride is None else batch.windows,
        )


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """Where labelled texts are: what the flags of a command say of them."""

    data: str | None
    """A file, a folder or a hub id."""
    glue_dir: str | None = None
    """Or GLUE's TSV folders."""
    task: str | None = None
    """A GLUE task; found in the hub id where that names one."""
    columns: Columns
    """Of data that belongs to no task."""
    split: str | None = None
    """Left out, the split that the purpose asks for."""
    problem: Problem | None = None
    """What the labels are of; left out, the task's problem, or multi-label where rows have lists of labels."""
    label_separator: str = ","
    """Between the labels of one row of multi-label data in a text file."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.glue_dir is None):
            raise UsageError("give the labelled texts as --data, or as --glue-dir with --task")
        if self.glue_dir is not None and self.task is None:
            raise UsageError("--glue-dir holds several tasks: say which with --task")

    @property
    def glue_task(self) -> GlueTask | None:
        """The task, where there is one."""
        if self.task is not None:
            return find_task(self.task)
        return task_of_hub_id(self.data or "")

    def training_texts(self, names: tuple[str, ...] | None = None) -> LabelledTexts:
        """The training split.

        Args:
            names: label names in the order of the ids to give; None takes the task's or the source's.

        Raises:
            DataError: no such source, split or column, or labels that are not among `names`.
        """
        return self._load(self.split or "train", names)

    def evaluation_texts(self, names: tuple[str, ...] | None = None) -> dict[str, LabelledTexts]:
        """The development sets by name: one, called "", or ``matched`` and ``mismatched``.

        Args and errors are those of `training_texts`.
        """
        if self.split is not None:
            return {"": self._load(self.split, names)}
        task = self.glue_task
        if task is None or self.is_one_set:
            return {"": self._load("validation", names)}
        splits = task.dev_splits("dev" if self.glue_dir is not None else "validation")
        return {
            suffix: self._load(split, names)
            for suffix, split in zip(task.evaluation_sets, splits, strict=True)
        }

    @property
    def is_one_set(self) -> bool:
        """Whether the data are a file or a saved `Dataset`, which have no splits."""
        return self.data is not None and (
            Path(self.data).is_file() or (Path(self.data) / "state.json").is_file()
        )

    def _load(self, split: str, names: tuple[str, ...] | None) -> LabelledTexts:
        task = self.glue_task
        if task is None:
            assert self.data is not None  # without --glue-dir, as checked above
            # In multi-label data an empty cell says that no label applies.
            no_label = (None,) if self.problem is MULTI_LABEL else (None, "")
            rows = read_rows(self.data, (self.columns,), split=split, no_label=no_label)
            return _texts_of(rows, names, self.problem, self.label_separator)
        if self.problem not in (None, problem_of(task.problem_type)):
            raise UsageError(
                f"the task {task.name} is a {task.problem_type}, which --problem or the model is not: give what fits"
            )
        return _load_task(task, self._path(task, split), split, names)

    def _path(self, task: GlueTask, split: str) -> str:
        return str(tsv_path(self.glue_dir, task, split)) if self.glue_dir is not None else str(self.data)


def sample(texts: LabelledTexts, most: int | None, *, seed: int) -> LabelledTexts:
    """At most `most` rows, drawn at random; all of them, in their order, when None."""
    if most is None or most >= len(texts):
        return texts
    return texts.take(np.random.default_rng(seed).permutation(len(texts))[:most].tolist())


def _load_task(task: GlueTask, source: str, split: str, names: tuple[str, ...] | None) -> LabelledTexts:
    if problem_of(task.problem_type) is REGRESSION:
        rows = read_rows(source, task.columns, split=split, is_label=_is_number, of_glue=True)
        return _texts_of(rows, None, REGRESSION)
    # A number is told from a name by the task alone: MNLI's numbers differ from source to source.
    known = {*task.labels, *task.values} if source.endswith(".tsv") else None
    rows = read_rows(
        source,
        task.columns,
        split=split,
        is_label=lambda label: known is None or str(label) in known,
        of_glue=True,
    )
    renamed = tuple(task.values.get(str(label), label) for label in rows.labels)
    if not task.has_fixed_order and any(number_of(class_of(rows, label)) is not None for label in renamed):
        raise DataError(
            f"{source!r} numbers the labels of {task.name}, which differ from source to source: give their names"
        )
    rows = replace(rows, labels=renamed)
    as_task = _texts_of(rows, task.labels)
    return as_task if names is None else _reordered(source, as_task, names)


def _texts_of(
    rows: LabelledRows,
    names: tuple[str, ...] | None,
    problem: Problem | None = None,
    separator: str = ",",
) -> LabelledTexts:
    problem = problem or found_problem(rows)
    labels, order = labels_of(rows, problem, names, separator=separator)
    return LabelledTexts(texts=rows.texts, pairs=rows.pairs, labels=labels, names=order, problem=problem)


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def _reordered(source: str, texts: LabelledTexts, names: tuple[str, ...]) -> LabelledTexts:
    """The same labels under the ids that they have in `names`."""
    places = label_places(texts.names, names)
    if None in places:
        raise DataError(
            f"{source!r} has the labels {', '.join(texts.names)} but the model has {', '.join(names)}: "
            "name the model's labels in the order of their ids with --labels"
        )
    return replace(texts, labels=tuple(int(places[i] or 0) for i in texts.labels), names=names)
