"""Real corpora made of words that the tiny tokenizer knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("the", "film", "is", "was", "not", "very", "good", "bad", "great", "dull", "and", "story", "plot")


def sentences(count: int, *, seed: int = 0, longest: int = 30) -> list[str]:
    """Random sentences of 0 to `longest` words."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, size=count)
    words = np.array(WORDS)[rng.integers(len(WORDS), size=int(lengths.sum()))]
    return [" ".join(s) for s in np.split(words, np.cumsum(lengths)[:-1])]


def write_parquet(path: Path, texts: list[str], *, row_group_size: int = 100) -> None:
    """A file with the columns `text`, `key` and `weight`."""
    table = pa.table(
        {
            "text": texts,
            "key": [f"{path.stem}-{i}" for i in range(len(texts))],
            "weight": np.arange(len(texts), dtype=np.float64),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
