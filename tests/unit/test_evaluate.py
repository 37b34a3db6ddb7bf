"""`deebert evaluate` on a tiny model: tables against brute force, traces read again, pictures that open."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import f1_score
from transformers import BertModel, PreTrainedTokenizerFast

from deebert import reference
from deebert.checkpoint import load_checkpoint, store_int8_agreement, weights_digest
from deebert.cost import ModelShape
from deebert.encoder import PackedEncoder
from deebert.evaluation import flop_saving, static_flop_saving, trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.packing import PackedTokens
from jobs import cli, evaluation
from jobs.traces import read_traces
from pipeline import ClassifyConfig
from pipeline.planning import make_plan
from tests.conftest import WORDS, ModelFactory, make_model, make_tokenizer

THRESHOLDS = (0.3, 0.6, 0.68)
TOKENIZED: dict[str, Any] = {"truncation": True, "max_length": 64, "return_token_type_ids": True}
PICTURES = ("quality_saving", "expected_measured", "off_ramps", "exit_layers")
Rows = list[dict[str, str]]
Run = Callable[..., str]


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    return [" ".join(WORDS[i] for i in draw(0, len(WORDS), draw(1, 12, 1)[0])) for _ in range(count)]


def labels(count: int, most: int) -> list[int]:
    return torch.randint(0, most, (count,), generator=torch.Generator().manual_seed(9)).tolist()


@pytest.fixture(scope="module")
def pair_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A binary model whose first id is the positive class of MRPC."""
    folder = tmp_path_factory.mktemp("models") / "pair"
    model = make_model("bert", "mean", num_labels=2, seed=3)
    model.config.id2label = {0: "Equivalent", 1: "Not_equivalent"}
    model.config.label2id = {"Equivalent": 0, "Not_equivalent": 1}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MRPC and MNLI, 60 rows a set."""
    folder = tmp_path_factory.mktemp("glue")
    mrpc = zip(labels(60, 2), texts(60, 1), texts(60, 2), strict=True)
    lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    lines += [f"{label}\t0\t0\t{a}\t{b}" for label, a, b in mrpc]
    (folder / "MRPC").mkdir()
    for name in ("train", "dev"):
        (folder / "MRPC" / f"{name}.tsv").write_text("\n".join(lines), encoding="utf-8-sig")
    (folder / "MNLI").mkdir()
    names = ("contradiction", "entailment", "neutral")
    for seed, name in enumerate(("dev_matched", "dev_mismatched")):
        rows = zip(labels(60, 3), texts(60, seed), texts(60, seed + 5), strict=True)
        lines = ["sentence1\tsentence2\tgold_label", *(f"{a}\t{b}\t{names[label]}" for label, a, b in rows)]
        (folder / "MNLI" / f"{name}.tsv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Evaluates; returns stdout."""

    def evaluate(*words: object) -> str:
        capsys.readouterr()
        status = cli.main(["evaluate", *map(str, words)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return evaluate


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Run:
    """Evaluates what must be refused; returns what it says."""

    def evaluate(*words: object) -> str:
        capsys.readouterr()
        assert cli.main(["evaluate", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("deebert evaluate: ")
        assert err.count("\n") == 1
        return err.removeprefix("deebert evaluate: ").rstrip()

    return evaluate


def read(path: Path) -> Rows:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def flags(thresholds: Sequence[float] = THRESHOLDS) -> tuple[str, str]:
    return "--thresholds", ",".join(map(str, thresholds))


def tables(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".md", ".svg")}


def test_the_sweep_equals_one_sample_at_a_time(
    pair_model: Path, glue: Path, run: Run, tmp_path: Path
) -> None:
    options = ("--glue-dir", glue, "--task", "mrpc", "--trace", tmp_path / "t.parquet", "--timing-rows", 0)
    run("--model", pair_model, *options, *flags(), "--output", tmp_path / "out")

    checkpoint = load_checkpoint(str(pair_model))
    encoded = checkpoint.tokenizer(texts(60, 1), texts(60, 2), **TOKENIZED)
    gold = [1 - label for label in labels(60, 2)]  # GLUE's 1, equivalent, is this model's 0
    rows = read(tmp_path / "out" / "thresholds.csv")
    assert [row["threshold"] for row in rows] == ["full depth", "0.3", "0.6", "0.68"]
    for threshold, row in zip((None, *THRESHOLDS), rows, strict=True):
        found = [
            reference.classify_one(checkpoint.model, ids, [threshold] * 4, types)
            for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        ]
        assert min(one.margin for one in found) > 1e-4  # no sample is a tie of floating point
        answers = [one.label for one in found]
        mean = sum(one.exit_layer for one in found) / 60
        assert row["F1 %"] == f"{100 * f1_score(gold, answers, pos_label=0):.2f}"
        right = sum(a == b for a, b in zip(gold, answers, strict=True))
        assert row["accuracy %"] == f"{100 * right / 60:.2f}"
        assert row["mean exit layer"] == f"{mean:.2f}"
        assert row["saved %"] == f"{100 * (1 - mean / 5):.1f}"
    assert len({row["mean exit layer"] for row in rows}) == 4


def test_an_off_ramp_on_the_embeddings_is_swept_scored_timed_and_drawn(
    glue: Path, run: Run, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model(
        "bert", "both", num_labels=2, seed=5, off_ramp_layers=[0, 2], shares_off_ramp_pooler=True
    )
    names = {0: "equivalent", 1: "not_equivalent"}
    model.config.id2label, model.config.label2id = names, {name: i for i, name in names.items()}
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    thresholds = (0.05, 0.1, 0.2)
    options = (
        "--glue-dir",
        glue,
        "--task",
        "mrpc",
        "--timing-rows",
        5,
        "--engine-rows",
        20,
        "--timing-rounds",
        1,
    )
    run("--model", tmp_path / "model", *options, *flags(thresholds), "--output", tmp_path / "out")

    encoded = tokenizer(texts(60, 1), texts(60, 2), **TOKENIZED)
    rows = read(tmp_path / "out" / "thresholds.csv")
    left = set()
    for threshold, row in zip(thresholds, rows[1:], strict=True):
        found = [
            reference.classify_one(model, ids, [threshold] * 4, types, layer_0=threshold)
            for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        ]
        assert min(one.margin for one in found) > 1e-5  # no sample is a tie of floating point
        mean = sum(one.exit_layer for one in found) / 60
        assert (row["mean exit layer"], row["saved %"]) == (f"{mean:.2f}", f"{100 * (1 - mean / 5):.1f}")
        left |= {one.exit_layer for one in found}
    assert left == {0, 2, 5}
    assert [row["layer"] for row in read(tmp_path / "out" / "off_ramps.csv")] == ["0", "2", "5"]
    for stem in ("off_ramps", "exit_layers"):
        words = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "out" / f"{stem}.svg").read_text())
        assert {"0", "1", "2", "3", "4", "5"} <= set(words)


def test_each_off_ramp_is_scored_by_the_tasks_metric(
    pair_model: Path, glue: Path, run: Run, tmp_path: Path
) -> None:
    run("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", "--output", tmp_path, "--timing-rows", 0)

    rows = read(tmp_path / "off_ramps.csv")

    assert list(rows[0]) == ["layer", "F1 %", "accuracy %"]
    assert [row["layer"] for row in rows] == ["1", "2", "3", "4", "5"]
    full = read(tmp_path / "thresholds.csv")[0]
    assert (rows[-1]["F1 %"], rows[-1]["accuracy %"]) == (full["F1 %"], full["accuracy %"])


def test_a_second_evaluation_from_the_trace_is_identical(
    pair_model: Path, glue: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_file = tmp_path / "t.parquet"
    data = ("--glue-dir", glue, "--task", "mrpc")
    common = ("--trace", trace_file, *flags(), "--timing-rows", 12, "--timing-rounds", 1)
    first = run("--model", pair_model, *data, *common, "--output", tmp_path / "first")
    written = trace_file.stat().st_mtime_ns

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(evaluation, "trace", refuse)
    monkeypatch.setattr(evaluation, "measure", refuse)
    second = run("--model", pair_model, *data, *common, "--output", tmp_path / "second")
    alone = run(*common, "--output", tmp_path / "alone")

    assert first.replace("first", "second") == second
    assert tables(tmp_path / "first") == tables(tmp_path / "second") == tables(tmp_path / "alone")
    assert alone == first.replace("first", "alone")
    assert {"timings.csv", "thresholds.md", "expected_measured.svg"} <= tables(tmp_path / "first").keys()
    assert trace_file.stat().st_mtime_ns == written
    for other in (("--timing-rows", 11), ("--engine-rows", 11), ("--timing-rounds", 2)):
        with pytest.raises(AssertionError, match="the model was run"):
            run("--model", pair_model, *data, *common, *other)


def test_another_precision_is_held_to_float32_once(
    pair_model: Path, glue: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = ("--trace", tmp_path / "t.parquet", "--timing-rows", 0)
    data = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", "--precision", "bfloat16")
    first = run(*data, *traced)
    assert "% of the labels at full depth are float32's, of 60 texts" in first

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(evaluation, "trace", refuse)
    assert run(*data, *traced) == run(*traced) == first


def test_a_trace_of_something_else_is_refused(
    pair_model: Path, saved_model: Path, glue: Path, run: Run, refusal: Run, tmp_path: Path
) -> None:
    kept = ("--trace", tmp_path / "t.parquet", "--timing-rows", 0)
    data = ("--glue-dir", glue, "--task", "mrpc")
    run("--model", pair_model, *data, *kept)

    other = refusal("--model", saved_model, *kept)
    assert "t.parquet' is of another model" in other
    assert other.endswith("remove it or give another --trace")
    assert "of another precision (float32, not bfloat16)" in refusal(
        "--model", pair_model, *kept, "--precision", "bfloat16"
    )
    for length in (8, 60):  # texts of 60 tokens there are none
        for words in (data, ()):
            said = refusal("--model", pair_model, *words, *kept, "--max-length", length)
            assert f"is of another length (64, not {length})" in said
    run(
        "--model",
        pair_model,
        *data,
        "--trace",
        tmp_path / "short.parquet",
        "--timing-rows",
        0,
        "--max-length",
        60,
    )
    short = ("--model", pair_model, "--trace", tmp_path / "short.parquet", "--timing-rows", 0)
    assert "texts cut to 60 tokens" in run(*short)
    assert "is of another length (60, not 64)" in refusal(*short, *data)


def test_long_texts_in_windows_are_scored_by_their_means(
    pair_model: Path, backbone: Path, run: Run, refusal: Run, glue: Path, tmp_path: Path
) -> None:
    long = [f"{a} {b} {c}" for a, b, c in zip(texts(40, 1), texts(40, 2), texts(40, 3), strict=True)]
    gold = labels(40, 2)
    rows = [{"text": text, "label": label} for text, label in zip(long, gold, strict=True)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--model", pair_model, "--data", tmp_path / "d.jsonl", "--max-length", 12)
    options = (
        "--window-stride",
        3,
        "--trace",
        tmp_path / "t.parquet",
        *flags(),
        "--output",
        tmp_path / "out",
    )
    static = (
        "--static-depths",
        2,
        "--backbone",
        backbone,
        "--train-data",
        tmp_path / "d.jsonl",
        "--epochs",
        1,
    )
    measured = ("--timing-rows", 4, "--timing-rounds", 1)

    said = run(*data, *options, *static, *measured)

    checkpoint = load_checkpoint(str(pair_model))
    cut = {"truncation": True, "max_length": 12, "stride": 3, "return_overflowing_tokens": True}
    windows = [checkpoint.tokenizer(text, **cut)["input_ids"] for text in long]
    assert len({len(one) for one in windows}) >= 3
    for threshold, row in zip((None, *THRESHOLDS), read(tmp_path / "out" / "thresholds.csv"), strict=False):
        found = [reference.classify_windows(checkpoint.model, one, [threshold] * 4) for one in windows]
        assert min(window.margin for one in found for window in one.windows) > 1e-5
        right = sum(one.label == label for one, label in zip(found, gold, strict=True))
        assert row["accuracy %"] == f"{100 * right / 40:.2f}"
        layers = [window.exit_layer for one in found for window in one.windows]
        assert row["mean exit layer"] == f"{sum(layers) / len(layers):.2f}"
    assert "static 2 (first)" in said
    assert run("--trace", tmp_path / "t.parquet", *flags(), "--output", tmp_path / "out") == said
    assert "texts in windows of 12 tokens that share 3" in (tmp_path / "out" / "report.html").read_text()
    without = (*data, "--trace", tmp_path / "t.parquet")
    assert "is of another window stride (3, not None)" in refusal(*without)
    pairs = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc")
    assert "not defined for pairs" in refusal(*pairs, "--window-stride", 3)


def test_both_sets_of_mnli_are_reported(
    glue: Path, run: Run, refusal: Run, saved_model: Path, tmp_path: Path
) -> None:
    data = ("--model", saved_model, "--glue-dir", glue, "--task", "mnli")
    swapped = ("--labels", "contradiction,neutral,entailment")  # as RoBERTa's checkpoints have them
    assert "but the model has negative, neutral, positive: name the model's labels" in refusal(*data)

    out = run(*data, *swapped, "--output", tmp_path / "swapped", "--timing-rows", 0)
    turned = ("--labels", "entailment,neutral,contradiction")
    run(*data, *turned, "--output", tmp_path / "turned", "--timing-rows", 0)

    assert "Each off-ramp alone (matched)" in out
    assert "Each off-ramp alone (mismatched)" in out
    names = {path.name for path in (tmp_path / "swapped").iterdir()}
    assert {"matched_thresholds.csv", "mismatched_thresholds.csv", "matched_exit_layers.png"} <= names
    assert accuracy(tmp_path / "swapped") == expected_mnli_accuracy(saved_model, [0, 2, 1])
    assert accuracy(tmp_path / "turned") == expected_mnli_accuracy(saved_model, [2, 0, 1])
    assert accuracy(tmp_path / "swapped") != accuracy(tmp_path / "turned")


def accuracy(folder: Path) -> list[str]:
    """Full depth on both sets."""
    return [read(folder / f"{name}_thresholds.csv")[0]["accuracy %"] for name in ("matched", "mismatched")]


def expected_mnli_accuracy(model: Path, ids: list[int]) -> list[str]:
    """The same, one sample at a time; `ids` are the model's ids of GLUE's labels."""
    checkpoint = load_checkpoint(str(model))
    found = []
    for seed in (0, 1):
        encoded = checkpoint.tokenizer(texts(60, seed), texts(60, seed + 5), **TOKENIZED)
        answers = [
            reference.classify_one(checkpoint.model, tokens, [None] * 4, types).label
            for tokens, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        ]
        right = sum(ids[label] == answer for label, answer in zip(labels(60, 3), answers, strict=True))
        found.append(f"{100 * right / 60:.2f}")
    return found


@pytest.fixture(scope="module")
def folder(pair_model: Path, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    words = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", *flags(), "--timing-rows", 8)
    assert cli.main(["evaluate", *map(str, words), "--timing-rounds", "1", "--output", str(folder)]) == 0
    return folder


class TestPictures:
    @pytest.mark.parametrize("name", PICTURES)
    def test_each_is_an_svg_and_a_png(self, folder: Path, name: str) -> None:
        root = ElementTree.fromstring((folder / f"{name}.svg").read_text())
        with Image.open(folder / f"{name}.png") as image:
            image.load()

        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("viewBox") is not None
        assert image.format == "PNG"
        assert min(image.size) > 200
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)

    def test_marks_carry_their_numbers(self, folder: Path) -> None:
        rows = read(folder / "off_ramps.csv")
        words = set(re.findall(r"<text[^>]*>([^<]+)</text>", (folder / "off_ramps.svg").read_text()))

        assert {f"{float(row['F1 %']):.1f}" for row in rows} <= words
        assert {"layer", "F1, %", "off-ramp", "full depth"} <= words

    def test_the_page_holds_pictures_first_then_tables(self, folder: Path) -> None:
        page = (folder / "report.html").read_text()

        places = [page.index(title) for title in ("Quality against saving", "Samples per exit layer")]
        places += [page.index(f"<h2>{title}") for title in ("Each off-ramp alone", "Measured time")]
        assert places == sorted(places)
        assert page.count("<svg") == len(PICTURES)
        assert "<script" not in page
        assert not re.search(r"(src|href)=.https?:", page)

    def test_without_timings_nothing_is_said_of_time(self, pair_model: Path, glue: Path, run: Run) -> None:
        data = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc")

        assert "Measured time" not in run(*data, "--timing-rows", 0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    BertModel(make_model().config.backbone_config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestStaticBaselines:
    def test_they_stand_in_the_table_and_the_picture(
        self, pair_model: Path, backbone: Path, glue: Path, run: Run, tmp_path: Path
    ) -> None:
        data = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", "--timing-rows", 8)
        static = ("--static-depths", "2,4", "--backbone", backbone, "--max-train-rows", 16, "--epochs", 1)
        out = run(*data, *static, *flags(), "--timing-rounds", 1, "--output", tmp_path)

        rows = {row["threshold"]: row for row in read(tmp_path / "thresholds.csv")}
        assert rows["static 2 (first)"]["mean exit layer"] == "2.00"
        assert rows["static 2 (first)"]["saved %"] == "60.0"
        assert rows["static 4 (first)"]["layer speed-up"] == "1.25"
        assert {"–"} & set(rows["static 2 (first)"].values()) == set()
        assert "2 layers" in (tmp_path / "quality_saving.svg").read_text()
        assert "train_runtime" not in out

    def test_they_are_trained_once_and_stay_in_the_trace(
        self,
        pair_model: Path,
        backbone: Path,
        glue: Path,
        run: Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        data = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc")
        kept = ("--trace", tmp_path / "t.parquet", "--timing-rows", 4, *flags())
        static = ("--static-depths", "2", "--static-style", "every-other", "--backbone", backbone)
        budget = ("--max-train-rows", 16, "--epochs", 1)
        first = run(*data, *kept, *static, *budget)

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("trained again")

        monkeypatch.setattr("jobs.static.train_static", refuse)

        assert "static 2 (every-other)" in first
        assert run(*data, *kept, *static, *budget) == first
        assert run(*kept) == first
        with pytest.raises(AssertionError, match="trained again"):
            run(*data, *kept, *static, "--max-train-rows", 17, "--epochs", 1)

    def test_their_times_outlive_their_models(
        self, pair_model: Path, backbone: Path, glue: Path, run: Run, tmp_path: Path
    ) -> None:
        """A threshold more is measured with all that can be; a baseline's model was not kept."""
        data = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc")
        kept = ("--trace", tmp_path / "t.parquet", "--timing-rounds", 1, "--output", tmp_path / "out")
        static = ("--static-depths", "2", "--backbone", backbone, "--max-train-rows", 16, "--epochs", 1)
        name = "static 2 (first)"

        def measured() -> dict[str, dict[str, str]]:
            rows = read(tmp_path / "out" / "timings.csv")
            return {row.pop("threshold"): row for row in rows}

        def saved() -> tuple[str, str]:
            row = next(row for row in read(tmp_path / "out" / "thresholds.csv") if row["threshold"] == name)
            return row["time saved, alone %"], row["time saved, engine %"]

        run(*data, *static, *kept, *flags((0.3,)), "--timing-rows", 8)
        first, savings = measured(), saved()
        for thresholds, rows in (((0.3, 0.6), 8), ((0.3, 0.6, 0.68), 6)):
            run(*data, *kept, *flags(thresholds), "--timing-rows", rows)

            assert set(measured()) == {"full depth", *map(str, thresholds), f"{name}, earlier"}
            assert measured()[f"{name}, earlier"] == first[name]
            assert saved() == savings
        said = "static 2 (first): 8 alone and 60 in the engine, the median of 1 earlier rounds, against full depth"
        assert said in (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")

    def test_they_are_not_trained_on_the_rows_that_score_them(
        self, pair_model: Path, backbone: Path, glue: Path, refusal: Run
    ) -> None:
        data = ("--model", pair_model, "--data", glue / "MRPC" / "dev.tsv", "--task", "mrpc")

        said = refusal(*data, "--static-depths", "2", "--backbone", backbone)

        assert said.endswith("would train on the very rows that it is scored on: give --train-data")

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("--static-depths", "2"), "--static-depths needs --model and the --backbone"),
            (("--static-depths", "9", "--backbone", "b"), "of 9 layers cannot be cut from 5: give 1 to 5"),
            (("--static-depths", "2", "--backbone", "/no/where"), "cannot load the backbone '/no/where'"),
        ],
    )
    def test_misuse(
        self, pair_model: Path, glue: Path, refusal: Run, words: tuple[str, ...], says: str
    ) -> None:
        assert says in refusal("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", *words)


class TestFlags:
    def test_a_model_or_a_trace_is_needed(self, refusal: Run) -> None:
        assert refusal("--data", "d.csv") == "give --model, or a --trace that is there already"
        assert "--trace that is there" in refusal("--data", "d.csv", "--trace", "nowhere.parquet")

    def test_data_or_a_trace_is_needed(self, refusal: Run, pair_model: Path) -> None:
        assert refusal("--model", pair_model) == (
            "give the labelled texts as --data, or as --glue-dir with --task"
        )

    def test_a_trace_alone_is_of_its_own_texts(self, refusal: Run, tmp_path: Path) -> None:
        (tmp_path / "t.parquet").touch()

        for words in (("--data", "d.csv"), ("--glue-dir", "glue", "--task", "mrpc")):
            assert refusal("--trace", tmp_path / "t.parquet", *words) == (
                "a --trace is of its own texts: leave --data and --glue-dir out, or give the --model to trace them with"
            )

    def test_a_length_that_the_model_has_no_positions_for(
        self, refusal: Run, pair_model: Path, glue: Path
    ) -> None:
        data = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc")

        assert refusal(*data, "--max-length", 200).startswith("--max-length 200 is more than the 64 tokens")
        assert refusal(*data, "--max-length", 2) == (
            "--max-length 2 is less than the 3 special tokens of a pair of texts: give more"
        )

    def test_a_threshold_that_no_answer_can_be_above(
        self, refusal: Run, run: Run, pair_model: Path, glue: Path, tmp_path: Path
    ) -> None:
        says = (
            "the entropy threshold 5 is above ln(2) = 0.6931, the largest entropy of 2 labels: give at most that, or "
            "-1 to run at full depth"
        )
        data, trace_file = (
            ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc"),
            tmp_path / "t.parquet",
        )

        assert refusal(*data, "--trace", trace_file, *flags((0.3, 5))) == says
        assert not trace_file.exists()  # nothing was traced
        run(*data, "--trace", trace_file, "--timing-rows", 0)
        assert refusal("--trace", trace_file, *flags((0.3, 5))) == says

    def test_labels_are_as_many_as_the_models(self, refusal: Run, pair_model: Path) -> None:
        words = ("--model", pair_model, "--data", "d.csv", "--labels", "a,b,c")
        assert refusal(*words) == "--labels names 3 labels but the model has 2"

    @pytest.mark.parametrize(
        ("given", "name", "id_", "own"),
        [
            ("Not_equivalent,Equivalent", "Not_equivalent", 0, 1),
            ("not_equivalent,same", "not_equivalent", 0, 1),
        ],
    )
    def test_a_label_that_the_model_has_keeps_its_id(
        self, refusal: Run, pair_model: Path, given: str, name: str, id_: int, own: int
    ) -> None:
        words = ("--model", pair_model, "--data", "d.csv", "--labels", given)
        assert refusal(*words) == (
            f"--labels gives {name!r} the id {id_}, and the model {str(pair_model)!r} knows it by {own}: leave "
            "--labels out, or name the labels in the model's order, Equivalent,Not_equivalent"
        )

    def test_files_of_ones_own_work_as_before(self, saved_model: Path, run: Run, tmp_path: Path) -> None:
        data = tmp_path / "data.csv"
        data.write_text("body,mood\ngood film,positive\nbad film,negative\nfilm,neutral\n")
        words = ("--text-column", "body", "--label-column", "mood", "--thresholds", "0.5,1.0")

        out = run("--model", saved_model, "--data", data, *words, "--output", tmp_path / "out")

        assert "| accuracy % |" in out
        assert len(read(tmp_path / "out" / "thresholds.csv")) == 3

    def test_an_output_that_cannot_be_written(
        self, pair_model: Path, glue: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        words = ("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", "--timing-rows", 0)

        status = cli.main(["evaluate", *map(str, words), "--output", str(tmp_path / "file" / "out")])

        assert status == 2
        assert "cannot write to" in capsys.readouterr().err


class TestFlopSaving:
    SHAPE = ModelShape(num_layers=5, hidden_size=32, intermediate_size=48, num_labels=3)

    def test_it_equals_a_count_sample_by_sample(self, tiny_model: ModelFactory) -> None:
        model = tiny_model(off_ramp_layers=[1, 3, 4])
        ids = [[2, 10 + i, *range(45, 45 + i % 11), 3] for i in range(40)]
        traced = trace(PackedEncoder.of(model), PackedTokens.pack(ids))
        thresholds = (0.7, None, None, 0.9)  # the off-ramp after layer 3 cannot fire and costs nothing

        executed = full = 0.0
        for one in ids:
            layer = reference.classify_one(model, one, thresholds).exit_layer
            ramps = (1 if layer == 1 else 2) + (layer == 5)
            executed += layer * self.SHAPE.layer_flops(len(one), len(one) ** 2)
            executed += ramps * self.SHAPE.off_ramp_flops(1) if layer != 1 else self.SHAPE.off_ramp_flops(1)
            full += 5 * self.SHAPE.layer_flops(len(one), len(one) ** 2) + self.SHAPE.off_ramp_flops(1)

        saving = flop_saving(traced, EntropyThreshold(thresholds), self.SHAPE)
        assert saving == pytest.approx(1 - executed / full, rel=1e-12)
        assert 0.1 < saving < 0.9

    def test_full_depth_saves_nothing_and_fruitless_off_ramps_cost(self, tiny_model: ModelFactory) -> None:
        traced = trace(PackedEncoder.of(tiny_model()), PackedTokens.pack([[2, 10, 11, 3]] * 4))

        assert flop_saving(traced, FULL_DEPTH, self.SHAPE) == 0.0
        assert flop_saving(traced, EntropyThreshold(1e-9), self.SHAPE) < 0.0

    def test_a_static_model_saves_the_layers_that_it_lacks(self, tiny_model: ModelFactory) -> None:
        traced = trace(PackedEncoder.of(tiny_model()), PackedTokens.pack([[2, 10, 11, 3]] * 4))
        layer, ramp = self.SHAPE.layer_flops(16, 64), self.SHAPE.off_ramp_flops(4)

        expected = 1 - (2 * layer + ramp) / (5 * layer + ramp)
        assert math.isclose(static_flop_saving(traced, 2, self.SHAPE), expected)


def test_a_moved_model_folder_is_the_same_model(
    pair_model: Path, glue: Path, run: Run, tmp_path: Path
) -> None:
    kept = ("--trace", tmp_path / "t.parquet", "--timing-rows", 0)
    run("--model", pair_model, "--glue-dir", glue, "--task", "mrpc", *kept)
    shutil.copytree(pair_model, tmp_path / "moved")

    run("--model", tmp_path / "moved", *kept)

    assert read_traces(tmp_path / "t.parquet").origin.model == str(pair_model)


class TestInt8:
    """A model says of itself how many labels int8 leaves as they are."""

    @pytest.fixture
    def model(self, pair_model: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(pair_model, tmp_path / "model"))

    def labelled(self, folder: Path, count: int) -> Path:
        rows = zip(texts(count, 1), labels(count, 2), strict=True)
        (folder / "data.csv").write_text(
            "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
        )
        return folder / "data.csv"

    @pytest.fixture
    def with_vnni(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)

    @pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI")
    def test_what_is_measured_is_said_and_stored(self, model: Path, tmp_path: Path, run: Run) -> None:
        before = weights_digest(load_checkpoint(str(model)).model)
        words = ("--model", model, "--data", self.labelled(tmp_path, 598), "--timing-rows", 0)

        out = run(*words, "--precision", "int8", "--store-agreement")

        checkpoint = load_checkpoint(str(model))
        share = checkpoint.model.config.int8_agreement
        assert share is not None
        assert 0.8 < share <= 1.0
        assert out.startswith(
            f"int8, texts cut to 64 tokens; {100 * share:.2f} % of the labels at full depth "
        )
        said = re.search(r"are float32's, of 598 texts \((\S+) to (\S+) % with 95 % confidence\)", out)
        assert said is not None
        interval = binomtest(round(598 * share), 598).proportion_ci(0.95, "exact")
        assert [float(bound) / 100 for bound in said.groups()] == pytest.approx(interval, abs=6e-5)
        assert weights_digest(checkpoint.model) == before
        assert "float32's" not in run(*words, "--precision", "float32").splitlines()[0]

    @pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI")
    def test_too_few_texts_to_show_it_store_nothing(self, model: Path, tmp_path: Path, refusal: Run) -> None:
        config = (model / "config.json").read_bytes()
        words = ("--model", model, "--precision", "int8", "--store-agreement")

        assert refusal(*words, "--data", self.labelled(tmp_path, 597)) == (
            "597 texts cannot show that int8 keeps 99.5 % of the labels: give at least 598, or leave "
            "--store-agreement out"
        )
        assert (model / "config.json").read_bytes() == config

    @pytest.mark.usefixtures("with_vnni")
    @pytest.mark.parametrize(("share", "is_int8"), [(0.9951, True), (0.9949, False)])
    def test_a_run_left_to_choose_goes_by_it(
        self, model: Path, tmp_path: Path, share: float, is_int8: bool
    ) -> None:
        (tmp_path / "in.txt").write_text("a good film\n")
        store_int8_agreement(model, share)
        config = ClassifyConfig(
            model=str(model), input=(str(tmp_path / "in.txt"),), output=str(tmp_path / "out")
        )

        assert (make_plan(config, has_gpu=False).identity.precision == "int8") is is_int8
        assert make_plan(config, has_gpu=True).identity.precision == "bfloat16"

    def test_it_is_stored_of_int8_and_with_a_folder_only(self, model: Path, refusal: Run) -> None:
        says = "--store-agreement needs --precision int8 and a folder as --model"
        words = ("--data", "d.csv", "--store-agreement")
        assert refusal("--model", model, *words) == says
        assert refusal("--model", "hub/id", *words, "--precision", "int8") == says

    @pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a CPU with VNNI")
    def test_a_regression_has_no_labels_to_keep(self, tmp_path: Path, refusal: Run) -> None:
        model = tmp_path / "model"
        make_model(num_labels=1, problem_type="regression", learns_to_exit=True).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        (tmp_path / "data.csv").write_text("text,label\ngood,1.5\n")
        words = ("--data", tmp_path / "data.csv", "--precision", "int8", "--store-agreement")
        assert "is a regression, which has no labels to keep" in refusal("--model", model, *words)
