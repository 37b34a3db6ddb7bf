"""Random bytes and torn files against the CSV and JSON lines readers: each row once, good or bad, and no crash.

`python -m tests.faults.fuzz_readers MINUTES` goes on for so long and says how many files it read.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ReadError
from pipeline.input_schema import InputSchema, check_columns
from pipeline.inputs import discover
from pipeline.shards import plan
from pipeline.source import read_shard

json_pieces = st.sampled_from(
    [
        b'{"text": "',
        b'"}',
        b'{"text": null}',
        b"{}",
        b"[]",
        b"\n",
        b"\r\n",
        b" ",
        b"\t",
        b'"n": 1e400',
        b", ",
        b"\\ud83d",
        b"\\u0000",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b'"',
        b"\\",
        b"\x00",
        b"-0",
        b'{"text": "x", "text": "y"}',
        b'{"n": {"a": [1]}, "text": "z"}',
        b"\x0b",
        b"\x0c",
        "é".encode(),
        b"9" * 400,
    ]
)
csv_pieces = st.sampled_from(
    [
        b"a",
        b",",
        b'"',
        b'""',
        b"\n",
        b"\r\n",
        b"\r",
        b" ",
        b"\xff",
        b"\x00",
        b"1,2\n",
        b"x,y,z\n",
        b'"a\nb",1\n',
        "é".encode(),
        b"\xef\xbb\xbf",
        b'"' * 3,
        b"\t",
        b",,\n",
        b"," * 20,
    ]
)
anything = st.binary(max_size=40)


def documents(pieces: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(st.one_of(pieces, pieces, pieces, anything), max_size=30).map(b"".join)


def rows_of(path: Path, schema: InputSchema, shard_rows: int, split_above_bytes: int) -> list[int]:
    """The numbers of all rows, good and bad, in the order in which they come."""
    found: list[int] = []
    for shard in plan(discover([str(path)]), shard_rows=shard_rows, split_above_bytes=split_above_bytes):
        batches = read_shard(
            shard, text_columns=("text",), other_columns=("n",), schema=schema, batch_rows=shard_rows
        )
        for batch in batches:
            for column in batch.texts:
                column.validate(full=True)
                assert column.null_count == 0
            found += sorted([*batch.rows.tolist(), *(row.source_row for row in batch.bad)])
    return found


def fuzz_json_lines(folder: Path, content: bytes, shard_rows: int, split: bool) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(content)
    schema = check_columns([], ("text",), ("n",))
    found = rows_of(path, schema, shard_rows, 0 if split else 1 << 20)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert found == [i for i, line in enumerate(lines) if line.strip(b" \t\r\v\f")]


def fuzz_csv(folder: Path, content: bytes, shard_rows: int) -> None:
    path = folder / "a.csv"
    path.write_bytes(b"text,n\n" + content)
    schema = check_columns(discover([str(path)]), ("text",), ("n",))
    try:
        found = rows_of(path, schema, shard_rows, 1 << 20)
    except ReadError:  # a quote that is never closed: the file is named, not torn apart
        assert content.count(b'"')
        return
    assert found == list(range(len(found)))


def checks(folder: Path, examples: int) -> list[Callable[[], None]]:
    """Both fuzzers, `examples` files each."""
    some = settings(max_examples=examples, deadline=None, database=None)

    @some
    @given(documents(json_pieces), st.integers(1, 9), st.booleans())
    def json_lines(content: bytes, shard_rows: int, split: bool) -> None:
        fuzz_json_lines(folder, content, shard_rows, split)

    @some
    @given(documents(csv_pieces), st.integers(1, 9))
    def csv(content: bytes, shard_rows: int) -> None:
        fuzz_csv(folder, content, shard_rows)

    return [json_lines, csv]


def main(minutes: float) -> None:
    deadline, rounds, examples = time.monotonic() + 60 * minutes, 0, 500
    hypothesis.settings.register_profile("fuzz", derandomize=False)
    hypothesis.settings.load_profile("fuzz")
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < deadline:
            for check in checks(Path(folder), examples):
                hypothesis.seed(rounds)(check)()
            rounds += 1
    print(f"{2 * rounds * examples:,} files in {minutes:g} minutes, each row once, no crash")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
