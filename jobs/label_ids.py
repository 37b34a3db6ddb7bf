"""Labels as they stand in a source, turned into what a problem learns from: ids, sets of ids, or numbers.

Matched by name wherever there are names: the number of a label means what its source says. Text files have no
types, so that here, and nowhere else, digits become numbers. Knows nothing of files, tokens or models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deebert.errors import DataError
from deebert.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Problem
from jobs.labelled_rows import LabelledRows

ONE_NUMBER = ("LABEL_0",)
"""What Hugging Face calls the one output of a regression."""
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)")
"""Not 01, which is a name."""
_FRACTION = re.compile(r"-?[0-9]+\.[0-9]+")


def found_problem(rows: LabelledRows) -> Problem:
    """Lists of labels are multi-label data; a regression has to be asked for, or its task be known."""
    return MULTI_LABEL if any(isinstance(label, list | tuple) for label in rows.labels) else SINGLE_LABEL


def labels_of(
    rows: LabelledRows, problem: Problem, names: tuple[str, ...] | None, *, separator: str
) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Labels as `Problem.label_tensor` takes them, and the label names in the order of their ids.

    Args:
        rows: as they were read.
        problem: what they are labels of.
        names: the label names in order; found in the rows when None.
        separator: between the labels of a row, where a text file writes several into one cell.

    Raises:
        DataError: labels of another problem, or that are not among `names`.
    """
    if problem is REGRESSION:
        return tuple(_measure(rows.source, label) for label in rows.labels), ONE_NUMBER
    if problem is MULTI_LABEL:
        return _sets(rows, names, separator)
    return _single(rows, names)


def label_places(theirs: Sequence[str], ours: Sequence[str]) -> tuple[int | None, ...]:
    """For each name of `theirs` its place in `ours`, None where it has none; case does not matter."""
    places = {name.casefold(): i for i, name in enumerate(ours)}
    if len(places) != len(ours):  # labels that differ in case alone
        places = {name: i for i, name in enumerate(ours)}
        return tuple(places.get(name) for name in theirs)
    return tuple(places.get(name.casefold()) for name in theirs)


def class_of(rows: LabelledRows, label: Any) -> str | int:
    """A name, or an integer where it is written as one; integral floats are integers, others no classes.

    Raises:
        DataError: it is no class.
    """
    if isinstance(label, str):
        is_number = rows.class_names is None and _WHOLE.fullmatch(label.strip())
        return int(label) if is_number else label
    if isinstance(label, int):
        return label
    if not isinstance(label, float):
        raise DataError(
            f"{rows.source!r} has the label {label!r}, which is no class: give names or whole numbers"
        )
    if not label.is_integer():
        raise _no_class(rows.source, label)
    return int(label)


def number_of(label: str | int) -> int | None:
    """A label that is written as a whole number; a column with gaps has come to be written 1.0 in many a file."""
    if isinstance(label, int):
        return label
    value = float(label) if _FRACTION.fullmatch(label) else math.nan
    return int(value) if value.is_integer() else None


def _single(rows: LabelledRows, names: tuple[str, ...] | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if any(isinstance(label, list | tuple) for label in rows.labels):
        raise DataError(
            f"{rows.source!r} has rows with several labels: give --problem multi_label_classification"
        )
    labels = tuple(class_of(rows, label) for label in rows.labels)
    ids, order = _ids(rows, labels, names)
    return tuple(ids[label] for label in labels), order


def _sets(
    rows: LabelledRows, names: tuple[str, ...] | None, separator: str
) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    sets = [tuple(class_of(rows, label) for label in _several(labels, separator)) for labels in rows.labels]
    ids, order = _ids(rows, [label for labels in sets for label in labels], names)
    if not order:
        raise DataError(f"{rows.source!r} has no label in any row: name the labels with --labels")
    return tuple(tuple(sorted({ids[label] for label in labels})) for labels in sets), order


def _several(labels: Any, separator: str) -> Sequence[Any]:
    """The labels of one row: a list as it is, a text split, anything else a single one."""
    if isinstance(labels, str):
        return [part.strip() for part in labels.split(separator) if part.strip()]
    return labels if isinstance(labels, list | tuple) else [labels]


def _ids(
    rows: LabelledRows, labels: Sequence[Any], names: tuple[str, ...] | None
) -> tuple[dict[Any, int], tuple[str, ...]]:
    """The id of each label that occurs: by name where one is a name, else whole numbers as they are."""
    present = sorted(set(labels), key=lambda x: (isinstance(x, str), x))
    order = names or rows.class_names or tuple(_found_name(rows.source, label) for label in present)
    ids: dict[Any, int | None] = dict(
        zip(present, label_places(tuple(map(str, present)), order), strict=True)
    )
    if rows.class_names is None and None in ids.values():
        ids = _ids_of_numbers(ids, order)
    unknown = [label for label, i in ids.items() if i is None]
    if unknown:
        raise DataError(
            f"{rows.source!r} has the label {unknown[0]!r}, which is not among {', '.join(order)}: "
            "name all labels with --labels, in the order of their ids"
        )
    return {label: int(i or 0) for label, i in ids.items()}, order


def _ids_of_numbers(ids: Mapping[Any, int | None], names: tuple[str, ...]) -> dict[Any, int | None]:
    """The same for labels that are no names as they are written: 1.0 is the label of the name 1, whatever its place.

    Positions are meant only where no label is a name, and where the names are not numbers themselves.
    """
    numbers = {label: number_of(label) for label in ids}
    values = [number_of(int(name) if _WHOLE.fullmatch(name) else name) for name in names]
    places: dict[int | None, int] = {value: i for i, value in enumerate(values) if value is not None}
    found = {label: places.get(numbers[label]) if i is None else i for label, i in ids.items()}
    are_positions = None in values and None not in numbers.values()
    if not are_positions or any(i is not None for i in found.values()):
        return found
    return {label: i if i in range(len(names)) else None for label, i in numbers.items()}


def _found_name(source: str, label: str | int) -> str:
    """The name of a label that nothing else names; no fraction, which says that the column is a measure."""
    if isinstance(label, str) and _FRACTION.fullmatch(label) and number_of(label) is None:
        raise _no_class(source, label)
    return str(label)


def _no_class(source: str, label: str | float) -> DataError:
    return DataError(
        f"{source!r} has the label {label}, a measure and not a class: give class labels, or --problem regression"
    )


def _measure(source: str, label: Any) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{source!r} has the label {label!r}, which is no number: a regression needs numbers")
    return value
