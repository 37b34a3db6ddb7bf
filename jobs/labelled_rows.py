"""Rows of labelled data as they stand in their source: a file, a saved or local data set, the hub.

Reads, picks the columns and leaves out rows that cannot be used, with a count. Knows nothing of label ids,
tokens or models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.errors import DataError
from jobs.glue import Columns
from jobs.tsv import read_tsv, read_tsv_header

log = logging.getLogger(__name__)

IsLabel = Callable[[Any], bool]
TOLERATED_BROKEN_ROWS = 10
TOLERATED_BROKEN_SHARE = 0.01
"""Above both, the file is not what its reader takes it for."""


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Usable rows."""

    source: str
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[Any, ...]
    """Names or numbers, or lists of names or integers, as the source has them."""
    class_names: tuple[str, ...] | None
    """Label names in the order of their ids, where the source states them; `labels` are names then."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    place: str
    """Where to look: ``line 7`` or ``row 6``."""
    cells: tuple[Any, ...] | None
    """Text, second text where there is one, label; None where the line is broken."""


def read_rows(
    source: str,
    columns: Sequence[Columns],
    *,
    split: str,
    is_label: IsLabel = lambda label: True,
    no_label: Sequence[Any] = (None, ""),
) -> LabelledRows:
    """Read every usable row.

    Args:
        source: a CSV, TSV, JSONL or Parquet file, a folder saved by `datasets` or one that it can load, or
            ``hub-id[:configuration]``.
        columns: alternatives; the first that the source has is taken.
        split: of a hub data set or of a folder with several.
        is_label: a row with a label of which it is not true is broken.
        no_label: cells of rows that have no label and are left out.

    Raises:
        DataError: no such source or columns, no usable row, or too many broken ones.
    """
    path = Path(source)
    if path.suffix == ".tsv":
        _require_file(path)
        chosen = _choose(source, columns, read_tsv_header(path))
        rows = [
            _Row(place=f"line {row.line}", cells=row.cells and _as_texts(row.cells))
            for row in read_tsv(path, chosen.all())
        ]
        class_names = None
    else:
        data = _open(source, split)
        chosen = _choose(source, columns, data.column_names)
        class_names = _class_names(data.features[chosen.label])
        values = [data[column][:] for column in chosen.all()]
        values[-1] = [_named(label, class_names) for label in values[-1]]
        rows = [_Row(place=f"row {i}", cells=cells) for i, cells in enumerate(zip(*values, strict=True))]
    usable = _usable(source, rows, is_label, no_label)
    *texts, labels = zip(*usable, strict=True)
    return LabelledRows(
        source=source,
        texts=tuple(map(str, texts[0])),
        pairs=tuple(map(str, texts[1])) if len(texts) > 1 else None,
        labels=labels,
        class_names=class_names,
    )


def _usable(
    source: str, rows: list[_Row], is_label: IsLabel, no_label: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """The cells of rows that have every text and a label."""
    labelled = [row for row in rows if row.cells is None or row.cells[-1] not in no_label]
    if unlabelled := len(rows) - len(labelled):
        log.info("%s: left out %d of %d rows, which have no label", source, unlabelled, len(rows))
    broken = [row for row in labelled if not _is_whole(row, is_label)]
    _judge(source, broken, len(rows))
    usable = [row.cells for row in labelled if row.cells is not None and _is_whole(row, is_label)]
    if not usable:
        raise DataError(f"{source!r} has no row with a label: give labelled data")
    return usable


def _is_whole(row: _Row, is_label: IsLabel) -> bool:
    if row.cells is None:
        return False
    *texts, label = row.cells
    return all(text is not None for text in texts) and is_label(label)


def _judge(source: str, broken: list[_Row], total: int) -> None:
    if not broken:
        return
    what = f"{len(broken)} of {total} rows lack a column, a text or a known label, first {broken[0].place}"
    if len(broken) > max(TOLERATED_BROKEN_ROWS, TOLERATED_BROKEN_SHARE * total):
        raise DataError(f"{source!r} is not the data that it was read as: {what}; check columns and task")
    log.warning("%s: skipped %s", source, what)


def _choose(source: str, columns: Sequence[Columns], present: Sequence[str]) -> Columns:
    for one in columns:
        if set(one.all()) <= set(present):
            return one
    missing = next(column for column in columns[0].all() if column not in present)
    raise DataError(f"{source!r} has no column {missing!r}: it has {', '.join(present)}")


def _as_texts(cells: tuple[str, ...]) -> tuple[Any, ...]:
    """A text file has no types: a label of digits is a number, as in the other formats."""
    *texts, label = cells
    return (*texts, _number_if_digits(label))


def _number_if_digits(label: Any) -> Any:
    is_number = isinstance(label, str) and label.isdecimal() and str(int(label)) == label
    return int(label) if is_number else label


def _class_names(feature: Any) -> tuple[str, ...] | None:
    feature = getattr(feature, "feature", feature)  # of a list of class labels
    return tuple(feature.names) if hasattr(feature, "names") else None


def _named(label: Any, class_names: tuple[str, ...] | None) -> Any:
    """A class's name for its number; None for -1, which is how hidden test labels are written."""
    if isinstance(label, list):
        return [_named(one, class_names) for one in label]
    if class_names is None or label is None:
        return _number_if_digits(label)
    return class_names[label] if label >= 0 else None


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # The words "null" and "NA" are texts like any other.
    ".csv": ("csv", {"keep_default_na": False, "encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".pq": ("parquet", {}),
}


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"no such file: {str(path)!r}")


def _open(source: str, split: str):  # type: ignore[no-untyped-def]  # `datasets` is untyped
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    if path.suffix in _KINDS:
        _require_file(path)
    try:
        if path.is_dir() and _is_saved(path):
            saved = datasets.load_from_disk(source)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if path.suffix in _KINDS:
            kind, options = _KINDS[path.suffix]
            return datasets.load_dataset(kind, data_files=source, split="train", **options)
        name, _, configuration = (source, "", "") if path.is_dir() else source.partition(":")
        return datasets.load_dataset(name, configuration or None, split=split)
    except KeyError:
        raise DataError(f"{source!r} has no split {split!r}: it has {', '.join(saved)}") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"cannot load {source!r} as a file, a saved data set or a hub id: {reason}"
        ) from error


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
