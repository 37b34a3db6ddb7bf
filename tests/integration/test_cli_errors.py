"""Misuse is refused before Ray starts: one sentence that names the thing and the remedy, exit code 2."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transformers
from huggingface_hub.utils import _http
from transformers import BertConfig, BertModel

from jobs import cli
from pipeline.config import ClassifyConfig
from pipeline.planning import make_plan
from pipeline.records import RunRecord, Totals
from pipeline.sink import Output

Refusal = Callable[..., str]
NOWHERE = (
    "there is no such folder here, and the hub cannot be asked for that name: check the path, or the network"
)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starting Ray is an error; what the entry points set for their process is undone."""

    # A process of its own turns bars off before it imports this library.
    transformers.utils.logging.disable_progress_bar()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    quieted = ("httpx", "datasets", "fsspec", "matplotlib", _http.logger.name)
    levels = {name: logging.getLogger(name).level for name in quieted}
    yield
    signal.signal(signal.SIGTERM, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A Parquet file with texts, ids and a column called `label`."""
    path = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"text": ["good film", "bad film"], "number": [1, 2], "label": ["a", "b"]}), path)
    return path


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Runs a command line that must be refused; returns what it says after ``deebert VERB: ``."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return sentence(err, f"deebert {words[0]}: ")

    return run


@pytest.fixture
def refused(refusal: Refusal, saved_model: Path, texts: Path, tmp_path: Path) -> Refusal:
    """The same for `classify`, with whatever of model, input and output is not given made good."""

    def run(*words: object, **flags: object) -> str:
        given = {"model": saved_model, "input": texts, "output": tmp_path / "out", **flags}
        message = refusal("classify", *(x for k, v in given.items() for x in (f"--{k}", v)), *words)
        if "output" not in flags:
            assert not (tmp_path / "out" / "_SUCCESS").exists()
        return message

    return run


def sentence(err: str, prefix: str) -> str:
    """The one line of `err`, without its prefix."""
    assert err.count("\n") == 1, err
    assert err.startswith(prefix)
    assert "Traceback" not in err
    return err.removeprefix(prefix).rstrip("\n")


def copy_of(model: Path, folder: Path, *, without: str = "") -> Path:
    """A model folder without the files that match a pattern."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(without) if without else None)
    return folder


class TestInput:
    def test_no_such_file(self, refused: Refusal) -> None:
        assert "no such input: nowhere.parquet" in refused(input="nowhere.parquet")

    def test_a_glob_that_matches_nothing(self, refused: Refusal, tmp_path: Path) -> None:
        assert f"no file matches {tmp_path}/*.jsonl" in refused(input=f"{tmp_path}/*.jsonl")

    def test_an_unknown_format(self, refused: Refusal, tmp_path: Path) -> None:
        (tmp_path / "texts.xls").write_text("x")
        assert "known are .parquet" in refused(input=tmp_path / "texts.xls")

    def test_a_broken_file(self, refused: Refusal, tmp_path: Path) -> None:
        (tmp_path / "broken.parquet").write_bytes(b"not Parquet at all")
        assert "broken.parquet" in refused(input=tmp_path / "broken.parquet")

    def test_no_such_column_names_those_there_are(self, refused: Refusal, texts: Path) -> None:
        message = refused("--text-column", "body")
        assert message == f"{texts} has no column 'body'; its columns are: text, number, label"

    def test_no_such_kept_column(self, refused: Refusal) -> None:
        assert "no column 'author'; its columns are" in refused("--keep-columns", "number,author")

    def test_no_such_id_column(self, refused: Refusal) -> None:
        assert "no column 'uuid'; its columns are" in refused("--id-column", "uuid")

    def test_a_text_column_that_is_not_text(self, refused: Refusal) -> None:
        message = refused("--text-column", "number")
        assert "column 'number'" in message
        assert "is int64; a text column must hold strings" in message

    def test_a_kept_column_that_the_output_has_itself(self, refused: Refusal) -> None:
        message = refused("--keep-columns", "number,label")
        assert message == "--keep-columns label is the name of an output column: rename it in the input"


class TestOutput:
    def test_another_runs_output_names_the_difference(
        self, refused: Refusal, saved_model: Path, texts: Path, tmp_path: Path
    ) -> None:
        begin_run(ClassifyConfig(model=str(saved_model), input=(str(texts),), output=str(tmp_path / "out")))
        message = refused("--entropy-threshold", "0.5")
        assert "holds another run: its exit policy is " in message
        assert '"thresholds": 0.5' in message
        assert "--overwrite" in message

    @pytest.mark.parametrize(("begun", "now"), [(None, 8), (4, 8), (8, None)])
    def test_another_window_stride(
        self,
        refused: Refusal,
        saved_model: Path,
        texts: Path,
        tmp_path: Path,
        begun: int | None,
        now: int | None,
    ) -> None:
        config = ClassifyConfig(model=str(saved_model), input=(str(texts),), output=str(tmp_path / "out"))
        begin_run(dataclasses.replace(config, window_stride=begun))
        message = refused(*(() if now is None else ("--window-stride", now)))
        assert f"its window stride is {json.dumps(begun)}, this one's is {json.dumps(now)}; " in message

    def test_another_shard_size(
        self, refused: Refusal, saved_model: Path, texts: Path, tmp_path: Path
    ) -> None:
        begin_run(ClassifyConfig(model=str(saved_model), input=(str(texts),), output=str(tmp_path / "out")))
        assert "was begun with --shard-rows 4096" in refused("--shard-rows", 100)

    def test_parts_without_a_record(self, refused: Refusal, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "part-0.parquet").write_bytes(b"somebody else's")
        assert "holds 1 parts but no run record" in refused()
        assert (tmp_path / "out" / "part-0.parquet").read_bytes() == b"somebody else's"

    def test_a_record_that_cannot_be_read(self, refused: Refusal, tmp_path: Path) -> None:
        (tmp_path / "out" / "_deebert").mkdir(parents=True)
        (tmp_path / "out" / "_deebert" / "run.json").write_text("{}")
        assert (
            "has format version None, this software reads 2: use the version that wrote it, or choose another output"
            in refused()
        )

    def test_below_a_regular_file(self, refused: Refusal, texts: Path) -> None:
        assert "cannot write to the output" in refused(output=texts / "out")

    def test_a_regular_file(self, refused: Refusal, texts: Path) -> None:
        assert "cannot write to the output" in refused(output=texts)
        assert len(pq.read_table(texts)) == 2

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="the system has no /proc")
    def test_a_place_where_nothing_can_be_made(self, refused: Refusal) -> None:
        assert "cannot write to the output '/proc/out'" in refused(output="/proc/out")

    def test_an_unknown_protocol(self, refused: Refusal) -> None:
        message = refused(output="nosuch://bucket/out")
        assert message == "the output 'nosuch://bucket/out' cannot be opened: Protocol not known: nosuch"


class TestModel:
    def test_no_such_folder(self, refused: Refusal, tmp_path: Path) -> None:
        message = refused(model=tmp_path / "nowhere")
        assert message == f"no such model folder: '{tmp_path}/nowhere'; train one with `deebert train`"

    def test_neither_a_folder_nor_on_the_hub(self, refused: Refusal) -> None:
        message = refused(model="no-such-model")
        assert message == f"cannot load the model 'no-such-model': {NOWHERE}"

    def test_a_process_says_so_before_it_asks_the_hub(self) -> None:
        ended = run_python("-m", "jobs.stream", "--model", "models/nope")
        assert ended.returncode == 2
        first, last = ended.stderr.splitlines()
        assert first.endswith("INFO there is no folder 'models/nope' here: asking the hub for it")
        assert last == f"deebert stream: cannot load the model 'models/nope': {NOWHERE}"

    def test_the_hubs_library_does_not_log_each_time_that_it_asks_again(self, refused: Refusal) -> None:
        refused(model="no-such-model")
        assert not _http.logger.isEnabledFor(logging.WARNING)

    @pytest.mark.parametrize(
        ("without", "says"),
        [
            ("*.safetensors", "has no weights (model.safetensors)"),
            ("config.json", "has no config.json"),
            ("tokenizer.json", "has no tokenizer (tokenizer.json)"),
        ],
    )
    def test_an_incomplete_folder(
        self, refused: Refusal, saved_model: Path, tmp_path: Path, without: str, says: str
    ) -> None:
        folder = copy_of(saved_model, tmp_path / "incomplete", without=without)
        message = refused(model=folder)
        assert f"the model folder '{folder}' {says}: " in message

    def test_a_folder_without_some_weights(self, refused: Refusal, saved_model: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = copy_of(saved_model, tmp_path / "lacking")
        weights = load_file(folder / "model.safetensors")
        weights.pop("final_classifier.classifier.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert "lacks 1 weights, first 'final_classifier.classifier.weight'" in refused(model=folder)

    @pytest.mark.parametrize("content", [b"", b"\x00" * 100])
    def test_weights_that_cannot_be_read(
        self, refused: Refusal, saved_model: Path, tmp_path: Path, content: bytes
    ) -> None:
        folder = copy_of(saved_model, tmp_path / "broken")
        (folder / "model.safetensors").write_bytes(content)
        assert f"cannot read the weights '{folder / 'model.safetensors'}'" in refused(model=folder)

    def test_a_configuration_that_is_not_json(
        self, refused: Refusal, saved_model: Path, tmp_path: Path
    ) -> None:
        folder = copy_of(saved_model, tmp_path / "broken")
        (folder / "config.json").write_text("{")
        assert "is not JSON" in refused(model=folder)

    def test_a_plain_bert(self, refused: Refusal, saved_model: Path, tmp_path: Path) -> None:
        folder = copy_of(saved_model, tmp_path / "bert", without="*.safetensors")
        BertModel(
            BertConfig(
                vocab_size=10,
                hidden_size=4,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=4,
            )
        ).save_pretrained(folder)
        message = refused(model=folder)
        assert "holds a 'bert' model, not a DeeBERT one" in message
        assert "deebert train" in message


class TestPolicy:
    @pytest.mark.parametrize(
        ("threshold", "says"),
        [
            ("1.2", "the entropy threshold 1.2 is above ln(3) = 1.099"),
            ("0.1,2,0.1,0.1", "the entropy threshold 2 is above ln(3)"),
            ("inf", "the entropy threshold inf is not a number"),
            ("nan", "the entropy threshold nan is not a number"),
            ("0.1,0.2", "2 entropy thresholds for 5 layers"),
            ("often", "'often' is not a number of nats"),
        ],
    )
    def test_a_threshold_that_cannot_be_meant(self, refused: Refusal, threshold: str, says: str) -> None:
        assert says in refused("--entropy-threshold", threshold)

    @pytest.mark.parametrize(
        ("stored", "says"),
        [
            ({"type": "hunch"}, "unknown exit policy 'hunch'"),
            ({"type": "entropy", "thresholds": 9.0}, "the entropy threshold 9 is above ln(3)"),
        ],
    )
    def test_a_model_whose_own_operating_point_cannot_be_meant(
        self, refused: Refusal, saved_model: Path, tmp_path: Path, stored: dict[str, object], says: str
    ) -> None:
        folder = copy_of(saved_model, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "exit_policy": stored}))
        assert says in refused(model=folder)


class TestLengths:
    def test_micro_batch_smaller_than_one_text(self, refused: Refusal) -> None:
        message = refused("--micro-batch-tokens", 32)
        assert message == "--micro-batch-tokens 32 cannot hold one text of --max-length 64: give at least 64"

    def test_more_than_the_models_positions(self, refused: Refusal) -> None:
        message = refused("--max-length", 65)
        assert "--max-length 65 is more than the 64 tokens that the model has positions for" in message

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("--window-stride", 32), "--window-stride 32 is not between 0 and 31, half of what a window"),
            (("--window-stride", 0, "--max-length", 3), "--max-length 3 leaves windows no room for text"),
            (
                ("--window-stride", 8, "--text-pair-column", "label"),
                "which is not defined for pairs: leave it",
            ),
            (("--window-stride", -1), "'-1' is not a whole number from 0"),
        ],
    )
    def test_windows_that_cannot_be_meant(
        self, refused: Refusal, refusal: Refusal, saved_model: Path, words: tuple[object, ...], says: str
    ) -> None:
        assert says in refused(*words)
        assert says in refusal("stream", "--model", saved_model, *words)

    def test_stream_refuses_the_same(self, refusal: Refusal, saved_model: Path) -> None:
        stream = ("stream", "--model", saved_model)
        assert "--micro-batch-tokens 32 cannot hold" in refusal(*stream, "--micro-batch-tokens", 32)
        assert "--max-length 65 is more than the 64" in refusal(*stream, "--max-length", 65)
        assert "is above ln(3)" in refusal(*stream, "--entropy-threshold", 2)


class TestDevice:
    def test_cuda_where_there_is_none(self, refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        # Not even where another test of this process has left its Ray.
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        assert refused("--device", "cuda") == (
            "--device cuda, but this machine has no GPU: leave --device out, or give the --ray-address of a cluster "
            "that has one"
        )


class TestCommandLine:
    def test_unknown_verb_names_the_verbs(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["clasify"]) == 2
        message = sentence(capsys.readouterr().err, "deebert: ")
        assert message.startswith("unknown verb 'clasify'; choose one of train, ")

    @pytest.mark.parametrize("verb", cli.VERBS)
    def test_unknown_flag(self, refusal: Refusal, verb: str) -> None:
        message = refusal(verb, "--no-such-flag")
        assert "--no-such-flag" in message
        assert f"see `deebert {verb} --help`" in message

    def test_missing_flags(self, refusal: Refusal) -> None:
        assert refusal("classify") == (
            "--model, --input, --output are missing; see `deebert classify --help`"
        )

    def test_train_data_that_is_not_there(self, refusal: Refusal, saved_model: Path, tmp_path: Path) -> None:
        message = refusal(
            "train", "--backbone", saved_model, "--data", "nowhere.csv", "--output", tmp_path / "model"
        )
        assert message == "no such file: 'nowhere.csv'"

    def test_train_backbone_that_is_not_there(self, refusal: Refusal, tmp_path: Path) -> None:
        data = tmp_path / "data.csv"
        data.write_text("text,label\ngood,1\nbad,0\n")
        words = ("--backbone", "/no/where", "--data", data, "--output", tmp_path / "model")
        assert "cannot load the backbone '/no/where': " in refusal("train", *words)
        words = ("--backbone", "no/where", *words[2:])
        assert refusal("train", *words) == f"cannot load the backbone 'no/where': {NOWHERE}"

    def test_train_output_that_is_a_file(self, refusal: Refusal, saved_model: Path, texts: Path) -> None:
        message = refusal("train", "--backbone", saved_model, "--data", texts, "--output", texts)
        assert message == f"the model folder '{texts}' is a file: choose another"

    def test_evaluate_model_that_is_not_there(self, refusal: Refusal, tmp_path: Path) -> None:
        assert "no such model folder" in refusal("evaluate", "--model", tmp_path / "m", "--data", "d.csv")

    def test_report_of_what_is_not_a_run(self, refusal: Refusal, tmp_path: Path) -> None:
        assert str(tmp_path) in refusal("report", tmp_path)


class TestProcesses:
    """The same through the real entry points."""

    @pytest.mark.parametrize("verb", ["classify", "stream"])
    def test_a_module(self, verb: str, saved_model: Path, texts: Path, tmp_path: Path) -> None:
        words = ("--input", texts, "--output", tmp_path / "out") if verb == "classify" else ()
        ended = run_python("-m", f"jobs.{verb}", "--model", saved_model, *words, "--entropy-threshold", "2")
        assert ended.returncode == 2
        assert "2 is above ln(3)" in sentence(ended.stderr, f"deebert {verb}: ")
        assert ended.stdout == ""

    def test_the_console_script(self) -> None:
        ended = run_python("-m", "jobs.cli", "clasify")
        assert ended.returncode == 2
        assert "unknown verb 'clasify'" in sentence(ended.stderr, "deebert: ")

    def test_a_cluster_that_cannot_be_reached(self, saved_model: Path, texts: Path, tmp_path: Path) -> None:
        words = ("--model", saved_model, "--input", texts, "--output", tmp_path / "out")
        ended = run_python("-m", "jobs.classify", *words, "--ray-address", "127.0.0.1:1")
        assert ended.returncode == 2
        message = sentence(ended.stderr, "deebert classify: ")
        assert message.startswith("cannot reach the Ray cluster '127.0.0.1:1' ([Errno 111]")


def run_python(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )


def begin_run(config: ClassifyConfig) -> None:
    """Leave in the output what a run of `config` that was cut short leaves."""
    run, output = make_plan(config, has_gpu=False), Output(config.output)
    output.prepare()
    output.write_run(
        RunRecord(
            status="interrupted",
            software_version="0",
            identity=run.identity,
            model=run.model,
            inputs=config.inputs,
            planned_shards=len(run.shards),
            planned_files=len(run.files),
            shard_rows=run.shard_rows,
            columns=run.columns,
            totals=Totals.zero(run.model.num_layers),
            attempts=(),
        )
    )
