"""The replication, from data to the table over all, on a tiny backbone and a few rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, PreTrainedTokenizerFast, TrainerCallback

from jobs import cli, replicate
from jobs.train import TrainJob
from pipeline.errors import UsageError
from pipeline.report.evaluated import EvaluatedPoint, EvaluatedSet
from tests.conftest import make_model
from tests.training_toy import CutAt, PowerCutError, add_to_every_trainer


@pytest.fixture(scope="module")
def assets_in_small(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The layout of the real assets: a random backbone and a few rows a task."""
    folder = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    BertModel(make_model().config.backbone_config).save_pretrained(folder / "e5-small")
    tokenizer.save_pretrained(folder / "e5-small")
    for name in ("SST-2", "MRPC"):
        (folder / "glue" / name).mkdir(parents=True)
    mrpc = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "1\t1\t2\tgood film\ta great film\n" * 6
    mrpc += '0\t1\t2\tgood film\tit was "bad\n' * 6
    sst_2 = "sentence\tlabel\n" + "a good film\t1\nvery dull\t0\n" * 8
    for split in ("train", "dev"):
        (folder / "glue" / "MRPC" / f"{split}.tsv").write_text(mrpc, encoding="utf-8-sig")
        (folder / "glue" / "SST-2" / f"{split}.tsv").write_text(sst_2)
    (folder / "ag_news").mkdir()
    rows = [f'{1 + i % 4},title {i},"text, {i}\nover two lines"' for i in range(2_030)]
    (folder / "ag_news" / "train.csv").write_text("\n".join(["class_index,title,description", *rows]))
    return folder


def run(assets: Path, folder: Path, *words: str) -> int:
    folders = ("--assets", assets, "--work", folder / "work", "--output", folder / "results")
    return cli.run(
        "replicate", [*map(str, folders), "--rows", "16", "--timing-rows", "2", "--engine-rows", "4", *words]
    )


def test_one_command_trains_evaluates_and_writes(
    assets_in_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicate, "_AG_NEWS_HELD_OUT", 20)
    words = ("--poolings", "mean", "--static-depths", "2")

    assert run(assets_in_small, tmp_path, *words) == 0

    results = tmp_path / "results"
    (overview,) = results.glob("*-replication.csv")
    with overview.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["task"], r["off-ramps read"], r["score"]) for r in rows] == [
        ("sst-2", "mean", "accuracy"),
        ("mrpc", "mean", "F1"),
        ("ag-news", "mean", "accuracy"),
    ]
    assert all(" at 2.50x" in row["static"] for row in rows)
    day = overview.name.removesuffix("-replication.csv")
    for task in ("sst-2", "mrpc", "ag-news"):
        names = {path.name for path in (results / f"{day}-{task}-mean").iterdir()}
        assert {"report.html", "thresholds.csv", "thresholds.md", "timings.csv", "run.json"} <= names
        assert {"quality_saving.svg", "expected_measured.png", "off_ramps.svg", "exit_layers.png"} <= names
    config = json.loads((tmp_path / "work" / "mrpc-mean" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "not_equivalent", "1": "equivalent"}
    document = json.loads((results / f"{day}-ag-news-mean" / "run.json").read_text())
    assert document["training"]["backbone"] == "ASSETS/e5-small"
    assert str(tmp_path) not in json.dumps(document)
    assert document["evaluation"]["max_train_rows"] == 16
    assert document["command"].startswith(
        "python -m jobs.replicate --assets ASSETS --work WORK --output OUTPUT "
    )
    assert document["training_seconds"] > 0


def test_a_second_run_trains_nothing(
    assets_in_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tasks", "sst-2", "--poolings", "cls,mean", "--static-depths", "1")
    assert run(assets_in_small, tmp_path, *words) == 0
    written = sorted((tmp_path / "results").glob("*/thresholds.csv"))
    before = [path.read_bytes() for path in written]
    documents = sorted((tmp_path / "results").glob("*/run.json"))
    seconds = [json.loads(path.read_text())["training_seconds"] for path in documents]
    (overview,) = (tmp_path / "results").glob("*-replication.csv")
    with overview.open(newline="") as file:
        statics = {row["off-ramps read"]: row["static"] for row in csv.DictReader(file)}
    assert " at 5.00x" in statics["cls"]
    assert statics["mean"] == "–", "the same baseline is not trained once a pooling"

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(replicate, "train", refuse)
    monkeypatch.setattr("jobs.static.train_static", refuse)

    assert run(assets_in_small, tmp_path, *words) == 0
    assert [path.read_bytes() for path in written] == before
    assert [json.loads(path.read_text())["training_seconds"] for path in documents] == seconds


def test_a_killed_training_goes_on_where_it_stopped(
    assets_in_small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tasks", "mrpc", "--poolings", "mean", "--static-depths", "1")
    monkeypatch.setattr(replicate, "_CHECKPOINT_STEPS", 2)
    with monkeypatch.context() as patch:
        add_to_every_trainer(patch, CutAt(3))
        with pytest.raises(PowerCutError):
            run(assets_in_small, tmp_path, *words)
    done: list[int] = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done.append(state.global_step)

    with monkeypatch.context() as patch:
        add_to_every_trainer(patch, Note())
        assert run(assets_in_small, tmp_path, *words) == 0

    # Stage 1 from its checkpoint on, then the static baseline from its beginning.
    assert done == [3, 4, 5, 1, 2, 3, 4, 5]
    left = {path.name for path in (tmp_path / "work" / "mrpc-mean").iterdir()}
    assert left == {"model", "study.json", "trace.parquet"}


def test_a_model_of_other_settings_is_not_used(
    assets_in_small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(job: TrainJob) -> None:
        Path(job.output).mkdir(parents=True)
        (Path(job.output) / "config.json").write_text("{}")

    def evaluate(job: object) -> None:
        raise UsageError("the model was taken")

    def said(*words: str) -> str:
        assert run(assets_in_small, tmp_path, "--tasks", "sst-2", "--poolings", "cls", *words) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("deebert replicate: ")

    monkeypatch.setattr(replicate, "train", train)
    monkeypatch.setattr(replicate, "evaluate", evaluate)
    folder = tmp_path / "work" / "sst-2-cls"
    starts = f"the folder {str(folder)!r} is of other settings"
    ends = "go on with its own, or choose another --work"

    for _ in range(2):
        assert said() == "the model was taken"
    assert said("--rows", "8") == f"{starts} (max rows 16, not 8): {ends}"
    assert said("--backbone", "b") == f"{starts} (backbone ASSETS/e5-small, not b): {ends}"

    (folder / "study.json").unlink()  # as an earlier version left it
    assert said("--rows", "8") == "the model was taken"
    assert said() == f"{starts} (max rows 8, not 16): {ends}"


def test_held_out_news_are_not_trained_on(assets_in_small: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    job = replicate.ReplicateJob(assets=str(assets_in_small), work=str(tmp_path))
    experiment = replicate._ag_news(job)

    held_out, train = (pq.read_table(path) for path in (experiment.held_out, experiment.train_data))
    titles = [set(table["title"].to_pylist()) for table in (held_out, train)]
    assert [len(held_out), len(train)] == [2_000, 30]
    assert not titles[0] & titles[1]
    assert held_out["description"][0].as_py().endswith("over two lines")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--tasks", "cola"), "unknown task 'cola': choose among sst-2, mrpc, ag-news"),
        (("--poolings", "max"), "unknown pooling 'max': choose among cls, mean"),
    ],
)
def test_misuse(
    tmp_path: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tmp_path, *words) == 2
    assert says in capsys.readouterr().err


def test_the_table_names_the_cheapest_threshold_that_keeps_enough() -> None:
    def point(name: str, score: float, saving: float) -> EvaluatedPoint:
        return EvaluatedPoint(
            name=name,
            scores=(score,),
            mean_exit_layer=12 * (1 - saving),
            speed_up=1 / (1 - saving),
            saving=saving,
            flop_saving=saving,
            exit_histogram=(1,),
        )

    found = EvaluatedSet(
        name="matched",
        samples=10,
        metrics=("accuracy",),
        off_ramps=((12, (0.9,)),),
        full=point("full depth", 0.9, 0.0),
        thresholds=(point("0.1", 0.899, 0.2), point("0.2", 0.892, 0.5), point("0.3", 0.5, 0.6)),
        statics=(),
    )

    row = replicate._summary("mnli", "mean", found)

    assert row[:4] == ("mnli matched", "mean", "accuracy", "90.00")
    assert row[4:] == ("1.25x (89.90, S = 0.1)", "2.00x (89.20, S = 0.2)", "2.00x (89.20, S = 0.2)", "–")
