"""What planning remembers of input files: the same plan without opening them, and never another one."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.catalog import Catalog
from pipeline.errors import InputError
from pipeline.input_schema import FIRST_BLOCK_BYTES, InputSchema, check_columns
from pipeline.inputs import discover
from pipeline.shard import Shard
from pipeline.shards import plan, suitable_shard_rows
from pipeline.sink import CATALOG, Output

ROWS = 25


def lines(count: int = ROWS, **more: object) -> bytes:
    return b"".join(json.dumps({"text": f"row {i}", **more}).encode() + b"\n" for i in range(count))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of each kind, and one without rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    table = pa.table({"text": [f"row {i}" for i in range(ROWS)], "n": range(ROWS)})
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(folder / "b.arrow", table.schema) as file:
        file.write_table(table)
    (folder / "c.csv").write_text("text,n\n" + "".join(f"row {i},{i}\n" for i in range(ROWS)))
    (folder / "d.jsonl").write_bytes(lines(n=1))
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(lines(n=1)))
    (folder / "f.jsonl").write_bytes(b"")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out"))


def planned(
    catalog: Catalog | None, folder: Path, shard_rows: int = 4
) -> tuple[InputSchema, tuple[Shard, ...]]:
    files = discover([str(folder)])
    schema = check_columns(files, ["text"], ["text"], catalog=catalog)
    return schema, plan(files, shard_rows=shard_rows, catalog=catalog)


def remembered(output: Output, folder: Path, shard_rows: int = 4) -> tuple[InputSchema, tuple[Shard, ...]]:
    """Plan with what the output knows, and keep what was found."""
    catalog = Catalog.of(output, shard_rows=shard_rows)
    found = planned(catalog, folder, shard_rows)
    catalog.save(output)
    return found


def spoil(file: Path) -> None:
    """Make a file unreadable, but in nothing that a listing shows."""
    status = file.stat()
    file.write_bytes(b"\xff" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_second_plan_is_the_first_and_opens_no_file(corpus: Path, output: Output) -> None:
    expected = planned(None, corpus)
    assert remembered(output, corpus) == expected
    for file in corpus.iterdir():
        spoil(file)
    assert remembered(output, corpus) == expected
    with pytest.raises(InputError):
        planned(None, corpus)


def test_what_is_new_or_changed_is_looked_into(corpus: Path, output: Output) -> None:
    remembered(output, corpus)
    (corpus / "d.jsonl").write_bytes(lines(3))
    (corpus / "g.jsonl").write_bytes(lines(9))
    expected = planned(None, corpus)
    spoil(corpus / "a.parquet")
    assert remembered(output, corpus) == expected
    spoil(corpus / "g.jsonl")
    assert remembered(output, corpus) == expected


def test_a_file_that_cannot_be_read_is_tried_again(corpus: Path, output: Output) -> None:
    good = (corpus / "a.parquet").read_bytes()
    status = (corpus / "a.parquet").stat()
    spoil(corpus / "a.parquet")
    assert remembered(output, corpus)[1][0].flaw is not None
    (corpus / "a.parquet").write_bytes(good)
    os.utime(corpus / "a.parquet", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert remembered(output, corpus) == planned(None, corpus)


def test_shards_of_another_size_are_cut_anew(corpus: Path, output: Output) -> None:
    remembered(output, corpus, shard_rows=4)
    assert remembered(output, corpus, shard_rows=9) == planned(None, corpus, shard_rows=9)


def test_nothing_is_written_where_nothing_is_new(corpus: Path, output: Output) -> None:
    remembered(output, corpus)
    written = Path(output.path(CATALOG)).stat().st_mtime_ns
    remembered(output, corpus)
    assert Path(output.path(CATALOG)).stat().st_mtime_ns == written


@pytest.mark.parametrize("content", [b"", b"no table", "another table"])
def test_a_damaged_catalog_is_as_none(
    corpus: Path, output: Output, content: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pipeline.catalog")
    remembered(output, corpus)
    path = Path(output.path(CATALOG))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        metadata = pa.ipc.open_file(path).schema.metadata
        with pa.ipc.new_file(path, pa.schema({"path": pa.string()}, metadata)) as file:
            file.write_table(pa.table({"path": ["a"]}, metadata=metadata))
    assert remembered(output, corpus) == planned(None, corpus)
    (said,) = caplog.messages
    assert said.startswith(f"{path} cannot be read (")
    assert said.endswith("): looking into all files")


def test_the_first_json_file_is_looked_into_further_than_it_was(tmp_path: Path, output: Output) -> None:
    """It alone must show the kept columns; that of another file is read less far."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines(1, n=1))
    (tmp_path / "in" / "b.jsonl").write_bytes(lines(10_000) + lines(1, n=1))
    files = discover([str(tmp_path / "in")])
    assert (files[1].size_bytes or 0) < FIRST_BLOCK_BYTES
    catalog = Catalog.of(output, shard_rows=1 << 20)
    check_columns(files, ["text"], ["n"], catalog=catalog)
    plan(files, shard_rows=1 << 20, catalog=catalog)
    catalog.save(output)
    again = Catalog.of(output, shard_rows=1 << 20)
    assert check_columns(files[1:], ["text"], ["n"], catalog=again).kept == pa.schema({"n": pa.int64()})


def test_a_file_of_unknown_size_is_not_remembered(corpus: Path, output: Output) -> None:
    files = [dataclasses.replace(file, size_bytes=None) for file in discover([str(corpus / "d.jsonl")])]
    catalog = Catalog.of(output, shard_rows=4)
    check_columns(files, ["text"], [], catalog=catalog)
    plan(files, shard_rows=4, catalog=catalog)
    catalog.save(output)
    assert pa.ipc.open_file(output.path(CATALOG)).read_all().num_rows == 0


class TestSuitableShardRows:
    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            (1_000, 4096),
            (67_000_000, 4096),
            (68_000_000, 8192),
            (200_000_000, 16_384),
            (1_000_000_000, 65_536),
            (10**12, 65_536),
        ],
    )
    def test_large_corpora_have_larger_shards(self, tmp_path: Path, rows: int, expected: int) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "0123456789"}\n' * 10_000)
        (file,) = discover([str(tmp_path / "a.jsonl")])
        large = [dataclasses.replace(file, size_bytes=rows * 23 // 100) for _ in range(100)]
        assert suitable_shard_rows(large) == expected

    def test_rows_of_parquet_are_counted_and_broken_files_left_out(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": ["good"] * 1000}), tmp_path / "a.parquet")
        (tmp_path / "b.parquet").write_bytes(b"broken")
        one, broken = discover([str(tmp_path)])
        files = [dataclasses.replace(file, size_bytes=100_000) for file in (one, broken) for _ in range(1000)]
        assert suitable_shard_rows(files) == 4096
        assert suitable_shard_rows(files * 100) == 16_384
