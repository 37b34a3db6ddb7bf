"""Pieces of a large row group: each row once, and decoded no oftener than it must be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import source_parquet
from pipeline.inputs import discover
from pipeline.shard import Shard
from pipeline.shards import plan
from pipeline.source_parquet import ParquetReaders, read_parquet
from tests.examples import examples

COLUMNS = ["text", "n"]


def write(folder: Path, rows: int, group_rows: int, name: str = "a.parquet") -> pa.Table:
    table = pa.table({"n": range(rows), "text": [f"row {i}" for i in range(rows)], "more": [None] * rows})
    pq.write_table(table, folder / name, row_group_size=group_rows)
    return table


def shards_of(folder: Path, shard_rows: int) -> tuple[Shard, ...]:
    return plan(discover([str(folder)]), shard_rows=shard_rows)


def rows_of(shard: Shard, batch_rows: int, readers: ParquetReaders) -> list[tuple[int, str, int]]:
    found = []
    for raw in read_parquet(shard, COLUMNS, batch_rows, readers):
        assert 0 < len(raw.rows) == raw.columns.num_rows <= batch_rows
        assert raw.columns.column_names == COLUMNS
        found += zip(raw.rows.tolist(), *(column.to_pylist() for column in raw.columns.columns), strict=True)
    return found


def expected(shard: Shard) -> list[tuple[int, str, int]]:
    assert shard.num_rows is not None
    return [(i, f"row {i}", i) for i in range(shard.first_row, shard.first_row + shard.num_rows)]


class Counting:
    """Counts the rows that files have decoded."""

    def __init__(self, parquet: Any) -> None:
        self._parquet = parquet
        self.metadata = parquet.metadata
        self.close = parquet.close

    decoded = 0

    def iter_batches(self, **options: Any) -> Iterator[Any]:
        for batch in self._parquet.iter_batches(**options):
            Counting.decoded += batch.num_rows
            yield batch


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    real = source_parquet.open_parquet
    monkeypatch.setattr(source_parquet, "open_parquet", lambda file: Counting(real(file)))
    monkeypatch.setattr(Counting, "decoded", 0)
    return Counting


@settings(
    max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 60),
    group_rows=st.integers(1, 60),
    shard_rows=st.integers(1, 20),
    batch_rows=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_shards_in_any_order_have_their_own_rows(
    tmp_path: Path, rows: int, group_rows: int, shard_rows: int, batch_rows: int, seed: int
) -> None:
    write(tmp_path, rows, group_rows)
    shards = list(shards_of(tmp_path, shard_rows))
    random.Random(seed).shuffle(shards)
    readers = ParquetReaders()
    for shard in shards:
        assert rows_of(shard, batch_rows, readers) == expected(shard)


def test_in_order_a_row_group_is_decoded_once(tmp_path: Path, decoded: type[Counting]) -> None:
    write(tmp_path, 1000, 1000)
    readers = ParquetReaders()
    for shard in shards_of(tmp_path, 30):
        assert rows_of(shard, 7, readers) == expected(shard)
    assert decoded.decoded == 1000


def test_a_piece_ends_the_reading_where_it_ends(tmp_path: Path, decoded: type[Counting]) -> None:
    write(tmp_path, 1000, 1000)
    assert rows_of(shards_of(tmp_path, 30)[0], 7, ParquetReaders()) == expected(shards_of(tmp_path, 30)[0])
    assert decoded.decoded == 35


def test_beside_each_other_each_thread_decodes_it_once_at_most(
    tmp_path: Path, decoded: type[Counting]
) -> None:
    write(tmp_path, 4000, 4000)
    shards, readers = shards_of(tmp_path, 10), ParquetReaders(most_kept=4)
    with ThreadPoolExecutor(4) as pool:
        for shard, found in zip(shards, pool.map(lambda s: rows_of(s, 10, readers), shards), strict=True):
            assert found == expected(shard)
    assert decoded.decoded <= 4 * 4000


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path, 100, 100)
    readers = ParquetReaders()
    rows_of(shards_of(tmp_path, 10)[0], 10, readers)
    table = write(tmp_path, 101, 101)
    assert table.num_rows == 101
    shard = shards_of(tmp_path, 50)[1]
    assert rows_of(shard, 10, readers) == expected(shard)


def test_few_readers_are_kept_and_files_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = source_parquet.open_parquet

    def opening(file: Any) -> Any:
        opened.append(real(file))
        return opened[-1]

    monkeypatch.setattr(source_parquet, "open_parquet", opening)
    for i in range(20):
        write(tmp_path, 10, 10, f"{i:02d}.parquet")
    readers, shards = ParquetReaders(most_kept=8), shards_of(tmp_path, 5)
    for shard in shards[::2]:  # the first half of each file
        rows_of(shard, 10, readers)
    assert [parquet.closed for parquet in opened] == [True] * 12 + [False] * 8
    for shard in shards[-16:]:
        rows_of(shard, 10, readers)
    assert all(parquet.closed for parquet in opened[12:20])


def test_a_reading_that_is_given_up_closes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = source_parquet.open_parquet
    monkeypatch.setattr(source_parquet, "open_parquet", lambda file: opened.append(real(file)) or opened[-1])
    write(tmp_path, 10, 10)
    reading = read_parquet(shards_of(tmp_path, 5)[0], COLUMNS, 2, ParquetReaders())
    next(reading)
    reading.close()
    assert [parquet.closed for parquet in opened] == [True]
