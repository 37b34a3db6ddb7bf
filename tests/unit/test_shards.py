"""Input paths become files, files become shards, and shards have names: on real files."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, UsageError
from pipeline.input_schema import check_columns, spelled_type
from pipeline.inputs import InputFile, discover
from pipeline.shard import Shard, parse_part_name, part_name, source_key
from pipeline.shards import plan
from tests.examples import examples


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_parquet(path: Path, columns: dict[str, object], group_sizes: list[int] | None = None) -> str:
    table = pa.table(columns)
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for size in group_sizes or [len(table)]:
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            start += size
    return str(path)


def names(files: tuple[InputFile, ...]) -> list[str]:
    return [Path(file.path).name for file in files]


def ranges(shards: tuple[Shard, ...]) -> list[tuple[int, int | None]]:
    return [(shard.first_row, shard.num_rows) for shard in shards]


class TestDiscover:
    @pytest.mark.parametrize(
        ("name", "format_", "compression"),
        [
            ("a.parquet", "parquet", None),
            ("a.snappy.pq", "parquet", None),
            ("a.arrow", "arrow", None),
            ("a.jsonl", "jsonl", None),
            ("a.ndjson.gz", "jsonl", "gzip"),
            ("a.JSON.ZST", "jsonl", "zstd"),
            ("a.csv", "csv", None),
            ("a.tsv.gz", "csv", "gzip"),
            ("a b é.txt", "text", None),
            ("a[1]*.text.zst", "text", "zstd"),
        ],
    )
    def test_the_suffix_names_the_format(self, tmp_path, name, format_, compression):
        (file,) = discover([write(tmp_path / name, "x")])
        assert (file.path, file.format, file.compression) == (str(tmp_path / name), format_, compression)

    def test_a_folder_is_searched_recursively_without_hidden_names(self, tmp_path, caplog):
        for name in ["b.txt", "a.jsonl", "x/y/c.csv", "_out/d.txt", ".git/e.txt", "_SUCCESS", "README.md"]:
            write(tmp_path / "_corpus" / name, "x")
        with caplog.at_level(logging.INFO):
            files = discover([str(tmp_path / "_corpus")])
        assert names(files) == ["a.jsonl", "b.txt", "c.csv"]
        assert "skipped 1 files of unknown format, first 'README.md'" in caplog.text

    def test_overlapping_paths_give_each_file_once_in_order_of_path(self, tmp_path, monkeypatch):
        one, two = write(tmp_path / "1.txt", "x"), write(tmp_path / "2.txt", "x")
        monkeypatch.chdir(tmp_path)
        assert [f.path for f in discover([two, ".", "*.txt", f"file://{one}", "1.txt"])] == [one, two]

    def test_globs_match_files_and_folders_and_hidden_names_only_when_meant(self, tmp_path):
        for name in ["p/a.txt", "p/_b.txt", "q/_x/c.txt", "p/notes.md"]:
            write(tmp_path / name, "x")
        assert names(discover([str(tmp_path / "*")])) == ["a.txt"]
        assert names(discover([str(tmp_path / "**" / "*.txt")])) == ["a.txt"]
        assert names(discover([str(tmp_path / "p" / "_*.txt")])) == ["_b.txt"]

    def test_linked_folders_are_entered_once(self, tmp_path):
        write(tmp_path / "far" / "a.txt", "x")
        (tmp_path / "near").mkdir()
        (tmp_path / "near" / "link").symlink_to(tmp_path / "far")
        (tmp_path / "far" / "loop").symlink_to(tmp_path / "near")
        assert names(discover([str(tmp_path / "near")])) == ["a.txt"]

    def test_urls_are_listed_like_folders(self):
        memory = fsspec.filesystem("memory")
        memory.pipe({"/corpus-d/a b.txt": b"x", "/corpus-d/s/é.jsonl": b"{}", "/corpus-d/_x/c.txt": b"x"})
        expected = ["memory:///corpus-d/a b.txt", "memory:///corpus-d/s/é.jsonl"]
        assert [file.path for file in discover(["memory://corpus-d"])] == expected
        assert [file.path for file in discover(["memory://corpus-d/*.txt"])] == expected[:1]
        assert [file.path for file in discover([expected[1]])] == expected[1:]

    def test_a_saved_data_set_gives_its_arrow_files(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        train = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
        train.save_to_disk(tmp_path / "one", num_shards=2)
        datasets.DatasetDict(train=train, test=train).save_to_disk(tmp_path / "splits")
        write(tmp_path / "one" / "cache-1234.arrow", "left by map()")
        shard = "data-0000{}-of-0000{}.arrow".format
        assert names(discover([str(tmp_path / "one")])) == [shard(0, 2), shard(1, 2)]
        assert names(discover([str(tmp_path)])) == [shard(0, 2), shard(1, 2), shard(0, 1), shard(0, 1)]

    def test_the_fingerprint_follows_size_and_modification_time(self, tmp_path):
        path = write(tmp_path / "a.txt", "one")
        os.utime(path, ns=(1, 1))
        before = discover([path])[0].fingerprint
        assert discover([path])[0].fingerprint == before
        os.utime(path, ns=(1, 2))
        touched = discover([path])[0].fingerprint
        write(tmp_path / "a.txt", "three")
        os.utime(path, ns=(1, 2))
        assert len({before, touched, discover([path])[0].fingerprint}) == 3

    def test_the_fingerprint_of_an_object_follows_its_version(self):
        memory = fsspec.filesystem("memory")
        memory.pipe("/fingerprint.txt", b"one")
        before = discover(["memory://fingerprint.txt"])[0].fingerprint
        memory.pipe("/fingerprint.txt", b"two")
        assert discover(["memory://fingerprint.txt"])[0].fingerprint != before

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("absent.txt", "no such input"),
            ("*.jsonl", "no file matches"),
            ("empty", "holds no file with a known suffix"),
            ("data.xyz", "has no suffix that names a format; known are .parquet"),
            ("b.parquet.gz", "has no suffix that names a format"),
            ("nosuch://x/y.txt", "cannot be opened"),
            ("", "an input path is missing"),
        ],
    )
    def test_misuse_is_one_sentence(self, tmp_path, monkeypatch, path, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        write(tmp_path / "data.xyz", "x")
        write(tmp_path / "b.parquet.gz", "x")
        with pytest.raises(InputError, match=message) as caught:
            discover([path])
        assert "\n" not in str(caught.value)


class TestCheckColumns:
    def test_every_format_knows_its_columns(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"text": ["x"], "id": ["1"]})
        write(tmp_path / "b.csv.gz", gzip.compress("\ufeffid,text\n1,x\n".encode()))
        write(tmp_path / "c.tsv", "text\tid\nx\t1\n")
        write(tmp_path / "d.jsonl", '{"id": "1", "text": "x"}\n{"text": "y"}\nnot json\n')
        write(tmp_path / "e.jsonl.zst", zstandard.compress(b'{"text": "x"}\n'))
        with pa.ipc.new_stream(tmp_path / "f.arrow", pa.schema({"text": pa.string(), "id": pa.string()})):
            pass
        schema = check_columns(discover([str(tmp_path)]), ["text"], ["id", "id"])
        assert schema.text_columns == ("text",)
        assert schema.kept == pa.schema({"id": pa.string()})

    def test_files_without_rows_are_allowed(self, tmp_path):
        for name in ["a.csv", "b.jsonl", "c.jsonl.gz", "d.txt", "e.csv.zst"]:
            write(tmp_path / name, "")
        assert check_columns(discover([str(tmp_path)]), ["text"], []).kept == pa.schema([])
        write(tmp_path / "f.jsonl", '{"text": "x", "n": 1}')
        files = [file for file in discover([str(tmp_path)]) if file.format != "text"]
        assert check_columns(files, ["text"], ["n"]).kept == pa.schema({"n": pa.int64()})

    def test_json_types_come_from_the_first_block(self, tmp_path):
        records = [
            {
                "text": "x",
                "n": 1,
                "f": 1,
                "day": "2020-01-01",
                "none": None,
                "mixed": 1,
                "deep": {"a": [None]},
            },
            {"text": "y", "n": 2, "f": 1.5, "day": "2020-01-02", "mixed": "1", "deep": {"b": True}},
        ]
        write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
        write(tmp_path / "b.jsonl", '{"text": "z", "f": 3, "deep": {"b": null}}\n')
        kept = check_columns(
            discover([str(tmp_path)]), ["text"], ["n", "f", "day", "none", "mixed", "deep"]
        ).kept
        assert kept.types == [
            pa.int64(),
            pa.float64(),
            pa.string(),
            pa.string(),
            pa.string(),
            pa.struct({"a": pa.list_(pa.string()), "b": pa.bool_()}),
        ]

    def test_one_json_file_at_least_shows_each_column_whichever_it_is(self, tmp_path):
        write(tmp_path / "a.jsonl.gz", gzip.compress(b""))
        write(tmp_path / "b.jsonl", '{"text": "x"}\n')
        write(tmp_path / "c.jsonl", '{"text": "y", "n": 1}\n')
        files = discover([str(tmp_path)])
        for order in (files, files[::-1]):
            assert check_columns(order, ["text"], ["n"]).kept == pa.schema({"n": pa.int64()})
        with pytest.raises(
            InputError, match=r"b.jsonl \(like 1 more of JSON lines\) has no column 'm'; .* n$"
        ):
            check_columns(files, ["text"], ["m"])
        with pytest.raises(InputError, match=r"b.jsonl has no column 'm'; its columns are: text$"):
            check_columns(files[:2], ["text"], ["m"])

    def test_the_type_of_a_json_column_holds_what_each_file_shows(self, tmp_path):
        write(tmp_path / "a.jsonl", '{"text": "x", "n": 1, "deep": {"a": null, "b": [1]}}\n')
        write(tmp_path / "b.jsonl", '{"text": "x", "n": 1.5, "deep": {"c": 1, "b": [2.5]}}\n')
        files = discover([str(tmp_path)])
        types = {"a": pa.string(), "b": pa.list_(pa.float64()), "c": pa.int64()}
        for order in (files, files[::-1]):
            number, deep = check_columns(order, ["text"], ["n", "deep"]).kept.types
            assert number == pa.float64()
            assert {field.name: field.type for field in deep.fields} == types

    def test_what_a_file_declares_goes_before_what_json_shows(self, tmp_path):
        write(tmp_path / "a.jsonl", '{"text": "x", "n": 1}\n')
        write_parquet(tmp_path / "b.parquet", {"text": ["x"], "n": [1.5]})
        kept = check_columns(discover([str(tmp_path)]), ["text"], ["n"]).kept
        assert kept == pa.schema({"n": pa.float64()})

    def test_json_columns_of_two_kinds_name_both_files(self, tmp_path):
        write(tmp_path / "a.jsonl", '{"text": "x", "deep": {"a": 1}}\n')
        write(tmp_path / "b.jsonl", '{"text": "x", "deep": {"a": "one"}}\n')
        with pytest.raises(
            InputError, match=r"column 'deep' is struct.* in .*a.jsonl but struct.* in .*b.jsonl"
        ):
            check_columns(discover([str(tmp_path)]), ["text"], ["deep"])

    @pytest.mark.parametrize(
        ("begun", "shown"),
        [
            (pa.int64(), 3),
            (pa.int64(), None),
            (pa.float64(), 3),
            (pa.string(), 3),
            (pa.string(), {"a": [1]}),
            (pa.list_(pa.float64()), [3]),
            (pa.struct({"a": pa.int64(), "b": pa.string()}), {"a": 3}),
            (pa.struct({"a": pa.string()}), {"a": 3, "new": 1}),
        ],
    )
    def test_what_fits_the_type_that_the_output_was_begun_with_is_read_as_that(self, tmp_path, begun, shown):
        write(tmp_path / "a.jsonl", json.dumps({"text": "x", "n": shown}) + "\n")
        write(tmp_path / "b.jsonl", '{"text": "x"}\n')
        files = discover([str(tmp_path)])
        assert check_columns(files, ["text"], ["n"], begun={"n": begun}).kept == pa.schema({"n": begun})
        assert spelled_type(str(begun)) == begun

    @pytest.mark.parametrize(
        ("begun", "name", "content", "found"),
        [
            (pa.int64(), "b.jsonl", '{"text": "x", "n": 3.5}', "double"),
            (pa.int64(), "b.csv", "text,n\nx,3", "string"),
            (pa.bool_(), "b.jsonl", '{"text": "x", "n": 1}', "int64"),
            (
                pa.struct({"a": pa.int64()}),
                "b.jsonl",
                '{"text": "x", "n": {"a": "one"}}',
                "struct<a: string>",
            ),
        ],
    )
    def test_what_does_not_fit_it_is_named(self, tmp_path, begun, name, content, found):
        write(tmp_path / "a.jsonl", '{"text": "x", "n": null}\n')
        write(tmp_path / name, content)
        said = (
            f"column 'n' is {found} in {tmp_path / name}, but the output was begun with {begun}: convert the file, "
            "classify it into another output, or start over with --overwrite"
        )
        with pytest.raises(InputError, match=re.escape(said)):
            check_columns(discover([str(tmp_path)]), ["text"], ["n"], begun={"n": begun})

    @pytest.mark.parametrize(
        "text", ["timestamp[us, tz=UTC]", "struct<a: int64 not null>", "struct<>", "list<"]
    )
    def test_types_that_no_json_value_has_are_not_spelled(self, text):
        assert spelled_type(text) is None

    def test_all_members_of_a_gzip_file_are_looked_at(self, tmp_path):
        members = [b"", b'{"text": "x"}\n', b'{"text": "y", "n": 1}\n']
        files = discover([write(tmp_path / "a.jsonl.gz", b"".join(map(gzip.compress, members)))])
        assert check_columns(files, ["text"], ["n"]).kept == pa.schema({"n": pa.int64()})
        (shard,) = plan(files, shard_rows=10)
        assert shard.estimated_rows == 2

    def test_a_header_longer_than_the_first_block_is_read_whole(self, tmp_path):
        names = [f"column number {number}" for number in range(10_000)]
        write(tmp_path / "a.csv", ",".join([*names, "text"]))
        write(tmp_path / "b.csv", ",".join([*names, "text"]) + "\n" + ",".join("x" * 10_001) + "\n")
        kept = check_columns(discover([str(tmp_path)]), ["text"], names[-1:]).kept
        assert kept == pa.schema({names[-1]: pa.string()})

    @pytest.mark.parametrize(
        ("name", "delimiter"), [("a.tsv.csv", ","), ("a.csv.tsv.gz", "\t"), ("a.TSV", "\t")]
    )
    def test_the_last_suffix_tells_what_is_between_values(self, tmp_path, name, delimiter):
        content = delimiter.join(["text", "id"]).encode() + b"\n"
        path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
        assert check_columns(discover([path]), ["text"], ["id"]).kept == pa.schema({"id": pa.string()})

    def test_strings_are_strings_however_they_are_stored(self, tmp_path):
        texts = pa.array(["x", "y"])
        kinds = [
            texts,
            texts.cast(pa.large_string()),
            texts.dictionary_encode(),
            texts.cast(pa.string_view()),
        ]
        for number, column in enumerate(kinds):
            write_parquet(tmp_path / f"{number}.parquet", {"text": column, "id": column})
        assert check_columns(discover([str(tmp_path)]), ["text"], ["id"]).kept == pa.schema(
            {"id": pa.string()}
        )

    def test_a_first_line_longer_than_the_first_block_is_read_whole(self, tmp_path):
        line = json.dumps({"text": "x" * 3_000_000, "n": 1})
        write(tmp_path / "a.jsonl", f"{line}\n{line}\n")
        assert check_columns(discover([str(tmp_path)]), ["text"], ["n"]).kept.types == [pa.int64()]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "id,body\n1,x\n", r"a.csv has no column 'text'; its columns are: id, body"),
            ("a.jsonl", '{"body": "x"}\n', r"a.jsonl has no column 'text'; its columns are: body"),
            (
                "a.jsonl",
                '{"id": 1, "text": 7}\n',
                r"column 'text' of .*a.jsonl is int64; a text column must hold strings",
            ),
            ("a.json", '[{"text": "x"}]', r"a.json holds one JSON array; write one JSON object per line"),
            ("a.json", '{\n "text": "x"\n}', r"a.json holds JSON over several lines"),
            ("a.txt", "x", r"a.txt has no column 'id'; its columns are: text"),
            ("a.csv", "text,id,id\n", r"a.csv has two columns of one name"),
            ("a.parquet", "PAR1 not really", r"a.parquet cannot be read as parquet"),
            ("a.arrow", "", r"a.arrow cannot be read as arrow"),
            ("a.jsonl.gz", "not gzip", r"a.jsonl.gz cannot be read as jsonl"),
            ("a.csv.zst", "not zstd at all", r"a.csv.zst cannot be read as csv"),
        ],
    )
    def test_misuse_is_one_sentence(self, tmp_path, name, content, message):
        files = discover([write(tmp_path / name, content)])
        with pytest.raises(InputError, match=message) as caught:
            check_columns(files, ["text"], ["id"])
        assert "\n" not in str(caught.value)

    def test_a_header_that_python_cannot_take_spoils_only_its_file(self, tmp_path):
        write(tmp_path / "a.csv.gz", gzip.compress(b"x" * 200_000 + b"\n"))
        write(tmp_path / "b.csv", "text\nhi\n")
        files = discover([str(tmp_path)])
        assert check_columns(files, ["text"], []).text_columns == ("text",)
        with pytest.raises(
            InputError, match=r"a\.csv\.gz cannot be read as csv: field larger than field limit"
        ):
            check_columns(files[:1], ["text"], [])

    @pytest.mark.parametrize("column", [pa.array([1]), pa.array([b"x"]), pa.array([1]).dictionary_encode()])
    def test_a_text_column_of_another_type_is_named(self, tmp_path, column):
        files = discover([write_parquet(tmp_path / "a.parquet", {"text": column})])
        with pytest.raises(InputError, match=r"column 'text' of .* is .*; a text column must hold strings"):
            check_columns(files, ["text"], [])

    @pytest.mark.parametrize("other", ["b.csv", "b.jsonl", "b.parquet"])
    def test_kept_columns_of_two_types_name_both_files(self, tmp_path, other):
        write_parquet(tmp_path / "a.parquet", {"text": ["x"], "id": [1]})
        write(tmp_path / "b.csv", "text,id\nx,1\n")
        write(tmp_path / "b.jsonl", '{"text": "x", "id": "1"}\n')
        write_parquet(tmp_path / "b.parquet", {"text": ["x"], "id": [1.5]})
        files = discover([str(tmp_path / "a.parquet"), str(tmp_path / other)])
        with pytest.raises(
            InputError, match=rf"column 'id' is int64 in .*a.parquet but .* in .*{other}"
        ) as error:
            check_columns(files, ["text"], ["id"])
        remedy = (
            "classify them into separate outputs, or leave the column out of --id-column and --keep-columns"
        )
        why = " (CSV columns are strings)" if other == "b.csv" else ""
        assert str(error.value).endswith(f"{other}{why}: {remedy}")


class TestPlan:
    def test_parquet_is_cut_at_row_groups_and_inside_large_ones(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 34}, [4, 4, 4, 20, 2])
        shards = plan(discover([path]), shard_rows=8)
        assert ranges(shards) == [(0, 8), (8, 4), (12, 8), (20, 8), (28, 4), (32, 2)]
        assert [shard.estimated_rows for shard in shards] == [8, 4, 8, 8, 4, 2]

    def test_arrow_is_cut_at_rows(self, tmp_path):
        table = pa.table({"text": ["x"] * 10})
        for name, new in [("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)]:
            with new(tmp_path / name, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
            assert ranges(plan(discover([str(tmp_path / name)]), shard_rows=4)) == [(0, 4), (4, 4), (8, 2)]

    def test_large_files_of_lines_are_cut_at_newlines(self, tmp_path):
        path = write(tmp_path / "a.txt", "one\ntwo\n\nfour\nfive")
        shards = plan(discover([path]), shard_rows=2, split_above_bytes=4)
        assert [shard.byte_range for shard in shards] == [(0, 8), (8, 14), (14, 18)]
        assert ranges(shards) == [(0, 2), (2, 2), (4, 1)]
        write(tmp_path / "a.jsonl", "{}\n\n{}\n")
        shards = plan(discover([str(tmp_path / "a.jsonl")]), shard_rows=2, split_above_bytes=4)
        assert [shard.byte_range for shard in shards] == [(0, 4), (4, 7)]
        assert ranges(shards) == [(0, None), (2, None)]

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_small_files_of_lines_are_cut_too_where_they_hold_more_rows_than_a_shard(self, tmp_path, name):
        files = discover([write(tmp_path / name, b"{}\n" * 120_000)])
        shards = plan(files, shard_rows=500)
        assert len(shards) == 240
        assert [shard.estimated_rows for shard in shards] == [500] * 240
        assert shards[1].byte_range == (1500, 3000)
        assert [shard.byte_range for shard in plan(files, shard_rows=120_000)] == [None]
        assert len(plan(files, shard_rows=119_999)) == 2

    def test_small_objects_are_cut_as_files_are(self):
        fsspec.filesystem("memory").pipe("/cut/a.jsonl", b"{}\n" * 5)
        shards = plan(discover(["memory://cut"]), shard_rows=2)
        assert [shard.byte_range for shard in shards] == [(0, 6), (6, 12), (12, 15)]

    @pytest.mark.parametrize(
        ("name", "shard_rows"),
        [("a.csv", 10), ("a.txt", 20_000), ("a.jsonl", 20_000), ("a.txt.gz", 10), ("a.csv.zst", 10)],
    )
    def test_small_and_unsplittable_files_are_one_shard_with_an_estimate(self, tmp_path, name, shard_rows):
        content = b"0123456789 abcdef\n" * 20_000
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        (shard,) = plan(discover([write(tmp_path / name, pack(content))]), shard_rows=shard_rows)
        assert (shard.first_row, shard.num_rows, shard.byte_range) == (0, None, None)
        assert 10_000 < shard.estimated_rows < 40_000

    def test_files_without_rows_give_no_shard(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})
        write(tmp_path / "b.csv", "")
        write(tmp_path / "c.txt", "")
        assert plan(discover([str(tmp_path)]), shard_rows=10) == ()

    def test_a_shard_of_no_rows_is_refused(self):
        with pytest.raises(UsageError, match="at least 1 row"):
            plan([], shard_rows=0)

    @given(group_sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), shard_rows=st.integers(1, 40))
    @settings(
        max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_shards_partition_the_rows_of_a_file(self, tmp_path, group_sizes, shard_rows):
        path = write_parquet(tmp_path / "a.parquet", {"text": ["x"] * sum(group_sizes)}, group_sizes)
        shards = plan(discover([path]), shard_rows=shard_rows)
        covered = [row for first, count in ranges(shards) for row in range(first, first + count)]
        assert covered == list(range(sum(group_sizes)))
        assert all(0 < shard.num_rows <= shard_rows for shard in shards)
        assert plan(discover([path]), shard_rows=shard_rows) == shards


class TestPartNames:
    def test_a_name_tells_source_and_first_row_and_can_be_read_back(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 10})
        shard = plan(discover([path]), shard_rows=4)[1]
        name = part_name(shard, "identity")
        parsed = parse_part_name(name)
        assert (parsed.source_key, parsed.first_row) == (source_key(shard.source), 4)
        assert name == f"part-{parsed.source_key}-000000000004-{parsed.tag}.parquet"

    @pytest.mark.parametrize("name", ["_SUCCESS", "part-0.parquet", "part-00aa-000000000004-11.parquet", ""])
    def test_other_names_are_not_parts(self, name):
        assert parse_part_name(name) is None

    def test_the_tag_changes_with_identity_input_and_extent(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 10})
        first = plan(discover([path]), shard_rows=4)[0]
        (wider,) = plan(discover([path]), shard_rows=10)
        os.utime(path, ns=(1, 1))
        touched = plan(discover([path]), shard_rows=4)[0]
        versions = [(first, "i"), (first, "j"), (wider, "i"), (touched, "i")]
        parsed = [parse_part_name(part_name(shard, identity)) for shard, identity in versions]
        assert len({part.tag for part in parsed}) == 4
        assert len({(part.source_key, part.first_row) for part in parsed}) == 1
