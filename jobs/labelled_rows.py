"""Rows of labelled data as they stand in their source: a file, a saved or local data set, the hub.

Reads, picks the columns and leaves out rows that cannot be used, with a count. Knows nothing of label ids,
tokens or models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deebert.errors import DataError
from jobs.delimited import SUFFIXES, read_delimited, read_delimited_header
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
    """Names or numbers, or lists of names or integers, as the source has them; a text file has texts."""
    class_names: tuple[str, ...] | None
    """Label names in the order of their ids, where the source states them; `labels` are names then."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    place: str
    """Where to look: ``line 7``, or ``row 6`` and what is wrong with it."""
    cells: tuple[Any, ...] | None
    """Text, second text where there is one, label; None where the line is broken."""


def read_rows(
    source: str,
    columns: Sequence[Columns],
    *,
    split: str,
    is_label: IsLabel = lambda label: True,
    no_label: Sequence[Any] = (None, ""),
    of_glue: bool = False,
) -> LabelledRows:
    """Read every usable row.

    Args:
        source: a CSV, TSV, JSONL or Parquet file, a folder saved by `datasets` or one that it can load, or
            ``hub-id[:configuration]``.
        columns: alternatives; the first that the source has is taken.
        split: of a hub data set or of a folder with several.
        is_label: a row with a label of which it is not true is broken.
        no_label: cells of rows that have no label and are left out.
        of_glue: whether a TSV file is GLUE's, which has no quoting.

    Raises:
        DataError: no such source or columns, no usable row, or too many broken ones.
    """
    path, class_names = Path(source), None
    if of_glue and path.suffix == ".tsv":
        _require_file(path)
        chosen = _choose(source, columns, read_tsv_header(path))
        rows = [_Row(place=f"line {row.line}", cells=row.cells) for row in read_tsv(path, chosen.all())]
    elif files := _delimited_files(source, split):
        chosen = _choose(source, columns, read_delimited_header(files[0]))
        rows = [row for file in files for row in _delimited(file, chosen, of_several=len(files) > 1)]
    else:
        data = _open(source, split)
        chosen = _choose(source, columns, data.column_names)
        class_names = _class_names(data.features[chosen.label])
        values = [data[column][:] for column in chosen.all()]
        if class_names is not None:
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


def _delimited(file: Path, columns: Columns, *, of_several: bool) -> Iterator[_Row]:
    for row in read_delimited(file, columns.all()):
        place = f"row {row.row} of {file.name}" if of_several else f"row {row.row}"
        yield _Row(place=f"{place} ({row.flaw})" if row.flaw else place, cells=row.cells)


def _class_names(feature: Any) -> tuple[str, ...] | None:
    feature = getattr(feature, "feature", feature)  # of a list of class labels
    return tuple(feature.names) if hasattr(feature, "names") else None


def _named(label: Any, class_names: tuple[str, ...]) -> Any:
    """A class's name for its number; None for -1, which is how hidden test labels are written."""
    if isinstance(label, list):
        return [_named(one, class_names) for one in label]
    return class_names[label] if label is not None and label >= 0 else None


_KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".pq": "parquet"}


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"no such file: {str(path)!r}")


def _delimited_files(source: str, split: str) -> list[Path]:
    """The source itself, or a folder's files of the split, where they are CSV or TSV: `datasets` would guess types."""
    path = Path(source)
    if path.suffix in SUFFIXES and not path.is_dir():
        _require_file(path)
        return [path]
    if not path.is_dir() or _is_saved(path):
        return []
    import datasets

    with _refusing(source):
        found = datasets.load_dataset_builder(source).config.data_files or {}
    files = [Path(file) for file in found.get(split, ())]
    return files if all(file.suffix in SUFFIXES for file in files) else []


def _open(source: str, split: str):  # type: ignore[no-untyped-def]  # `datasets` is untyped
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    if path.suffix in _KINDS:
        _require_file(path)
    with _refusing(source):
        if path.is_dir() and _is_saved(path):
            saved = datasets.load_from_disk(source)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise DataError(f"{source!r} has no split {split!r}: it has {', '.join(saved)}")
            return saved[split]
        if path.suffix in _KINDS:
            return datasets.load_dataset(_KINDS[path.suffix], data_files=source, split="train")
        name, _, configuration = (source, "", "") if path.is_dir() else source.partition(":")
        return datasets.load_dataset(name, configuration or None, split=split)


@contextmanager
def _refusing(source: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"cannot load {source!r} as a file, a saved data set or a hub id: {reason}"
        ) from error


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
