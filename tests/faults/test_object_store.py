"""A real S3 server, started here: commits are single PUTs, resumes list and do not look at every part."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import requests
import s3fs

from pipeline.input_schema import check_columns
from pipeline.inputs import discover
from pipeline.shards import plan
from pipeline.sink import Output
from pipeline.source import read_shard
from tests.clusters import free_ports, wait_for
from tests.faults.harness import DEADLINE_SECONDS, wait_until
from tests.integration.conftest import sentences

START_SECONDS = 180.0
# What it does not find is logged in colour.
_REQUEST = re.compile(r'"(?:\x1b\[[\d;]*m)*(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP')


class Store:
    """The server, a bucket in it, and its log of requests."""

    def __init__(self, log: Path) -> None:
        self._log = log
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stderr=file,
                stdout=file,
            )
        wait_for(self._answers, START_SECONDS, "the S3 server does not answer")
        self.files = s3fs.S3FileSystem(endpoint_url=self.url, key="k", secret="s", use_listings_cache=False)
        self.files.mkdir("bucket")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return requests.get(f"{self.url}/moto-api/", timeout=5).ok
        except requests.RequestException:
            return False

    def requests(self) -> list[tuple[str, str]]:
        """Method and path of every request so far."""
        return _REQUEST.findall(self._log.read_text())

    def rows(self, folder: str) -> list[tuple[str, int]]:
        """(file, row) of every row in the parts of a folder."""
        found = []
        for part in self.files.glob(f"{folder}/part-*.parquet"):
            with self.files.open(part) as file:
                table = pq.read_table(file, columns=["source_file", "source_row"])
            found += zip(table["source_file"].to_pylist(), table["source_row"].to_pylist(), strict=True)
        return found

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store(tmp_path / "requests.log")
    for name, value in {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # of this process: they know the server of the test before
    yield store
    store.stop()


def put_corpus(store: Store, *, files: int, rows: int) -> None:
    for i in range(files):
        with store.files.open(f"bucket/in/{i}.parquet", "wb") as file:
            pq.write_table(pa.table({"text": sentences(rows, seed=i)}), file, row_group_size=rows)


def classify(model: Path, **options: object) -> subprocess.Popen[str]:
    """The command on the bucket, in a process group of its own."""
    command = [sys.executable, "-m", "jobs.classify", "--model", model, "--input", "s3://bucket/in"]
    command += ["--output", "s3://bucket/out", "--entropy-threshold", "0.7", "--precision", "float32"]
    command += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def finish(model: Path, **options: object) -> str:
    process = classify(model, **options)
    _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    return said


def test_a_killed_run_on_a_store_resumes(store: Store, saved_model: Path) -> None:
    put_corpus(store, files=3, rows=8_000)

    def parts() -> list[str]:
        return list(store.files.glob("bucket/out/part-*.parquet"))

    first = classify(saved_model, shard_rows=400, replicas=1, threads=1)
    try:
        wait_until(lambda: len(parts()) >= 5, first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert 5 <= len(parts()) < 60
    assert not store.files.exists("bucket/out/_SUCCESS")

    finish(saved_model, shard_rows=400, replicas=1, threads=1)
    assert store.files.exists("bucket/out/_SUCCESS")
    assert len(parts()) == 60
    rows = store.rows("bucket/out")
    assert len(rows) == len(set(rows)) == 24_000

    written = Counter(
        path for method, path in store.requests() if method in ("PUT", "POST") and "/part-" in path
    )
    assert len(written) == 60
    assert not any("uploads" in path for path in written), "a part was written in several requests"


def test_parts_are_listed_not_visited(store: Store, saved_model: Path) -> None:
    put_corpus(store, files=2, rows=150)
    finish(saved_model, shard_rows=2, replicas=1)
    assert len(store.files.glob("bucket/out/part-*.parquet")) == 150

    before = len(store.requests())
    said = finish(saved_model, shard_rows=2, replicas=1)

    made = store.requests()[before:]
    assert "nothing to do: all 150 shards of 2 files are committed" in said
    assert not [path for _, path in made if "/part-" in path]
    assert not [path for _, path in made if "/in/" in path], "inputs that are known were opened"
    assert len(made) < 40, made


def test_a_pattern_costs_a_listing_and_not_requests_for_each_file(store: Store) -> None:
    put_corpus(store, files=20, rows=1)
    store.files.pipe_file("bucket/in/more.parquet/a.parquet", b"in a folder of that name")
    whole_folder = discover(["s3://bucket/in"])
    before = len(store.requests())
    assert discover(["s3://bucket/in/*.parquet"]) == whole_folder
    assert len(store.requests()) - before < 10
    assert len(whole_folder) == 21


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_reads_fetch_little_more_than_they_need(
    store: Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of a file of 12 MB, and what planning looks at."""
    texts = pa.table({"text": [os.urandom(100).hex() for _ in range(60_000)]})
    with store.files.open(f"bucket/in/a.{kind}", "wb") as file:
        match kind:
            case "parquet":
                pq.write_table(texts, file, row_group_size=4_000)
            case "jsonl":
                file.write(
                    b"".join(b'{"text": "%s"}\n' % text.encode() for text in texts["text"].to_pylist())
                )
            case "csv":
                pa.csv.write_csv(texts, file)
    fetched: list[int] = []
    fetch = s3fs.core._fetch_range

    def counting(*args: Any, **options: Any) -> bytes:
        content: bytes = fetch(*args, **options)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(s3fs.core, "_fetch_range", counting)
    files = discover(["s3://bucket/in"])
    schema = check_columns(files, ["text"], [])
    assert sum(fetched) < 2.5e6, "of the first block, or of the footer"
    shards = plan(files, shard_rows=4_000)
    if kind == "csv":
        assert len(shards) == 1, "a CSV file is read whole"
        return
    fetched.clear()
    batches = list(
        read_shard(shards[3], text_columns=["text"], other_columns=[], schema=schema, batch_rows=1024)
    )
    assert sum(len(batch.rows) for batch in batches) == 4_000
    assert sum(fetched) < 2.5e6, "of 4,000 rows of 200 bytes"


def test_a_shard_without_bad_rows_asks_once_for_those_of_an_earlier_try(store: Store) -> None:
    output = Output("s3://bucket/out")
    output.write_dead_letters("part-1.parquet", [{"row": 1}])
    before = len(store.requests())
    output.write_dead_letters("part-0.parquet", [])
    assert [method for method, _ in store.requests()[before:]] == ["GET"]
    output.write_dead_letters("part-1.parquet", [])
    assert not store.files.exists("bucket/out/_deebert/dead_letters/part-1.jsonl")


def test_setting_a_run_aside_takes_three_requests_a_part(store: Store) -> None:
    output = Output("s3://bucket/old")
    for i in range(50):
        output.write(f"part-{i:02d}.parquet", b"rows")
    output.write("_deebert/run.json", b"{}")
    before = len(store.requests())
    output.set_aside()
    assert len(store.requests()) - before <= 3 * 50 + 20
    assert output.parts() == set()
    assert len(store.files.ls("bucket/old/_deebert/aside")) == 51
