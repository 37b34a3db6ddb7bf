"""Labelled data for training and evaluation, through `datasets`: files, saved data sets, GLUE, the hub.

Turns any of them into tokenized, packed samples. Knows nothing of models beyond their label names.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deebert.errors import DataError
from deebert.evaluation import LabelledSequences
from pipeline.tokenization import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Texts (or pairs) and their labels, in memory."""

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...]
    """Ids into `names`."""
    names: tuple[str, ...]
    """Label names, in the order of their ids."""

    def tokenized(self, tokenizer: TextTokenizer) -> LabelledSequences:
        """The same as packed tokens."""
        batch = tokenizer(self.texts, self.pairs)
        return LabelledSequences(tokens=batch.tokens, labels=torch.tensor(self.labels, dtype=torch.long))


_LOADERS = {
    ".csv": ("csv", {}),
    # GLUE's files: a lone quote is a character like any other.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".pq": ("parquet", {}),
}


def load_labelled(
    source: str,
    *,
    text_column: str,
    text_pair_column: str | None,
    label_column: str,
    names: tuple[str, ...] | None = None,
    split: str = "train",
) -> LabelledTexts:
    """Load labelled texts.

    Args:
        source: a CSV, TSV, JSONL or Parquet file, a folder saved by `datasets`, or ``hub-id[:configuration]``.
        text_column: first segment.
        text_pair_column: second segment, or None.
        label_column: integers or names.
        names: the label names in order; found in the data when None.
        split: of a hub data set or a saved `DatasetDict`.

    Raises:
        DataError: no such source or column, or labels that are not among `names`.
    """
    data = _open(source, split)
    for column in filter(None, (text_column, text_pair_column, label_column)):
        if column not in data.column_names:
            raise DataError(f"{source!r} has no column {column!r}: it has {', '.join(data.column_names)}")
    data = data.filter(lambda label: label is not None, input_columns=label_column)
    feature = data.features[label_column]
    found = tuple(feature.names) if hasattr(feature, "names") else None
    raw = data[label_column][:]
    labels, names = _label_ids(source, raw, names, found)
    return LabelledTexts(
        texts=tuple("" if t is None else str(t) for t in data[text_column][:]),
        pairs=None
        if text_pair_column is None
        else tuple("" if t is None else str(t) for t in data[text_pair_column][:]),
        labels=labels,
        names=names,
    )


def _open(source: str, split: str):  # type: ignore[no-untyped-def]  # `datasets` is untyped
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    if path.is_dir():
        saved = datasets.load_from_disk(source)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    if path.suffix in _LOADERS:
        if not path.is_file():
            raise DataError(f"no such file: {source!r}")
        kind, options = _LOADERS[path.suffix]
        return datasets.load_dataset(kind, data_files=source, split="train", **options)
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"cannot load {source!r} as a file, a saved data set or a hub id: {reason}"
        ) from error


def _label_ids(
    source: str, raw: list[Any], names: tuple[str, ...] | None, found: tuple[str, ...] | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Label ids and names: by name where labels are names, else as they are."""
    if found is not None:
        return tuple(int(x) for x in raw), names or found
    present = sorted(set(raw), key=lambda x: (isinstance(x, str), x))
    if names is not None and all(isinstance(x, int) for x in present):
        ids: dict[Any, int] = {i: i for i in range(len(names))}
    else:
        names = names or tuple(map(str, present))
        ids = {
            **{name: i for i, name in enumerate(names)},
            **{x: names.index(str(x)) for x in present if str(x) in names},
        }
    unknown = [x for x in present if x not in ids]
    if unknown:
        raise DataError(
            f"{source!r} has the label {unknown[0]!r}, which is not among {', '.join(names)}: name all labels"
        )
    return tuple(ids[x] for x in raw), names
