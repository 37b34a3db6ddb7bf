"""An output is one place, whoever writes to it from wherever."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import OutputError, OutputFullError, UsageError
from pipeline.records import ShardRecord, Totals
from pipeline.report.evidence import verify_parts
from pipeline.schema import RECORD_KEY
from pipeline.shard_records import RecordLog, committed, read_shard_records
from pipeline.sink import CATALOG, Output, json_line


@pytest.mark.parametrize("url", ["out", "./out", "../here/out", "file://out", "out/"])
def test_a_relative_folder_is_the_drivers_in_every_process(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sent = pickle.dumps(Output(url))
    monkeypatch.chdir(tmp_path)

    output = pickle.loads(sent)
    output.write("part-0.parquet", b"rows")

    assert output.url == str(tmp_path / "here" / "out")
    assert output.path("part-0.parquet") == str(tmp_path / "here" / "out" / "part-0.parquet")
    assert (tmp_path / "here" / "out" / "part-0.parquet").read_bytes() == b"rows"


def test_links_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may have something else behind them, and an input below one is spelled with it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    assert Output("link/out").url == str(tmp_path / "link" / "out")


def test_above_a_link_is_above_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    assert Output(f"{tmp_path}/link/../out").url == str(tmp_path / "disk" / "out")


def test_where_a_file_is_costs_no_look_at_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report asks for each of 16,384 parts."""
    output = Output(str(tmp_path / "out"))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a look at the disk")

    monkeypatch.setattr(os, "lstat", refuse)
    monkeypatch.setattr(os, "stat", refuse)
    assert output.path("part-0.parquet") == str(tmp_path / "out" / "part-0.parquet")


def test_a_home_folder_is_found() -> None:
    assert Output("~/out").url == str(Path.home() / "out")


def test_a_name_with_two_colons_is_no_chain_of_urls(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "a::b"))
    output.prepare()
    table = pa.table({"label": ["good"]})
    output.commit_part("part-0.parquet", table, {})
    assert output.url == str(tmp_path / "a::b")
    assert pq.read_table(tmp_path / "a::b" / "part-0.parquet") == table
    assert [path.name for path in tmp_path.iterdir()] == ["a::b"]
    verify_parts({output.path("part-0.parquet"): 1})


def test_a_pattern_is_no_name_on_a_store_for_removing_would_take_it_for_one(tmp_path: Path) -> None:
    for url in ("memory://out[1]", "memory://runs/*/out", "memory://out?"):
        with pytest.raises(UsageError, match=r"has one of \* \? \[ in its name"):
            Output(url)
    output = Output(str(tmp_path / "out[1]"))
    output.prepare()
    output.mark_success()
    output.remove(["_SUCCESS"])
    assert output.read("_SUCCESS") is None


def test_outputs_that_are_proved_at_the_same_time_are_both_proved(output: Output) -> None:
    with ThreadPoolExecutor(4) as pool:
        for proved in [pool.submit(output.prepare) for _ in range(200)]:
            proved.result()


def test_a_store_that_lets_nothing_be_removed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "rm", refuse)
    said = "cannot remove files from the output 'memory://out', which runs do: Access Denied; allow it"
    with pytest.raises(UsageError, match=said):
        Output("memory://out").prepare()


def test_urls_of_stores_are_left_alone() -> None:
    assert Output("memory://bucket/out").url == "memory://bucket/out"


def test_others_are_told_of_the_host_that_a_url_names() -> None:
    assert (
        Output("webhdfs://host:50070/out").path("part-0.parquet") == "webhdfs://host:50070/out/part-0.parquet"
    )
    assert Output("memory://out").path("part-0.parquet") == "memory:///out/part-0.parquet"


@pytest.mark.parametrize("kind", ["foreign", "not Parquet"])
def test_a_part_that_is_none_is_named(kind: str, tmp_path: Path) -> None:
    part = tmp_path / "part-0.parquet"
    part.write_bytes(os.urandom(100))
    if kind == "foreign":
        pq.write_table(pa.table({"a": [1]}), part)
    output = Output(str(tmp_path))
    with pytest.raises(UsageError, match=rf"the part '{part}' is damaged, or `classify` did not write it \("):
        read_shard_records(output, output.parts())


@pytest.fixture(params=["file", "object store"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    return Output(str(tmp_path / "out") if request.param == "file" else f"memory://{uuid.uuid4()}")


def test_a_file_is_on_the_disk_before_its_name_is_and_its_name_before_it_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(descriptor: int) -> None:
        done.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noting_replace(self: Path, target: Path) -> Path:
        done.append(("rename", self.stat().st_ino))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    Output(str(tmp_path)).write("part-0.parquet", b"rows")
    part, folder = (path.stat().st_ino for path in (tmp_path / "part-0.parquet", tmp_path))
    assert done == [("fsync", part), ("rename", part), ("fsync", folder)]


def test_what_another_driver_sweeps_away_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report may be written, and a second driver prove its output, while a run starts or ends."""
    output, swept = Output(str(tmp_path)), list[str]()

    def sweep(point: str) -> None:
        if not swept:
            swept.append(point)
            output.sweep()

    monkeypatch.setattr("pipeline.sink.sabotage.reach", sweep)
    output.write("_deebert/report.html", b"page")
    assert (output.read("_deebert/report.html"), swept) == (b"page", ["file-written"])


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_what_finds_no_room_takes_none_and_says_so(
    full: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(full, os.strerror(full))

    monkeypatch.setattr(os, "fsync", refuse)
    said = f"no room for .*: {os.strerror(full)}; make room, the same command resumes"
    with pytest.raises(OutputFullError, match=said):
        Output(str(tmp_path)).write("part-0.parquet", b"rows")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


PARTS = [f"part-{i}.parquet" for i in range(40)]


def begun(output: Output) -> Output:
    for part in PARTS:
        output.write(part, part.encode())
    for part in PARTS[::2]:
        output.write_dead_letters(part, [{"row": 1}])
    output.write("_deebert/run.json", b"{}")
    output.write("_deebert/shards/a.jsonl", b"")
    output.write(CATALOG, b"what is in the inputs")
    output.mark_success()
    return output


def test_what_is_set_aside_is_all_there_and_hidden(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    move = Output._move_aside

    def noting(self: Output, name: str) -> None:
        move(self, name)
        moved.append(name)

    monkeypatch.setattr(Output, "_move_aside", noting)
    begun(output).set_aside()
    assert output.parts() == set()
    assert output.read("_SUCCESS") is None
    assert {part: output.read(f"_deebert/aside/{part}") for part in PARTS} == {p: p.encode() for p in PARTS}
    assert output.read("_deebert/aside/_deebert/dead_letters/part-0.jsonl") == b'{"row": 1}\n'
    assert output.read(CATALOG) == b"what is in the inputs"
    assert set(moved[:40]) == set(PARTS)
    assert moved[-1] == "_deebert/run.json", "without it, what is left would be nobody's"


def test_parts_go_with_their_dead_letters_and_others_stay(output: Output) -> None:
    begun(output).remove_parts({PARTS[0], PARTS[1]})
    assert output.parts() == set(PARTS[2:])
    assert output.read("_deebert/dead_letters/part-0.jsonl") is None
    assert output.read("_deebert/dead_letters/part-2.jsonl") is not None
    output.remove_parts(set())
    assert output.parts() == set(PARTS[2:])


def test_dead_letters_of_shards_that_are_neither_planned_nor_committed_go(output: Output) -> None:
    output.keep_dead_letters(set())
    begun(output).keep_dead_letters({PARTS[0], "part-new.parquet"})
    assert output.read("_deebert/dead_letters/part-0.jsonl") is not None
    assert output.read("_deebert/dead_letters/part-2.jsonl") is None
    assert output.parts() == set(PARTS)


def test_dead_letters_of_an_earlier_try_are_replaced_also_by_none(output: Output) -> None:
    letters = "_deebert/dead_letters/part-0.jsonl"
    output.write_dead_letters("part-0.parquet", [])
    assert output.read(letters) is None
    output.write_dead_letters("part-0.parquet", [{"row": 1}])
    output.write_dead_letters("part-0.parquet", [{"row": 2}])
    assert output.read(letters) == b'{"row": 2}\n'
    output.write_dead_letters("part-0.parquet", [])
    assert output.read(letters) is None


class TestADriverWithErrorsOfItsOwn:
    """What stores' drivers raise is not always an OSError."""

    @pytest.fixture(autouse=True)
    def without_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise RuntimeError("Unable to locate credentials")

        monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)

    def test_is_misuse_before_the_run(self) -> None:
        with pytest.raises(UsageError, match="cannot write to the output 'memory://out': Unable to locate"):
            Output("memory://out").prepare()

    def test_is_one_sentence_where_something_is_read(self) -> None:
        with pytest.raises(
            OutputError, match=r"cannot read memory:///?out/_deebert/run.json: Unable to locate"
        ):
            Output("memory://out").read_run()


@pytest.mark.parametrize(
    ("denied", "asked", "said"),
    [
        ("ls", Output.parts, "cannot list memory:///?denied/: "),
        (
            "ls",
            lambda output: output.remove_parts({PARTS[0]}),
            "cannot list memory:///?denied/_deebert/dead_letters: ",
        ),
        ("rm", lambda output: output.remove_parts({PARTS[0]}), "cannot remove parts from memory://denied: "),
        ("rm", lambda output: output.remove(["_SUCCESS"]), "cannot remove memory:///?denied/_SUCCESS: "),
        ("cp_file", Output.set_aside, "cannot set aside memory:///?denied/part-0.parquet: "),
        ("cat_file", Output.mark_success, "cannot read memory:///?denied/_SUCCESS: "),
        (
            "cat_file",
            lambda output: committed(output, PARTS[0]),
            "cannot read memory:///?denied/part-0.parquet: ",
        ),
        (
            "cat_file",
            lambda output: read_shard_records(output, set()),
            "cannot read memory:///?denied/_deebert/shards/a.jsonl: ",
        ),
    ],
)
def test_what_a_store_denies_is_one_sentence(
    denied: str, asked: Callable[[Output], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = begun(Output("memory://denied"))

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, denied, refuse)
    with pytest.raises(OutputError, match=f"^{said}Access Denied$"):
        asked(output)


RECORD = ShardRecord(
    part="", source_file="in", first_row=0, replica="h:1", finished_at="", totals=Totals.zero(2)
)


def log_records(output: Output, names: list[str]) -> None:
    """Records of parts of these names."""
    records = RecordLog(output, "now")
    for name in names:
        records.append(dataclasses.replace(RECORD, part=name))
    records.close()


def test_records_that_could_not_be_written_come_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(f"memory://{uuid.uuid4()}")
    pipe_file, fails = MemoryFileSystem.pipe_file, [True, False]

    def flaky(self: MemoryFileSystem, *args: object, **options: object) -> None:
        if fails.pop(0):
            raise RuntimeError("slow down")
        pipe_file(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", flaky)
    names = [f"part-{i}.parquet" for i in range(100)]
    log_records(output, names)
    assert fails == []
    assert read_shard_records(output, set(names)).keys() == set(names)


def test_a_store_gets_an_object_for_every_64_records() -> None:
    output = Output(f"memory://{uuid.uuid4()}")
    names = [f"part-{i}.parquet" for i in range(65)]
    log_records(output, names)
    objects = MemoryFileSystem().ls(output.path("_deebert/shards"), detail=False)
    assert [MemoryFileSystem().cat_file(name).count(b"\n") for name in sorted(objects)] == [64, 1]
    assert read_shard_records(output, set(names)).keys() == set(names)


def test_records_of_parts_that_are_gone_do_not_count(output: Output) -> None:
    log_records(output, ["part-0.parquet", "part-1.parquet"])
    assert read_shard_records(output, {"part-1.parquet"}).keys() == {"part-1.parquet"}


def test_the_record_of_a_part_that_is_made_again_is_the_new_one_s(output: Output) -> None:
    """Its driver may be killed before it has said so: what an earlier one said is not what is there."""
    log_records(output, ["part-0.parquet", "part-1.parquet"])
    assert read_shard_records(output, {"part-1.parquet"}, redone={"part-0.parquet"}).keys() == {
        "part-1.parquet"
    }

    redone = dataclasses.replace(RECORD, part="part-0.parquet", first_row=7)
    metadata = {RECORD_KEY: json_line(redone.to_dict())}
    output.commit_part("part-0.parquet", pa.table({"label": ["good"]}), metadata)
    records = read_shard_records(output, {"part-0.parquet", "part-1.parquet"})
    assert [records[f"part-{i}.parquet"].first_row for i in (0, 1)] == [7, 0]


def test_records_are_not_written_again_where_no_part_is(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_records(output, ["part-0.parquet"])
    monkeypatch.delattr(Output, "write")
    read_shard_records(output, {"part-0.parquet"}, redone={"part-1.parquet"})


def test_many_totals_are_summed_as_one_after_the_other() -> None:
    zero = Totals.zero(2)
    many = [
        dataclasses.replace(
            zero,
            rows=rows,
            exit_rows=(0, rows, 1),
            compute=dataclasses.replace(zero.compute, seconds=(0.1 * rows, 0.0)),
            hardware={"one": rows, f"other {rows % 2}": 1, "none": 0},
        )
        for rows in range(5)
    ]
    total = zero
    for each in many:
        total += each
    assert zero.plus(many) == total
    assert (total.rows, total.exit_rows, total.hardware) == (
        10,
        (0, 10, 5),
        {"one": 10, "other 0": 3, "other 1": 2},
    )
    assert zero.plus([]) == zero
