"""What a replica makes of a shard: its part, its dead letters, or why there is none. Ray stands aside here."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deebert.errors import PrecisionError
from deebert.exit_policy import EntropyThreshold
from deebert.modeling import DeeBertForSequenceClassification
from pipeline.board import Board
from pipeline.errors import OutputFullError
from pipeline.hardware import cpu_name
from pipeline.input_schema import check_columns
from pipeline.inputs import discover
from pipeline.records import Identity, ShardRecord
from pipeline.replica import Replica, ReplicaSpec, ServedModel, ShardFailure, too_many_bad_rows
from pipeline.shard import Shard, part_name
from pipeline.shard_work import ShardWork
from pipeline.shards import plan
from pipeline.sink import Output
from pipeline.tokenization import TextTokenizer
from tests.conftest import REPOSITORY, fused_model, make_model, make_tokenizer

LABELS = ("negative", "neutral", "positive")
DIGEST = "0" * 64


class Here:
    """An actor in this process, whose answers need no waiting for."""

    def __init__(self, actor: object) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


@pytest.fixture(autouse=True)
def ray_stands_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.replica.ray", SimpleNamespace(get=lambda asked: asked))


def spec_of(
    tmp_path: Path,
    shard: Shard,
    *,
    model: DeeBertForSequenceClassification | None = None,
    precision: str = "float32",
    max_bad_rows: int = 100,
    id_column: str | None = None,
    keep_columns: tuple[str, ...] = (),
) -> ReplicaSpec:
    others = (*((id_column,) if id_column else ()), *keep_columns)
    return ReplicaSpec(
        identity=Identity(
            model_digest="m",
            exit_policy=EntropyThreshold(0.45).to_dict(),
            tokenizer_digest="t",
            text_columns=("text",),
            max_length=64,
            precision=precision,
            digest=DIGEST,
        ),
        model=ServedModel(
            fused=fused_model(model or make_model()),
            tokenizer=TextTokenizer(make_tokenizer(), max_length=64),
            labels=LABELS,
        ),
        device="cpu",
        threads=1,
        shards_in_flight=4,
        micro_batch_tokens=1024,
        schema=check_columns([shard.source], ("text",), others),
        id_column=id_column,
        keep_columns=keep_columns,
        control=0.25,
        probabilities=True,
        max_bad_rows=max_bad_rows,
        hang_seconds=3600.0,
        output=Output(str(tmp_path / "out")),
        board=Here(Board()),
    )


def outcome(spec: ReplicaSpec, shard: Shard) -> ShardRecord | ShardFailure:
    answered = Replica(spec)({"shard": np.array([pickle.dumps(shard)], dtype=object)})
    found: ShardRecord | ShardFailure = pickle.loads(answered["outcome"][0])
    return found


def shard_of(path: Path) -> Shard:
    (shard,) = plan(discover([str(path)]), shard_rows=1_000_000)
    return shard


def write_csv(path: Path, rows: int) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{'good film ' * (1 + row % 7)},{row},kept {row}" for row in range(rows)]
    path.write_text("\n".join(["text,id,other", *lines, ""]))
    return shard_of(path)


def part(spec: ReplicaSpec, shard: Shard) -> Path:
    return Path(spec.output.path(part_name(shard, DIGEST)))


_COUNT_THREADS = """
import sys
from pathlib import Path
from types import SimpleNamespace

import pipeline.replica
from tests.unit.test_replica import spec_of, write_csv

pipeline.replica.ray = SimpleNamespace(get=lambda asked: asked)
folder = Path(sys.argv[1])
spec = spec_of(folder, write_csv(folder / "a.csv", rows=1))
replica = pipeline.replica.Replica(spec)
before = len([*Path("/proc/self/task").iterdir()])
spec.model.tokenizer(["good film"] * 100)
print(len([*Path("/proc/self/task").iterdir()]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads in")
def test_its_tokenizer_takes_as_many_threads_as_it_was_given_and_not_one_for_each_core(
    tmp_path: Path,
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT_THREADS, tmp_path],
        # What Rayon itself takes for the number of cores: twenty, whatever runs the test.
        env=environment | {"RAYON_RS_NUM_CPUS": "20"},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(counted.stdout) == 1


class TestPart:
    def test_its_arrays_are_as_long_as_what_was_read_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An array of strings ends at 2 GiB; a compressed file, which is one shard, need not."""
        shard = write_csv(tmp_path / ("long" * 60) / "a.csv", rows=2500)
        spec = spec_of(tmp_path, shard, id_column="id", keep_columns=("other",))
        committed: list[pa.Table] = []
        commit_part = Output.commit_part

        def seen(output: Output, name: str, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
            committed.append(table)
            commit_part(output, name, table, metadata)

        monkeypatch.setattr(Output, "commit_part", seen)
        record = outcome(spec, shard)

        (table,) = committed
        assert isinstance(record, ShardRecord)
        assert (record.totals.rows, sum(record.totals.exit_rows)) == (2500, 2500)
        assert record.totals.hardware == {cpu_name(): 2500}
        for name in table.column_names:
            chunks = [len(chunk) for chunk in table[name].chunks]
            assert sum(chunks) == 2500, name
            assert max(chunks) <= 1024, name
        found = pq.read_table(part(spec, shard))
        assert found.equals(table)
        assert found["row_id"].to_pylist() == [str(row) for row in range(2500)]
        assert found["source_row"].to_pylist() == list(range(2500))
        assert found["other"].to_pylist() == [f"kept {row}" for row in range(2500)]
        assert set(found["source_file"].to_pylist()) == {shard.source.path}
        assert [LABELS[i] for i in found["prediction"].to_pylist()] == found["label"].to_pylist()
        assert columns(pq.read_metadata(part(spec, shard))) == columns(written(table.combine_chunks()))

    def test_without_rows_it_has_the_same_columns(self, tmp_path: Path) -> None:
        schemas = []
        for text in ("good", None):
            path = tmp_path / f"{text}.jsonl"
            path.write_text(json.dumps({"text": text, "other": "kept"}) + "\n")
            shard = shard_of(path)
            spec = spec_of(tmp_path, shard, keep_columns=("other",))
            record = outcome(spec, shard)
            assert isinstance(record, ShardRecord)
            assert record.totals.rows == (text is not None)
            schemas.append(pq.read_schema(part(spec, shard)).remove_metadata())

        assert schemas[0] == schemas[1]

    def test_what_arrow_refuses_of_one_shard_is_no_other_s_concern(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard = write_csv(tmp_path / "in" / "a.csv", rows=3)
        spec = spec_of(tmp_path, shard)

        failure = failing_commit(monkeypatch, spec, shard, pa.ArrowCapacityError("array cannot contain more"))

        assert not failure.is_fatal
        assert failure.reason == (
            f"{part_name(shard, DIGEST)} cannot be written: ArrowCapacityError: array cannot contain more"
        )

    def test_a_full_disk_is_every_shard_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shard = write_csv(tmp_path / "in" / "a.csv", rows=3)

        failure = failing_commit(monkeypatch, spec_of(tmp_path, shard), shard, OutputFullError("no room"))

        assert (failure.is_fatal, failure.reason) == (True, "no room")


def read_with(tmp_path: Path, tokenizer: TextTokenizer) -> tuple[ShardRecord, list[dict[str, Any]]]:
    """Texts of 1, 14, 15 and 40 words: what their replica reports, and their rows."""
    path = tmp_path / "a.txt"
    path.write_text("".join(" ".join(["film"] * words) + "\n" for words in (1, 14, 15, 40)))
    shard = shard_of(path)
    spec = spec_of(tmp_path, shard)
    spec = replace(
        spec,
        identity=replace(spec.identity, window_stride=tokenizer.window_stride),
        model=replace(spec.model, tokenizer=tokenizer),
    )
    record = outcome(spec, shard)
    assert isinstance(record, ShardRecord)
    return record, pq.read_table(part(spec, shard)).to_pylist()


class TestLongRows:
    def test_say_that_they_are_cut_and_count_what_is_left_of_them(self, tmp_path: Path) -> None:
        record, rows = read_with(tmp_path, TextTokenizer(make_tokenizer(), max_length=16))

        assert [row["num_tokens"] for row in rows] == [3, 16, 16, 16]
        assert [row["truncated"] for row in rows] == [False, False, True, True]
        assert "num_windows" not in rows[0]
        totals = record.totals
        assert (totals.truncated_rows, totals.tokens, totals.squared_tokens) == (2, 51, 9 + 3 * 256)
        assert sum(totals.exit_windows) == sum(totals.exit_rows) == 4

    def test_count_their_windows_and_the_tokens_of_all_of_them(self, tmp_path: Path) -> None:
        tokenizer = TextTokenizer(make_tokenizer(), max_length=16, window_stride=4)

        record, rows = read_with(tmp_path, tokenizer)

        # Of 14 words, 4 of them shared: 15 are 14 and 5; 40 are 14, 14, 14 and 10. Two special tokens in each.
        assert [row["num_windows"] for row in rows] == [1, 1, 2, 4]
        assert [row["num_tokens"] for row in rows] == [3, 16, 16 + 7, 3 * 16 + 12]
        assert not any(row["truncated"] for row in rows)
        totals = record.totals
        assert (totals.truncated_rows, totals.tokens) == (0, 3 + 16 + 23 + 60)
        assert totals.squared_tokens == 9 + 256 + (256 + 49) + (3 * 256 + 144)
        assert (sum(totals.exit_windows), sum(totals.exit_rows)) == (8, 4)


class Clock:
    """Stands still but where it is moved."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_seconds_of_one_name_add_up_whatever_becomes_of_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("pipeline.shard_work.time", clock)
    work = ShardWork(shard=write_csv(tmp_path / "a.csv", rows=1))

    with work.timing("read_seconds"):
        clock.now += 2
    with work.timing("tokenize_seconds"):
        clock.now += 16
    with suppress(OSError), work.timing("read_seconds"):
        clock.now += 4
        raise OSError("gone")

    assert (work.read_seconds, work.tokenize_seconds) == (6, 16)


def columns(footer: Any) -> list[tuple[Any, ...]]:
    """Of the only row group: what each column is called, how it is encoded, and how large it is."""
    assert footer.num_row_groups == 1
    found = [footer.row_group(0).column(i) for i in range(footer.num_columns)]
    return [(c.path_in_schema, c.encodings, c.num_values, c.total_uncompressed_size) for c in found]


def written(table: pa.Table) -> Any:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream, compression="zstd")
    return pq.read_metadata(pa.BufferReader(stream.getvalue()))


def failing_commit(
    monkeypatch: pytest.MonkeyPatch, spec: ReplicaSpec, shard: Shard, error: Exception
) -> ShardFailure:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Output, "commit_part", fail)
    failure = outcome(spec, shard)
    assert isinstance(failure, ShardFailure)
    return failure


def bad_and_good_lines(path: Path, *, bad: int, good: int) -> Shard:
    path.write_text('{"text": null}\n' * bad + '{"text": "good"}\n' * good)
    return shard_of(path)


class TestBadRows:
    def test_more_than_the_run_allows_end_it_before_the_rest_is_read(self, tmp_path: Path) -> None:
        shard = bad_and_good_lines(tmp_path / "a.jsonl", bad=3000, good=1)
        spec = spec_of(tmp_path, shard, max_bad_rows=20)

        failure = outcome(spec, shard)

        assert isinstance(failure, ShardFailure)
        assert failure.is_fatal
        letters = [json.loads(line) for line in dead_letters(spec).read_text().splitlines()]
        assert 20 < len(letters) < 3000
        assert [letter["source_row"] for letter in letters] == list(range(len(letters)))
        assert failure.reason == too_many_bad_rows(len(letters), 20, spec.output)
        assert f"{len(letters)} rows cannot be classified, more than --max-bad-rows 20: see" in failure.reason
        assert not part(spec, shard).exists()

    def test_as_many_as_it_allows_are_set_aside(self, tmp_path: Path) -> None:
        shard = bad_and_good_lines(tmp_path / "a.jsonl", bad=20, good=2)
        spec = spec_of(tmp_path, shard, max_bad_rows=20)

        record = outcome(spec, shard)

        assert isinstance(record, ShardRecord)
        assert (record.totals.rows, record.totals.bad_rows) == (2, 20)
        assert len(dead_letters(spec).read_text().splitlines()) == 20


def dead_letters(spec: ReplicaSpec) -> Path:
    (file,) = Path(spec.output.path("_deebert/dead_letters")).iterdir()
    return file


class TestErrors:
    def test_answers_that_are_not_numbers_end_the_run(self, tmp_path: Path) -> None:
        model = make_model()
        with torch.no_grad():
            model.backbone.encoder.layer[1].output.dense.weight.mul_(3e5)
        shard = write_csv(tmp_path / "in" / "a.csv", rows=30)

        failure = outcome(spec_of(tmp_path, shard, model=model, precision="float16"), shard)

        assert isinstance(failure, ShardFailure)
        assert failure.is_fatal
        assert failure.reason.startswith("the model's answers after layer ")
        assert failure.reason.endswith(
            "are not finite numbers in float16: classify in float32 or bfloat16, or train it again"
        )

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(None, r"cannot read .*/part-.*: Is a directory"), (b"no Parquet", "the part '.*' is damaged, or ")],
    )
    def test_a_part_that_may_be_committed_and_cannot_be_read_is_a_failed_shard(
        self, tmp_path: Path, content: bytes | None, reason: str
    ) -> None:
        shard = write_csv(tmp_path / "in" / "a.csv", rows=3)
        spec = spec_of(tmp_path, shard)
        if content is None:
            part(spec, shard).mkdir(parents=True)
        else:
            spec.output.write(part(spec, shard).name, content)
        spec.board.end.remote(part(spec, shard).name)

        failure = outcome(spec, shard)

        assert isinstance(failure, ShardFailure)
        assert not failure.is_fatal
        assert re.match(reason, failure.reason)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError(),
            MemoryError(),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        ],
    )
    def test_the_end_of_memory_ends_the_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def end(code: int) -> None:
            raise SystemExit(code)

        monkeypatch.setattr("pipeline.replica.os._exit", end)
        shard = write_csv(tmp_path / "in" / "a.csv", rows=3)
        with pytest.raises(SystemExit, match="1"):
            failing_commit(monkeypatch, spec_of(tmp_path, shard), shard, error)

    def test_a_precision_that_this_machine_lacks_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The driver resolved it on its own machine."""
        monkeypatch.setattr("deebert.precision._cpu_multiplies_int8", lambda: False)
        shard = write_csv(tmp_path / "in" / "a.csv", rows=3)

        with pytest.raises(PrecisionError, match="int8 needs a CPU with VNNI, which this one has not"):
            Replica(spec_of(tmp_path, shard, precision="int8"))
