"""A shard becomes batches: every input row is a good row or a bad one, once, in order, on real files."""

from __future__ import annotations

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import source_csv, source_lines
from pipeline.errors import ReadError
from pipeline.input_schema import InputSchema, check_columns
from pipeline.inputs import discover
from pipeline.opening import is_read_failure
from pipeline.shards import plan
from pipeline.source import SourceBatch, read_shard
from tests.examples import examples

in_place = settings(
    max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(
    path: Path | str,
    *,
    texts=("text",),
    others=(),
    shard_rows=1000,
    batch_rows=1000,
    split=8 << 20,
    schema=None,
) -> list[SourceBatch]:
    files = discover([str(path)])
    schema = schema or check_columns(files, texts, others)
    batches = []
    for shard in plan(files, shard_rows=shard_rows, split_above_bytes=split):
        batches += read_shard(
            shard, text_columns=texts, other_columns=others, schema=schema, batch_rows=batch_rows
        )
    for batch in batches:
        assert batch.rows.dtype == np.int64
        assert {len(batch.rows), len(batch.kept), *map(len, batch.texts)} == {len(batch.rows)}
        assert len(batch.rows) <= batch_rows
        for column in batch.texts:
            column.validate(full=True)
            assert column.null_count == 0
    return batches


def good(batches: list[SourceBatch], column: int = 0) -> dict[int, str]:
    rows = [row for batch in batches for row in batch.rows.tolist()]
    assert rows == sorted(set(rows))
    return dict(zip(rows, (text for b in batches for text in b.texts[column].to_pylist()), strict=True))


def bad(batches: list[SourceBatch]) -> dict[int, str]:
    rows = [row for batch in batches for row in batch.bad]
    assert len({row.source_row for row in rows}) == len(rows)
    return {row.source_row: row.reason for row in rows}


def kept(batches: list[SourceBatch]) -> list[dict[str, object]]:
    return pa.concat_tables([batch.kept for batch in batches]).to_pylist()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def broken_utf8(values: list[bytes | None]) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


RECORDS = [
    {"text": text, "id": f"n{row}"} for row, text in enumerate(["one", "", "drei\nvier", "五 🎈", '"'])
]
TEXTS = dict(enumerate(record["text"] for record in RECORDS))


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["id", "text"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def as_jsonl() -> bytes:
    return "\n".join(map(json.dumps, RECORDS)).encode()


def as_arrow(new) -> bytes:
    out = io.BytesIO()
    table = pa.Table.from_pylist(RECORDS)
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def as_parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), out, row_group_size=2)
    return out.getvalue()


FILES = {
    "a b.csv": as_csv(","),
    "é.tsv": as_csv("\t"),
    "a.csv.gz": gzip.compress(as_csv(",")),
    "a.jsonl": as_jsonl(),
    "a.ndjson.zst": zstandard.compress(as_jsonl()),
    "two members.json.gz": gzip.compress(as_jsonl() + b"\n") + gzip.compress(b""),
    "file.arrow": as_arrow(pa.ipc.new_file),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "a.parquet": as_parquet(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("batch_rows", [1, 3, 100])
class TestEveryFormat:
    def test_gives_the_same_rows(self, tmp_path, name, batch_rows):
        write(tmp_path / name, FILES[name])
        batches = read(tmp_path / name, others=["id", "text"], batch_rows=batch_rows, shard_rows=3)
        assert (good(batches), bad(batches), kept(batches)) == (TEXTS, {}, [dict(r) for r in RECORDS])

    def test_gives_the_same_rows_from_a_url(self, name, batch_rows):
        fsspec.filesystem("memory").pipe(f"/source/{name}", FILES[name])
        batches = read(f"memory://source/{name}", others=["id"], batch_rows=batch_rows, shard_rows=3)
        assert (good(batches), bad(batches)) == (TEXTS, {})


class TestText:
    def test_every_line_is_a_document(self, tmp_path):
        path = write(tmp_path / "a.txt", "\ufeffone\r\n\n  three\rstill \nfünf")
        assert good(read(path)) == {0: "one", 1: "", 2: "  three\rstill ", 3: "fünf"}

    def test_a_byte_order_mark_is_no_text_where_the_file_is_split(self, tmp_path):
        path = write(tmp_path / "a.txt", "\ufeffone\ntwo\n")
        assert good(read(path, shard_rows=1, split=0)) == {0: "one", 1: "two"}

    def test_a_line_that_is_not_utf8_is_bad(self, tmp_path):
        batches = read(write(tmp_path / "a.txt", b"one\nt\xffwo\n\xed\xa0\x80\nfour\n"))
        assert good(batches) == {0: "one", 3: "four"}
        assert bad(batches) == dict.fromkeys([1, 2], "column 'text' is not valid UTF-8")
        assert [row.excerpt for row in batches[0].bad] == ["t\\xffwo", "\\xed\\xa0\\x80"]

    def test_lines_may_be_longer_than_a_block(self, tmp_path, monkeypatch):
        monkeypatch.setattr(source_lines, "BLOCK_BYTES", 5)
        path = write(tmp_path / "a.txt", "\ufeffa line of some length\nb\n" + "c" * 23)
        assert good(read(path)) == {0: "a line of some length", 1: "b", 2: "c" * 23}

    @given(
        content=st.lists(
            st.sampled_from([b"\n", b"\r", b"a", b"\xc3\xa9", b"\xff", b"\0", b" "]), max_size=40
        ),
        shard_rows=st.integers(1, 7),
        batch_rows=st.integers(1, 7),
        block_bytes=st.integers(4, 20),
    )
    @in_place
    def test_split_or_not_gives_every_line_once(self, tmp_path, content, shard_rows, batch_rows, block_bytes):
        data = b"".join(content)
        path = write(tmp_path / "a.txt", data)
        lines = data.split(b"\n")[: None if data and not data.endswith(b"\n") else -1]
        lines = [line.removesuffix(b"\r") for line in lines]
        expected_bad = {row for row, line in enumerate(lines) if b"\xff" in line}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source_lines, "BLOCK_BYTES", block_bytes)
            for split, shard_size in ((0, shard_rows), (1000, shard_rows), (1000, 1000)):
                batches = read(path, shard_rows=shard_size, batch_rows=batch_rows, split=split)
                expected = {i: x.decode() for i, x in enumerate(lines) if i not in expected_bad}
                assert good(batches) == expected
                assert set(bad(batches)) == expected_bad


NOT_ROWS = ["{", "[]", '{"text": 1}', '{"text": "\\ud800"}']


class TestJsonLines:
    def test_lines_that_are_not_rows_are_bad_and_say_why(self, tmp_path):
        lines = [
            b'{"text": "fine", "n": 1}',
            b'{"text": "torn',
            b'["text"]',
            b"null",
            b'{"n": 1}',
            b'{"text": null}',
            b'{"text": 7}',
            b'{"text": "half \\ud83d"}',
            b'{"text": "\xff"}',
            b'{"text": "fine", "other": "\xff"}',
            b'{"text": "two"} {"text": "rows"}',
            b'{"text": "fine", "n": "one"}',
            b'{"text": "fine", "n": 1.5}',
            b' {"text": "fine", "n": null, "other": NaN} ',
        ]
        schema = InputSchema(text_columns=("text",), kept=pa.schema({"n": pa.int64()}))
        batches = read(write(tmp_path / "a.jsonl", b"\n".join(lines)), others=["n"], schema=schema)
        assert good(batches) == {0: "fine", 13: "fine"}
        reasons = bad(batches)
        assert set(reasons) == set(range(1, 13))
        for row, reason in {
            1: "the line is not JSON",
            2: "the line is an array, not a JSON object",
            3: "the line is null, not a JSON object",
            4: "column 'text' is null",
            5: "column 'text' is null",
            6: "column 'text' is a number, not text",
            7: "column 'text' holds half a surrogate pair",
            8: "the line is not valid UTF-8",
            9: "the line is not valid UTF-8",
            10: "the line is not JSON: Extra data",
            11: "a value does not convert: JSON parse error: Column(/n) changed from number to string",
            12: "a value does not convert: Failed to convert JSON to int64, couldn't parse:1.5",
        }.items():
            assert reasons[row].startswith(reason), row
        assert batches[0].bad[7].excerpt == '{"text": "\\xff"}'

    def test_blank_lines_have_a_number_but_are_no_rows(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\n \t\r\n{"text": "b"}\n\n')
        assert (good(read(path)), bad(read(path))) == ({0: "a", 3: "b"}, {})

    def test_a_byte_order_mark_spoils_no_row_where_the_file_is_split(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n{"text": "b"}\n')
        batches = read(path, shard_rows=1, split=0)
        assert (good(batches), bad(batches)) == ({0: "a", 1: "b"}, {})

    def test_an_object_over_two_lines_beside_two_on_one_line_moves_no_row(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "a"}{"text": "b"}\n{"text":\n"c"}\n{"text": "d"}\n')
        assert good(read(path)) == {3: "d"}
        assert set(bad(read(path))) == {0, 1, 2}

    def test_whatever_precedes_it_decides_nothing_about_a_row(self, tmp_path):
        odd = '{"text": "a", "text": "b", "n": 9007199254740993, "z": %s}' % ("9" * 5000)
        for neighbour in ["", "torn\n"]:
            path = write(tmp_path / "a.jsonl", f'{neighbour}{odd}\n{{"text": "c", "n": 0.5}}\n')
            batches = read(path, others=["n"])
            assert list(good(batches).values()) == ["b", "c"]
            assert kept(batches)[0] == {"n": 9007199254740992.0}

    def test_kept_objects_may_hold_any_json_where_no_value_told_a_type(self, tmp_path):
        values = [{"a": {}, "b": [None], "c": 1}, {"a": {"x": 1}, "b": [2]}, {"a": None, "c": 2}]
        path = tmp_path / "a.jsonl"
        first = json.dumps({"text": "x", "deep": values[0]}) + "\n"
        write(path, first)
        schema = check_columns(discover([str(path)]), ["text"], ["deep"])
        write(path, first + "".join(json.dumps({"text": "x", "deep": value}) + "\n" for value in values[1:]))
        batches = read(path, others=["deep"], schema=schema)
        assert bad(batches) == {}
        assert [row["deep"] for row in kept(batches)] == [
            {"a": "{}", "b": [None], "c": 1},
            {"a": '{"x": 1}', "b": ["2"], "c": None},
            {"a": None, "b": None, "c": 2},
        ]

    def test_kept_strings_may_be_any_json(self, tmp_path):
        lines = ['{"text": "a", "k": "x"}', '{"text": "b", "k": 2}', '{"text": "c", "k": {"é": [null]}}']
        batches = read(write(tmp_path / "a.jsonl", "\n".join(lines)), others=["k"])
        assert [row["k"] for row in kept(batches)] == ["x", "2", '{"é": [null]}']

    @given(
        lines=st.lists(
            st.one_of(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=9).map(
                    lambda text: json.dumps({"text": text}, ensure_ascii=False)
                ),
                st.sampled_from(
                    ["", " ", '{"text": "x"}\r', "{", "[]", '{"text": 1}', '{"text": "\\ud800"}']
                ),
            ),
            max_size=12,
        ),
        shard_rows=st.integers(1, 5),
        block_bytes=st.integers(4, 60),
    )
    @in_place
    def test_split_or_not_gives_every_line_once(self, tmp_path, lines, shard_rows, block_bytes):
        path = write(tmp_path / "a.jsonl", "{}\n" + "\n".join(lines))
        filled = {row for row, line in enumerate(lines, start=1) if line.strip()}
        expected_bad = {row for row in filled if lines[row - 1] in NOT_ROWS}
        schema = check_columns([], ["text"], [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source_lines, "BLOCK_BYTES", block_bytes)
            for split, shard_size in ((0, shard_rows), (10_000, shard_rows), (10_000, 1000)):
                batches = read(path, shard_rows=shard_size, batch_rows=3, split=split, schema=schema)
                assert set(bad(batches)) == expected_bad | {0}
                assert good(batches) == {
                    row: json.loads(lines[row - 1])["text"] for row in sorted(filled - expected_bad)
                }


class TestCsv:
    def test_rows_with_a_wrong_number_of_columns_are_bad(self, tmp_path):
        content = 'id,text\n1\n2,"a,\n\nb"\n\n3,c,d\n4,\n5,""\n6\n'
        batches = read(write(tmp_path / "a.csv", content), others=["id"], batch_rows=2)
        assert good(batches) == {1: "a,\n\nb", 3: "", 4: ""}
        assert bad(batches) == {
            0: "the row has 1 columns, not 2",
            2: "the row has 3 columns, not 2",
            5: "the row has 1 columns, not 2",
        }
        assert [row["id"] for row in kept(batches)] == ["2", "4", "5"]

    def test_values_are_strings_as_they_stand(self, tmp_path):
        path = write(tmp_path / "a.csv", "text,id\nNULL,007\n2020-01-01,\n nan ,1e5\n")
        batches = read(path, others=["id"])
        assert list(good(batches).values()) == ["NULL", "2020-01-01", " nan "]
        assert [row["id"] for row in kept(batches)] == ["007", "", "1e5"]

    def test_bytes_that_are_not_utf8_spoil_only_their_row(self, tmp_path):
        content = "\ufefftext,é\na,1\n".encode() + b"\xff,2\nb,\xfe\n\xfd\n" + 'ü,"4\n"\n'.encode()
        batches = read(write(tmp_path / "a.csv", content), others=["é"])
        assert good(batches) == {0: "a", 4: "ü"}
        assert bad(batches) == {
            1: "column 'text' is not valid UTF-8",
            2: "column 'é' does not convert to string",
            3: "the row has 1 columns, not 2",
        }
        assert [row.excerpt for row in batches[0].bad] == ["\\xff", "\\xfe", "\\xfd"]
        assert kept(batches) == [{"é": "1"}, {"é": "4\n"}]

    @pytest.mark.parametrize("tail", [b"", b"\xff,1\n"])
    def test_records_larger_than_a_block_are_read_in_larger_blocks(self, tmp_path, monkeypatch, tail):
        monkeypatch.setattr(source_csv, "FIRST_BLOCK_BYTES", 32)
        rows = ["a", "bad", "b" * 20, "c\n" * 50, "d" * 300, "bad", "e"]
        body = "".join(f"{row}\n" if row == "bad" else f'"{row}",x\n' for row in rows)
        batches = read(write(tmp_path / "a.csv", f"text,id\n{body}".encode() + tail))
        assert good(batches) == {row: text for row, text in enumerate(rows) if text != "bad"}
        assert set(bad(batches)) == {1, 5} | ({7} if tail else set())

    def test_a_quote_that_is_never_closed_is_a_read_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(source_csv, "FIRST_BLOCK_BYTES", 64)
        monkeypatch.setattr(source_csv, "LARGEST_BLOCK_BYTES", 256)
        path = write(tmp_path / "a.csv", 'text,id\na,1\n"b,2\n' + "c,3\n" * 500)
        with pytest.raises(ReadError, match=r"a.csv could not be read as csv: .* a quote is not closed"):
            read(path)

    @pytest.mark.parametrize("content", ["", "text,id", "text,id\n", "\n\n"])
    def test_files_without_rows_give_none(self, tmp_path, content):
        batches = read(write(tmp_path / "a.csv", content))
        assert (good(batches), bad(batches)) == ({}, {})


class TestColumnar:
    def test_nulls_and_broken_strings_are_bad(self, tmp_path):
        texts = broken_utf8([b"a", None, b"\xff\xfe", b"", b"\xed\xa0\x80", b"b"])
        for column in (texts, texts.cast(pa.large_string()), texts.dictionary_encode()):
            path = write_parquet(tmp_path / "a.parquet", {"text": column})
            batches = read(path, batch_rows=4)
            assert good(batches) == {0: "a", 3: "", 5: "b"}
            assert bad(batches) == {
                1: "column 'text' is null",
                2: "column 'text' is not valid UTF-8",
                4: "column 'text' is not valid UTF-8",
            }

    def test_views_are_read_as_what_they_show(self, tmp_path):
        """Polars writes strings so, and categories as dictionaries of them."""
        names = pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["a", "b"], pa.string_view()))
        deep = pa.array([{"in": ["x"]}] * 3, pa.struct({"in": pa.list_(pa.string_view())}))
        table = pa.table(
            {"text": pa.array(["one", None, "three"], pa.string_view()), "name": names, "deep": deep}
        )
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        batches = read(tmp_path / "a.arrow", others=["name", "deep"])
        assert good(batches) == {0: "one", 2: "three"}
        assert bad(batches) == {1: "column 'text' is null"}
        assert kept(batches) == [{"name": "a", "deep": {"in": ["x"]}}, {"name": None, "deep": {"in": ["x"]}}]

    def test_views_that_are_not_utf8_spoil_only_their_row(self, tmp_path):
        texts = pa.array([b"one", b"\xff" * 20], pa.binary_view()).view(pa.string_view())
        table = pa.table({"text": texts})
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        batches = read(tmp_path / "a.arrow")
        assert good(batches) == {0: "one"}
        assert bad(batches) == {1: "column 'text' is not valid UTF-8"}

    def test_a_column_that_holds_nothing_but_nulls_spoils_its_rows(self, tmp_path):
        """pandas gives such a column no type."""
        table = pa.table({"text": pa.nulls(2), "id": pa.nulls(2)})
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        write_parquet(tmp_path / "b.parquet", {"text": pa.nulls(2), "id": pa.nulls(2)})
        for name in ("a.arrow", "b.parquet"):
            batches = read(tmp_path / name, others=["id"])
            assert good(batches) == {}
            assert bad(batches) == dict.fromkeys(range(2), "column 'text' is null")
            assert [list(batch.pieces(1 << 20)) for batch in batches] == [[]]

    def test_kept_values_that_would_spoil_a_part_are_bad(self, tmp_path):
        flat = broken_utf8([b"a", b"\xff", b"c", None])
        nested = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3, 4], pa.int32()), flat.take([2, 0, 1, 3]))
        path = write_parquet(tmp_path / "a.parquet", {"text": list("wxyz"), "flat": flat, "nested": nested})
        batches = read(path, others=["nested", "flat"])
        assert good(batches) == {0: "w", 3: "z"}
        assert set(bad(batches)) == {1, 2}
        assert kept(batches) == [{"nested": ["c"], "flat": "a"}, {"nested": [None], "flat": None}]

    def test_kept_columns_of_all_files_have_the_types_of_the_schema(self, tmp_path):
        ids = pa.array(["x", "y"])
        for number, column in enumerate([ids, ids.cast(pa.large_string()), ids.dictionary_encode()]):
            write_parquet(tmp_path / f"{number}.parquet", {"text": ids, "id": column})
        assert {str(batch.kept.schema) for batch in read(tmp_path, others=["id"])} == {"id: string"}

    def test_pairs_have_two_texts(self, tmp_path):
        columns = {"premise": ["a", None, "c"], "n": [1, 2, 3], "hypothesis": ["d", "e", "f"]}
        batches = read(write_parquet(tmp_path / "a.parquet", columns), texts=("hypothesis", "premise"))
        assert (good(batches, 0), good(batches, 1)) == ({0: "d", 2: "f"}, {0: "a", 2: "c"})

    def test_saved_data_sets_are_read(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": ["a", None, "c"]}).save_to_disk(tmp_path / "saved", num_shards=1)
        batches = read(tmp_path / "saved", shard_rows=2)
        assert (good(batches), set(bad(batches))) == ({0: "a", 2: "c"}, {1})

    @given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), max_bytes=st.integers(1, 30))
    @in_place
    def test_pieces_are_all_rows_once_and_bounded_in_bytes(self, tmp_path, sizes, max_bytes):
        columns = {"one": ["é" * size for size in sizes], "two": ["x"] * len(sizes)}
        path = write_parquet(tmp_path / "a.parquet", {**columns, "id": sizes})
        batches = read(path, texts=("one", "two"), others=("id",))
        pieces = [piece for batch in batches for piece in batch.pieces(max_bytes)]
        assert good(pieces) == dict(enumerate(columns["one"]))
        assert [row["id"] for piece in pieces for row in piece.kept.to_pylist()] == sizes
        for piece in pieces:
            in_bytes = sum(len(text.encode()) for column in piece.texts for text in column.to_pylist())
            assert in_bytes <= max_bytes or len(piece.rows) == 1

    @given(group_rows=st.integers(1, 12), shard_rows=st.integers(1, 25), batch_rows=st.integers(1, 25))
    @in_place
    def test_any_cut_gives_every_row_once(self, tmp_path, group_rows, shard_rows, batch_rows):
        texts = [f"row {row}" for row in range(20)]
        path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=group_rows)
        batches = read(path, shard_rows=shard_rows, batch_rows=batch_rows)
        assert good(batches) == dict(enumerate(texts))


class TestFailures:
    @pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst", "a.csv.gz"])
    def test_a_torn_file_is_a_read_error_that_names_it(self, tmp_path, name):
        rng = np.random.default_rng(0)
        texts = ["".join(map(chr, row)) for row in rng.integers(97, 122, (40_000, 40))]
        if name == "a.parquet":
            content = write_parquet(tmp_path / name, {"text": texts}).read_bytes()
            content = content[:5000] + b"\0" * 50_000 + content[55_000:]
        else:
            lines = [json.dumps({"text": text}) for text in texts] if "json" in name else ["text", *texts]
            pack = gzip.compress if name.endswith("gz") else zstandard.compress
            content = pack("\n".join(lines).encode())[:-1000]
        path = write(tmp_path / name, content)
        with pytest.raises(ReadError, match=rf"{name} could not be read as .*: "):
            read(path)

    def test_what_arrow_cannot_do_with_a_type_is_a_read_error_that_names_the_file(self, tmp_path):
        tags = pa.ExtensionArray.from_storage(
            pa.opaque(pa.string_view(), "tag", "us"), pa.array(["a", "b"], pa.string_view())
        )
        table = pa.table({"text": ["one", None], "tag": tags})
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write_table(table)
        with pytest.raises(ReadError, match=r"a\.arrow could not be read as arrow: "):
            read(tmp_path / "a.arrow", others=["tag"])

    def test_a_split_file_that_ends_too_early_is_a_read_error(self, tmp_path):
        files = discover([str(write(tmp_path / "a.txt", "one\ntwo\n"))])
        schema = check_columns(files, ["text"], [])
        _, last = plan(files, shard_rows=1, split_above_bytes=0)
        assert last.byte_range == (4, 8)
        longer = replace(last, byte_range=(4, 9))
        with pytest.raises(ReadError, match=r"a\.txt could not be read as text: the file ends before byte 9"):
            list(read_shard(longer, text_columns=["text"], other_columns=[], schema=schema, batch_rows=10))

    def test_a_file_that_changed_since_it_was_planned_is_a_read_error(self, tmp_path):
        files = discover([str(write(tmp_path / "a.txt", "one\n"))])
        schema = check_columns(files, ["text"], [])
        (shard,) = plan(files, shard_rows=10)
        for change in (lambda: write(tmp_path / "a.txt", "other\n"), (tmp_path / "a.txt").unlink):
            change()
            with pytest.raises(ReadError, match=r"a\.txt"):
                list(read_shard(shard, text_columns=["text"], other_columns=[], schema=schema, batch_rows=1))


@pytest.mark.parametrize(("broken", "readable"), [("text", [1]), ("other", [0, 1])])
def test_of_a_compressed_arrow_file_a_shard_decodes_its_own_batches_of_the_columns_it_needs(
    broken: str, readable: list[int], tmp_path: Path
) -> None:
    """What it does not decode may as well be broken."""
    table = pa.table({name: [f"{name} {row}" for row in range(2000)] for name in (broken, "text", "other")})
    table = table.append_column("number", pa.array(range(2000)))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=1000)
    written = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(written.replace(b"\x28\xb5\x2f\xfd", b"\0\0\0\0", 1))

    files = discover([str(tmp_path)])
    schema = check_columns(files, ["text"], [])
    shards = plan(files, shard_rows=1000)
    assert len(shards) == 2
    for index, shard in enumerate(shards):
        batches = read_shard(shard, text_columns=["text"], other_columns=[], schema=schema, batch_rows=1000)
        if index in readable:
            (batch,) = batches
            assert batch.texts[0].to_pylist() == table["text"].to_pylist()[1000 * index : 1000 * (index + 1)]
        else:
            with pytest.raises(ReadError):
                list(batches)


def test_want_of_memory_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (file,) = discover([str(write(tmp_path / "a.txt", "good"))])
    assert not is_read_failure(file, pa.ArrowMemoryError("malloc of size 64 failed"))
    assert is_read_failure(file, pa.ArrowInvalid("not Parquet"))
