"""Which parts of an output a plan keeps, redoes or leaves alone: on real files, without Ray."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import shards
from pipeline.config import ClassifyConfig
from pipeline.errors import RunFailedError, UsageError
from pipeline.inputs import InputFile
from pipeline.planning import RunPlan, can_go_on, check_output, make_plan
from pipeline.records import RunRecord, Totals
from pipeline.run import classify
from pipeline.sink import SUCCESS, Output
from tests.run_by_hand import RECORD

DEAD_LETTERS = "_deebert/dead_letters"


@pytest.fixture
def config(saved_model: Path, tmp_path: Path) -> ClassifyConfig:
    """A run on two files of one shard each."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": [name, "good"]}), tmp_path / "in" / f"{name}.parquet")
    return ClassifyConfig(
        model=str(saved_model),
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        precision="float32",
    )


def planned(config: ClassifyConfig) -> RunPlan:
    return make_plan(config, has_gpu=False)


def record_of(run: RunPlan) -> SimpleNamespace:
    """What `check_output` reads of the record of a run like this one."""
    return SimpleNamespace(
        identity=run.identity,
        model=run.model,
        shard_rows=run.shard_rows,
        columns=run.columns,
        id_column=run.config.id_column or "",
        status="succeeded",
    )


def finished(run: RunPlan) -> RunRecord:
    """What a run leaves that has committed every shard."""
    return RunRecord(
        status="succeeded",
        software_version="0",
        identity=run.identity,
        model=run.model,
        inputs=run.config.inputs,
        planned_shards=len(run.shards),
        planned_files=len(run.files),
        shard_rows=run.shard_rows,
        columns=run.columns,
        totals=replace(Totals.zero(run.model.num_layers), shards=len(run.shards)),
        attempts=(),
    )


def commit(run: RunPlan, output: Output) -> set[str]:
    """The parts that the run would commit, each with a dead letter."""
    for part in run.shards:
        output.write(part, b"committed")
        output.write_dead_letters(part, [{"reason": "bad"}])
    output.mark_success()
    return set(run.shards)


def names_of_letters(output: Output) -> set[str]:
    return {path.stem for path in Path(output.path(DEAD_LETTERS)).iterdir()}


def test_a_micro_batch_may_hold_one_text_and_no_less(config):
    run = planned(replace(config, max_length=16, micro_batch_tokens=16))
    assert run.identity.max_length == 16
    with pytest.raises(UsageError, match="--micro-batch-tokens 15 cannot hold one text of --max-length 16: "):
        planned(replace(config, max_length=16, micro_batch_tokens=15))


def test_one_path_and_one_kept_column_are_planned_as_tuples_of_one(config, tmp_path):
    (source,) = config.inputs
    alike = replace(config, id_column="text", keep_columns="text")
    one, several = planned(replace(alike, input=source)), planned(replace(alike, keep_columns=("text",)))
    assert (one.shards, one.columns) == (several.shards, several.columns)


@pytest.mark.parametrize(
    ("threshold", "may_exit"),
    [(None, False), (-1.0, False), (0.0, False), ((None,) * 3 + (0.5,), True), (0.5, True)],
)
def test_rows_may_exit_where_some_threshold_can_fire(config, threshold, may_exit):
    assert planned(replace(config, entropy_threshold=threshold)).may_exit is may_exit


def test_a_whole_number_is_the_same_policy_as_its_float(config):
    one, same = (planned(replace(config, entropy_threshold=value)) for value in (1, 1.0))
    assert one.identity == same.identity
    assert one.identity.exit_policy == {"type": "entropy", "thresholds": 1.0}


@pytest.mark.parametrize("control", [0.0, 0.5])
def test_a_finished_run_says_what_control_would_need(config, caplog, monkeypatch, control):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run, output = planned(config), Output(config.output)
    output.prepare()
    commit(run, output)
    output.write_run(finished(run))

    with caplog.at_level(logging.INFO, "pipeline.run"):
        assert classify(replace(config, control=control)).new_shards == 0

    (said,) = caplog.messages
    nothing = "nothing to do: all 2 shards of 2 files are committed"
    advice = "; --control measures rows as they are classified, and none are: add --overwrite"
    assert said == (nothing + advice if control else nothing)


class Clock:
    """Stands still but where it is moved."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def without_rows(folder: Path) -> str:
    """A file that its footer says is empty: no shard, and nothing to start Ray for."""
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "empty.parquet")
    return str(folder / "empty.parquet")


def test_the_time_of_planning_is_the_attempt_s(config, tmp_path, monkeypatch):
    """It reads every byte of JSON lines, which of a large corpus takes long."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    clock = Clock()

    def plan_slowly(*args: object, **options: object) -> RunPlan:
        clock.now += 7
        return make_plan(*args, **options)

    monkeypatch.setattr("pipeline.run.time", clock)
    monkeypatch.setattr("pipeline.run.make_plan", plan_slowly)
    (attempt,) = classify(replace(config, input=without_rows(tmp_path))).record.attempts
    assert attempt.wall_seconds == 7


def test_a_part_that_another_run_s_replica_commits_meanwhile_is_no_success(config, tmp_path, monkeypatch):
    """A node that was cut off knows nothing of --overwrite: its rows would be there twice."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    output = Output(config.output)
    empty = replace(config, input=without_rows(tmp_path))

    def commit_late(point: str) -> None:
        if point == "run-finishing":
            output.write("part-late.parquet", b"rows")

    monkeypatch.setattr("pipeline.run.sabotage.reach", commit_late)
    with pytest.raises(RunFailedError, match=r"1 parts .* \(first part-late\.parquet\): .* delete them, and"):
        classify(empty)
    assert output.read(SUCCESS) is None

    monkeypatch.setattr("pipeline.run.sabotage.reach", lambda point: None)
    output.remove(["part-late.parquet"])
    assert classify(empty).record.status == "succeeded"


class TestOutputInsideTheInput:
    @pytest.mark.parametrize("output", ["in/out", "jobs/../in/out", "link/out", "./in//out/"])
    @pytest.mark.parametrize("source", ["in", "jobs/../in", "link", "./in"])
    def test_is_left_out_however_the_two_are_spelled(self, config, tmp_path, monkeypatch, source, output):
        (tmp_path / "jobs").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "in")
        (tmp_path / "in" / "out").mkdir()
        pq.write_table(pa.table({"text": ["an answer"]}), tmp_path / "in" / "out" / "part-0.parquet")
        monkeypatch.chdir(tmp_path)
        run = planned(replace(config, input=(source,), output=output))
        assert [Path(file.path).name for file in run.files] == ["a.parquet", "b.parquet"]

    def test_a_neighbour_whose_name_begins_alike_is_input(self, config, tmp_path):
        (tmp_path / "in" / "output").mkdir()
        pq.write_table(pa.table({"text": ["no answer"]}), tmp_path / "in" / "output" / "c.parquet")
        run = planned(replace(config, output=str(tmp_path / "in" / "out")))
        assert [Path(file.path).name for file in run.files] == ["a.parquet", "b.parquet", "c.parquet"]

    def test_on_a_store(self, config):
        content = b"one\n"
        fsspec.filesystem("memory").pipe({"/inside/a.txt": content, "/inside/out/part-0.txt": content})
        run = planned(replace(config, input=("memory://inside",), output="memory://inside/out"))
        assert [file.path for file in run.files] == ["memory:///inside/a.txt"]


class TestOneTable:
    """An output holds rows of one kind, however often it is gone on with."""

    @pytest.fixture
    def with_ids(self, config: ClassifyConfig, tmp_path: Path) -> ClassifyConfig:
        rows = {"text": ["one"], "doc": ["D"], "user": ["U"], "weight": [1.0]}
        for name in ("a", "b"):
            pq.write_table(pa.table(rows), tmp_path / "in" / f"{name}.parquet")
        return replace(config, id_column="doc")

    @pytest.mark.parametrize(
        ("first", "second", "says"),
        [
            ("doc", "user", "begun with --id-column doc, this run is with --id-column user: "),
            ("doc", None, "begun with --id-column doc, this run is without --id-column: "),
            (None, "doc", "begun without --id-column, this run is with --id-column doc: "),
        ],
    )
    def test_ids_of_another_kind_are_refused(self, with_ids, first, second, says):
        earlier = record_of(planned(replace(with_ids, id_column=first)))
        run = planned(replace(with_ids, id_column=second))
        with pytest.raises(UsageError, match=says):
            check_output(run, Output(with_ids.output), earlier)
        earlier.status = "failed"
        assert not can_go_on(run, earlier)

    def test_a_record_that_does_not_say_which_ids_is_gone_on_with(self, with_ids):
        run = planned(with_ids)
        earlier = record_of(run)
        earlier.id_column, earlier.status = None, "failed"
        assert check_output(run, Output(with_ids.output), earlier) == set()
        assert can_go_on(run, earlier)
        values = RECORD.to_dict()
        del values["id_column"]
        assert RunRecord.from_dict(values).id_column is None

    def test_the_same_weights_with_labels_of_other_names_are_refused(self, config, tmp_path):
        shutil.copytree(config.model, tmp_path / "renamed")
        path = tmp_path / "renamed" / "config.json"
        settings = json.loads(path.read_text())
        names = list(settings["id2label"].values())[::-1]
        settings["id2label"] = {str(number): name for number, name in enumerate(names)}
        settings["label2id"] = {name: number for number, name in enumerate(names)}
        path.write_text(json.dumps(settings))
        earlier = record_of(planned(config))
        run = planned(replace(config, model=str(tmp_path / "renamed")))
        assert run.identity == earlier.identity
        with pytest.raises(UsageError, match=r"holds answers with the labels .*, this model's are "):
            check_output(run, Output(config.output), earlier)
        earlier.status = "failed"
        assert not can_go_on(run, earlier)

    def test_kept_columns_in_another_order_are_refused(self, with_ids):
        earlier = record_of(planned(replace(with_ids, keep_columns=("user", "weight"))))
        run = planned(replace(with_ids, keep_columns=("weight", "user")))
        with pytest.raises(UsageError, match=r"first difference: user string, now weight double.*same order"):
            check_output(run, Output(with_ids.output), earlier)

    def test_a_column_more_is_refused(self, with_ids):
        earlier = record_of(planned(with_ids))
        run = planned(replace(with_ids, probabilities=True))
        with pytest.raises(UsageError, match="first difference: none, now probabilities list"):
            check_output(run, Output(with_ids.output), earlier)

    @pytest.mark.parametrize(
        ("keep", "says"),
        [
            (("Label",), "--keep-columns Label is the name of an output column"),
            (("user", "User"), "--keep-columns user and User are one name to readers that ignore case"),
        ],
    )
    def test_kept_names_that_differ_in_case_alone_are_refused(self, config, keep, says):
        with pytest.raises(UsageError, match=says):
            planned(replace(config, keep_columns=keep))

    def test_a_kept_type_that_parquet_cannot_hold_is_refused(self, config, tmp_path):
        spans = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
        table = pa.table({"text": ["one"], "span": spans})
        with pa.ipc.new_file(tmp_path / "spans.arrow", table.schema) as file:
            file.write_table(table)
        says = "column 'span' is month_day_nano_interval, which Parquet cannot hold: leave it out"
        with pytest.raises(UsageError, match=says):
            planned(replace(config, input=(str(tmp_path / "spans.arrow"),), keep_columns=("span",)))


class TestAGrowingFolderOfJsonLines:
    """What types its columns have is told by the values that are there today."""

    @pytest.fixture
    def growing(self, config: ClassifyConfig, tmp_path: Path) -> ClassifyConfig:
        (tmp_path / "days").mkdir()
        return replace(
            config, input=(str(tmp_path / "days"),), keep_columns=("price", "more"), id_column="key"
        )

    def add(self, config: ClassifyConfig, name: str, **values: object) -> RunPlan:
        """The plan of the run on the output with a file more, which it leaves as a run does."""
        row = {"text": "good", "key": 1, "price": 3, "more": {"a": 1, "b": [1]}, **values}
        (Path(config.input[0]) / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        run, output = planned(config), Output(config.output)
        if (earlier := output.read_run()) is not None and not config.overwrite:
            check_output(run, output, earlier)
        output.write_run(replace(finished(run), id_column=config.id_column))
        return run

    @pytest.mark.parametrize(
        ("first", "then"),
        [
            ({"price": None}, {"price": 3}),
            ({"price": 3.5}, {"price": 3}),
            ({"key": "a"}, {"key": 7}),
            ({"more": {"a": 1}}, {"more": {"a": 2, "b": [1.5]}}),
            ({"more": {"b": [None]}}, {"more": {"b": ["one"], "c": {}}}),
        ],
    )
    def test_goes_on_with_the_types_it_began_with(self, growing, tmp_path, first, then):
        begun = self.add(growing, "1", **first)
        assert self.add(growing, "2", **then).columns == begun.columns
        (tmp_path / "days" / "1.jsonl").unlink()
        assert self.add(growing, "3", **then).columns == begun.columns

    def test_what_does_not_fit_is_named_with_its_file(self, growing):
        begun = self.add(growing, "1")
        with pytest.raises(
            UsageError, match=r"'price' is double in .*2\.jsonl, but the output was begun with int64: "
        ):
            self.add(growing, "2", price=3.5)
        anew = self.add(replace(growing, overwrite=True), "2", price=3.5)
        assert [now for now in anew.columns if now not in begun.columns] == ["price double"]


class TestChangedInputs:
    def test_parts_of_a_file_that_cannot_be_read_now_are_left_alone(self, config, monkeypatch):
        output = Output(config.output)
        parts = commit(planned(config), output)

        def hiccup(file: InputFile) -> object:
            if file.path.endswith("b.parquet"):
                raise OSError(5, "Input/output error")
            return opened(file)

        opened = shards.open_parquet
        monkeypatch.setattr(shards, "open_parquet", hiccup)
        for on_changed in ("refuse", "redo"):
            run = planned(replace(config, on_changed=on_changed))
            assert [shard.flaw is None for shard in run.shards.values()] == [True, False]
            assert len(check_output(run, output, record_of(run))) == 1
            assert output.parts() == parts
        assert output.read(SUCCESS) is not None

        monkeypatch.undo()
        run = planned(config)
        assert check_output(run, output, record_of(run)) == parts

    def test_a_file_that_changed_is_refused_or_its_parts_go_with_their_dead_letters(self, config, tmp_path):
        output = Output(config.output)
        parts = commit(planned(config), output)
        os.utime(tmp_path / "in" / "b.parquet", ns=(1, 1))
        run = planned(config)
        with pytest.raises(UsageError, match=r"b\.parquet' changed since .* --on-changed redo"):
            check_output(run, output, record_of(run))
        assert output.parts() == parts

        (kept,) = check_output(planned(replace(config, on_changed="redo")), output, record_of(run))
        assert output.parts() == {kept}
        assert output.read(SUCCESS) is None
        assert names_of_letters(output) == {Path(kept).stem}
