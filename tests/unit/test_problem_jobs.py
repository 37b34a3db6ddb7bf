"""`deebert train` and `deebert evaluate` on regressions, multi-label data and models that learn to exit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from deebert.checkpoint import Checkpoint, load_checkpoint, weights_digest
from deebert.errors import DataError
from deebert.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from jobs import cli
from jobs.glue import Columns, find_task
from jobs.labelled import LabelledSource, LabelledTexts
from jobs.metrics import PEARSON, SPEARMAN, metrics_of
from jobs.traces import read_traces
from pipeline.errors import UsageError
from pipeline.planning import resolve_policy
from tests.conftest import make_backbone_config, save_tiny_model

PLAIN = Columns(text="text", label="label")
TONES = ("dull", "good", "great")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, names: tuple[str, ...] | None = None, **options: Any) -> LabelledTexts:
    return LabelledSource(data=str(path), columns=PLAIN, **options).training_texts(names)


def toned(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts that name the tones that hold of them."""
    rng = np.random.default_rng(seed)
    chosen = [[t for t in TONES if rng.random() < 0.4] for _ in range(count)]
    return [{"text": f"the film is {' and '.join(c)}", "label": c} for c in chosen]


def sts_b(folder: Path, count: int = 60) -> Path:
    """GLUE's own form: the score is how much of the second text is in the first."""
    (folder / "STS-B").mkdir(parents=True)
    rng = np.random.default_rng(0)
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    for name in ("train", "dev"):
        lines = [head]
        for i in range(count):
            ours, theirs = (rng.choice(TONES, 2) for _ in range(2))
            score = 2.5 * sum(word in ours for word in theirs)
            lines.append(
                f"{i}\ta\tb\t2012\t{i}\tn\tn\tit is {' '.join(ours)}\tis it {' '.join(theirs)}\t{score:.3f}"
            )
        lines.insert(3, "7\ta broken line")
        (folder / "STS-B" / f"{name}.tsv").write_text("\n".join(lines))
    return folder


class TestData:
    def test_lists_of_names_are_multi_label_data(self, tmp_path: Path) -> None:
        texts = load(jsonl(tmp_path / "a.jsonl", toned(20, 0)))

        assert texts.problem is MULTI_LABEL
        assert texts.names == TONES
        assert texts.labels[0] == tuple(TONES.index(t) for t in toned(20, 0)[0]["label"])

    def test_a_row_without_labels_is_a_row_to_which_none_applies(self, tmp_path: Path) -> None:
        rows = [{"text": "x", "label": []}, {"text": "y", "label": ["good"]}, {"text": "z", "label": None}]

        assert load(jsonl(tmp_path / "a.jsonl", rows)).labels == ((), (0,))

    def test_lists_of_ids_and_of_class_labels(self, tmp_path: Path) -> None:
        rows = [{"text": "x", "label": [2, 0]}, {"text": "y", "label": [1]}]
        assert load(jsonl(tmp_path / "a.jsonl", rows), TONES).labels == ((0, 2), (1,))

        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.List(datasets.ClassLabel(names=list(TONES)))
        )
        datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
        texts = load(tmp_path / "saved")
        assert (texts.names, texts.labels) == (TONES, ((0, 2), (1,)))

    def test_a_text_file_joins_them_with_a_separator(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('text,label\nx,"good, dull"\ny,great\nz,good\n')
        (tmp_path / "a.tsv").write_text("text\tlabel\nx\tgood|dull\ny\tgreat\n")

        found = load(tmp_path / "a.csv", problem=MULTI_LABEL)
        assert (found.names, found.labels) == (TONES, ((0, 1), (2,), (1,)))
        found = load(tmp_path / "a.tsv", problem=MULTI_LABEL, label_separator="|")
        assert found.labels == ((0, 1), (2,))

    @pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
    def test_numbers_are_the_same_labels_alone_and_beside_others(self, tmp_path: Path, name: str) -> None:
        between = "\t" if name == "a.tsv" else ","
        rows = (("text", "label"), ("x", '"0,2"'), ("x", "1"), ("x", "2"), ("x", ""))
        (tmp_path / name).write_text("".join(f"{text}{between}{label}\n" for text, label in rows))

        found = load(tmp_path / name, problem=MULTI_LABEL)
        assert (found.names, found.labels) == (("0", "1", "2"), ((0, 2), (1,), (2,), ()))
        found = load(tmp_path / name, TONES, problem=MULTI_LABEL)
        assert (found.names, found.labels) == (TONES, ((0, 2), (1,), (2,), ()))

    def test_an_empty_cell_says_that_no_label_applies(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('text,label\nx,good\ny,\nz,"dull,good"\n')
        (tmp_path / "a.tsv").write_text("text\tlabel\nx\tgood\ny\t\nz\tdull,good\n")

        for name in ("a.csv", "a.tsv"):
            assert load(tmp_path / name, problem=MULTI_LABEL).labels == ((1,), (), (0, 1))
            assert load(tmp_path / name).texts == ("x", "z")

    def test_data_without_any_label_are_refused(self, tmp_path: Path) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": []}, {"text": "y", "label": []}])
        with pytest.raises(DataError, match="has no label in any row: name the labels with --labels"):
            load(path)

    def test_numbers_are_a_regression_when_asked(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label\nx,3.8\ny,1\n")

        found = load(tmp_path / "a.csv", problem=REGRESSION)

        assert (found.problem, found.labels) == (REGRESSION, (3.8, 1.0))
        with pytest.raises(
            DataError, match=r"a measure and not a class: give class labels, or --problem regre"
        ):
            load(tmp_path / "a.csv")

    @pytest.mark.parametrize(
        ("label", "problem", "says"),
        [
            ("good", REGRESSION, "the label 'good', which is no number: a regression needs numbers"),
            ([1], SINGLE_LABEL, "has rows with several labels: give --problem multi_label_classification"),
            (["ugly"], MULTI_LABEL, "has the label 'ugly', which is not among dull, good, great"),
            (["good", None], MULTI_LABEL, "the label None, which is no class: give names or whole numbers"),
            ({"tone": "good"}, SINGLE_LABEL, "the label {'tone': 'good'}, which is no class"),
        ],
    )
    def test_labels_of_another_problem(self, tmp_path: Path, label: Any, problem: Any, says: str) -> None:
        path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": label}])

        with pytest.raises(DataError, match=says):
            load(path, TONES, problem=problem)

    def test_sts_b_is_a_regression_and_its_broken_lines_are_skipped(self, tmp_path: Path) -> None:
        source = LabelledSource(data=None, glue_dir=str(sts_b(tmp_path)), task="STS-B", columns=PLAIN)

        texts = source.training_texts()

        assert texts.problem is REGRESSION
        assert len(texts) == 60
        assert texts.pairs is not None
        assert set(texts.labels) <= {0.0, 2.5, 5.0}
        with pytest.raises(
            UsageError, match="the task sts-b is a regression, which --problem or the model is not"
        ):
            LabelledSource(
                data=None, glue_dir=str(tmp_path), task="sts-b", columns=PLAIN, problem=SINGLE_LABEL
            ).training_texts()


class TestMetrics:
    def test_correlations_by_hand(self) -> None:
        labels, predictions = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])

        assert PEARSON.compute(labels, predictions) == pytest.approx(3 / np.sqrt(2 * 14 / 3))
        assert SPEARMAN.compute(labels, predictions) == pytest.approx(1.0)
        assert PEARSON.compute(labels, torch.ones(3)) == 0.0

    def test_sets_by_hand(self) -> None:
        labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
        predictions = torch.tensor([[True, True], [True, False], [False, False]])
        micro, macro, exact = metrics_of(None, TONES, MULTI_LABEL)

        # Of label 0 both are found; of label 1 none, and one is found that is not there.
        assert micro.compute(labels, predictions) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
        assert macro.compute(labels, predictions) == pytest.approx((1 + 0) / 2)
        assert exact.compute(labels, predictions) == pytest.approx(1 / 3)

    def test_a_single_label_that_holds_or_not_by_hand(self) -> None:
        labels = torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0]])
        predictions = torch.tensor([[True], [False], [False], [False], [False]])
        micro, macro, exact = metrics_of(None, ("urgent",), MULTI_LABEL)

        # One is found and one missed; what is rightly left out does not count.
        assert micro.compute(labels, predictions) == pytest.approx(2 / (2 + 1))
        assert macro.compute(labels, predictions) == pytest.approx(2 / (2 + 1))
        assert exact.compute(labels, predictions) == pytest.approx(4 / 5)
        assert micro.compute(labels, predictions & False) == 0.0
        assert micro.compute(labels * 0, predictions & False) == 0.0

    def test_names(self) -> None:
        assert [m.name for m in metrics_of(find_task("sts-b"), (), REGRESSION)] == ["Pearson", "Spearman"]


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command that succeeds; returns stdout."""

    def run_(*words: object) -> str:
        capsys.readouterr()
        status = cli.main([*map(str, words)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run_


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command that is refused in one sentence; returns it."""

    def run_(*words: object) -> str:
        capsys.readouterr()  # what the test itself has said so far
        assert cli.main([*map(str, words)]) == 2
        _, err = capsys.readouterr()
        assert err.count("\n") == 1
        return err

    return run_


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    BertModel(make_backbone_config("bert", num_layers=3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


QUICK = (
    "--precision",
    "float32",
    "--batch-size",
    "16",
    "--learning-rate",
    "2e-3",
    "--off-ramp-learning-rate",
    "5e-3",
)


class TestTraining:
    def test_sts_b_from_glues_folder_to_a_table(self, backbone: Path, tmp_path: Path, run: Run) -> None:
        glue, model, trace = sts_b(tmp_path / "glue"), tmp_path / "model", tmp_path / "t.parquet"
        data = ("--glue-dir", glue, "--task", "sts-b")
        run(
            "train",
            "--backbone",
            backbone,
            *data,
            "--output",
            model,
            "--learn-to-exit",
            "--epochs",
            "2",
            *QUICK,
        )

        config = load_checkpoint(str(model)).model.config
        assert (config.problem, config.num_labels, config.learns_to_exit) == (REGRESSION, 1, True)

        words = ("--timing-rows", "4", "--engine-rows", "8", "--timing-rounds", "1")
        out = run("evaluate", "--model", model, *data, "--trace", trace, "--output", tmp_path / "out", *words)

        rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "thresholds.csv").read_text())))
        assert list(rows[0])[:3] == ["threshold", "Pearson %", "Spearman %"]
        assert [row["threshold"] for row in rows[:3]] == ["full depth", "certainty 0.5", "certainty 0.6"]
        assert "entropy" not in out
        assert (tmp_path / "out" / "report.html").stat().st_size > 1000
        again = read_traces(trace)
        traced = again.sets[""]
        assert again.origin.problem_type == "regression"
        assert traced.labels.dtype == torch.float32
        assert traced.trace.certainties is not None
        assert run("evaluate", "--trace", trace) == out.rsplit("\n", 2)[0] + "\n"

    def test_multi_label_from_json_lines_to_a_table(self, backbone: Path, tmp_path: Path, run: Run) -> None:
        train, held_out = (jsonl(tmp_path / f"{i}.jsonl", toned(80, i)) for i in (1, 2))
        model, out = tmp_path / "model", tmp_path / "out"
        run(
            "train",
            "--backbone",
            backbone,
            "--data",
            train,
            "--output",
            model,
            "--epochs",
            "15",
            "--recipe",
            "best",
            *QUICK,
        )

        checkpoint = load_checkpoint(str(model))
        assert checkpoint.labels == TONES
        assert checkpoint.model.config.problem is MULTI_LABEL
        run(
            "evaluate",
            "--model",
            model,
            "--data",
            held_out,
            "--output",
            out,
            "--timing-rows",
            "0",
            "--trace",
            tmp_path / "t.parquet",
        )

        rows = list(csv.DictReader(io.StringIO((out / "thresholds.csv").read_text())))
        assert list(rows[0])[1:4] == ["micro F1 %", "macro F1 %", "exact match %"]
        assert float(rows[0]["micro F1 %"]) > 80
        assert read_traces(tmp_path / "t.parquet").sets[""].labels.shape == (80, 3)

    def test_a_head_beside_the_entropy(self, backbone: Path, tmp_path: Path, run: Run) -> None:
        rows = [{"text": f"it is {t}", "label": t} for t in TONES * 10]
        data, model, out = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "model", tmp_path / "out"
        run("train", "--backbone", backbone, "--data", data, "--output", model, "--learn-to-exit", *QUICK)
        run("evaluate", "--model", model, "--data", data, "--output", out, "--timing-rows", "0")

        names = [r["threshold"] for r in csv.DictReader(io.StringIO((out / "thresholds.csv").read_text()))]
        assert names[1] == "0.05"
        assert names[-1] == "certainty 0.95"
        assert "learned exits" in (out / "quality_saving.svg").read_text()

    def test_a_model_is_given_a_head_by_stage_2_alone(self, tmp_path: Path, run: Run) -> None:
        before = load_checkpoint(str(save_tiny_model(tmp_path / "model"))).model
        rows = [{"text": f"it is {t}", "label": t} for t in ("negative", "neutral", "positive") * 10]
        data, model = jsonl(tmp_path / "a.jsonl", rows), tmp_path / "more"
        flags = ("--recipe", "off-ramps", "--learn-to-exit", "--precision", "float32")
        run("train", "--from-model", tmp_path / "model", "--data", data, "--output", model, *flags)

        after = load_checkpoint(str(model)).model
        assert after.exit_head is not None
        assert torch.equal(after.final_classifier.dense.weight, before.final_classifier.dense.weight)

    def test_a_regression_classifier_of_hugging_face(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, run: Run, refused: Run
    ) -> None:
        config = make_backbone_config("bert", num_layers=3)
        config.num_labels = 1
        BertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
        tokenizer.save_pretrained(tmp_path / "theirs")
        data = jsonl(tmp_path / "a.jsonl", [{"text": "it is good", "label": 0.5 * i} for i in range(20)])
        start = ("--from-classifier", tmp_path / "theirs", "--data", data, "--output", tmp_path / "model")

        assert "let it learn to exit (learns_to_exit, --learn-to-exit)" in refused("train", *start)
        said = refused("train", *start, "--learn-to-exit", "--problem", "multi_label_classification")
        assert "is a regression: leave --problem multi_label_classification out" in said
        run("train", *start, "--learn-to-exit", "--precision", "float32")
        assert load_checkpoint(str(tmp_path / "model")).model.config.problem is REGRESSION

    def test_a_regression_that_does_not_learn_to_exit_is_refused(
        self, backbone: Path, tmp_path: Path, refused: Run
    ) -> None:
        data = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": 0.5}, {"text": "y", "label": 1.5}])

        said = refused(
            "train",
            "--backbone",
            backbone,
            "--data",
            data,
            "--problem",
            "regression",
            "--output",
            tmp_path / "m",
        )

        assert "a regression has no entropy to exit by: give --learn-to-exit" in said


class TestOperatingPoints:
    def checkpoint(self, tiny_model: Any, tokenizer: Any, **config: Any) -> Checkpoint:
        return Checkpoint.of("m", tiny_model(**config), tokenizer)

    def test_a_stored_certainty_is_the_models_own(self, tiny_model: Any, tokenizer: Any) -> None:
        stored = {"type": "learning-to-exit", "thresholds": 0.9}
        checkpoint = self.checkpoint(tiny_model, tokenizer, learns_to_exit=True, exit_policy=stored)

        assert resolve_policy(None, None, checkpoint).to_dict() == stored
        assert resolve_policy(0.5, None, checkpoint).to_dict() == {"type": "entropy", "thresholds": 0.5}
        with pytest.raises(UsageError, match="are two ways to decide who leaves: give one"):
            resolve_policy(0.5, 0.5, checkpoint)

    def test_the_digest_knows_the_problem_and_is_as_ever_for_single_labels(self, tiny_model: Any) -> None:
        plain, named, multi = (
            tiny_model(problem_type=p)
            for p in (None, "single_label_classification", "multi_label_classification")
        )

        assert weights_digest(plain) == weights_digest(named) != weights_digest(multi)
        assert weights_digest(tiny_model(learns_to_exit=True)) != weights_digest(plain)
