"""GLUE's data as they come: TSV folders with their traps, data sets with class labels, files with a task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from deebert.errors import DataError
from jobs import cli
from jobs.glue import TASKS, Columns, find_task, task_of_hub_id
from jobs.labelled import LabelledSource, LabelledTexts, sample
from pipeline.errors import UsageError

PLAIN = Columns(text="text", label="label")
BOM = "\ufeff"


def glue(folder: Path, task: str) -> LabelledSource:
    return LabelledSource(data=None, glue_dir=str(folder), task=task, columns=PLAIN)


def write(folder: Path, name: str, *lines: str, start: str = "", end: str = "\n") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + "".join(line + end for line in lines)).encode())


def named(texts: LabelledTexts) -> list[str]:
    return [texts.names[i] for i in texts.labels]


def only(sets: dict[str, LabelledTexts]) -> LabelledTexts:
    assert list(sets) == [""]
    return sets[""]


class TestTsvFolders:
    def test_sst_2_has_one_sentence_and_numbers(self, tmp_path: Path) -> None:
        write(tmp_path, "SST-2/train.tsv", "sentence\tlabel", "a dull film \t0", "great \t1")
        write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", "good\t1")

        texts = glue(tmp_path, "sst-2").training_texts()

        assert texts.texts == ("a dull film ", "great ")
        assert texts.pairs is None
        assert texts.names == ("negative", "positive")
        assert named(texts) == ["negative", "positive"]
        assert only(glue(tmp_path, "sst-2").evaluation_texts()).texts == ("good",)

    def test_mrpc_has_a_byte_order_mark_and_lone_quotes(self, tmp_path: Path) -> None:
        header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        lines = ('1\t1\t2\t" He said so .\tHe said " so', '0\t3\t4\tIt \'s "late\t""No')
        write(tmp_path, "MRPC/dev.tsv", header, *lines, start=BOM)

        texts = only(glue(tmp_path, "mrpc").evaluation_texts())

        assert texts.texts == ('" He said so .', "It 's \"late")
        assert texts.pairs == ('He said " so', '""No')
        assert texts.names == ("not_equivalent", "equivalent")
        assert texts.labels == (1, 0)

    def test_qnli_reads_question_and_sentence(self, tmp_path: Path) -> None:
        rows = ("0\tWho?\tNobody did.\tnot_entailment", "1\tWhen?\tIn 1999.\tentailment")
        write(tmp_path, "QNLI/dev.tsv", "index\tquestion\tsentence\tlabel", *rows)

        texts = only(glue(tmp_path, "qnli").evaluation_texts())

        assert (texts.texts, texts.pairs) == (("Who?", "When?"), ("Nobody did.", "In 1999."))
        assert texts.names == ("entailment", "not_entailment")
        assert texts.labels == (1, 0)

    def test_rte_reads_two_sentences(self, tmp_path: Path) -> None:
        write(tmp_path, "RTE/train.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment")

        texts = glue(tmp_path, "rte").training_texts()

        assert (texts.texts, texts.pairs, texts.labels) == (("a",), ("b",), (0,))

    def test_qqp_skips_and_counts_broken_lines(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
        lines = (
            "0\t1\t2\tWhy?\tWhy not?\t0",
            "7\t8\tHow is it that",
            "1\t3\t4\tHow?\tHow come?\t1",
            "2\t2\t",
        )
        write(tmp_path, "QQP/train.tsv", header, *lines)

        with caplog.at_level(logging.WARNING):
            texts = glue(tmp_path, "qqp").training_texts()

        assert texts.texts == ("Why?", "How?")
        assert named(texts) == ["not_duplicate", "duplicate"]
        assert "skipped 2 of 4 rows lack a column, a text or a known label, first line 3" in caplog.text

    def test_mnli_has_two_development_sets(self, tmp_path: Path) -> None:
        header = "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label"
        write(tmp_path, "MNLI/dev_matched.tsv", header, "0\tslate\ta\tb\tneutral\tentailment")
        write(tmp_path, "MNLI/dev_mismatched.tsv", header, *["1\tverbatim\tc\td\tneutral\tcontradiction"] * 2)

        sets = glue(tmp_path, "mnli").evaluation_texts()

        assert list(sets) == ["matched", "mismatched"]
        assert sets["matched"].names == ("contradiction", "entailment", "neutral")
        assert (sets["matched"].labels, sets["mismatched"].labels) == ((1,), (0, 0))
        assert sets["mismatched"].pairs == ("d", "d")

    def test_a_label_without_consensus_is_skipped(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        header = "sentence1\tsentence2\tgold_label"
        write(tmp_path, "MNLI/train.tsv", header, "a\tb\t-", "c\td\tneutral")

        with caplog.at_level(logging.WARNING):
            texts = glue(tmp_path, "mnli").training_texts()

        assert (texts.texts, texts.labels) == (("c",), (2,))
        assert "skipped 1 of 2 rows" in caplog.text

    @pytest.mark.parametrize("inside", ["\r", "\u2028", "\x85", "\x0c", "\x1c"])
    def test_only_a_line_feed_ends_a_line(self, tmp_path: Path, inside: str) -> None:
        write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", f"one{inside}two\t1", end="\r\n")

        texts = only(glue(tmp_path, "sst-2").evaluation_texts())

        assert texts.texts == (f"one{inside}two",)
        assert texts.labels == (1,)

    def test_words_that_mean_missing_elsewhere_are_texts(self, tmp_path: Path) -> None:
        words = ("null", "NA", "nan", "None", "")
        write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", *(f"{word}\t0" for word in words))

        assert only(glue(tmp_path, "sst-2").evaluation_texts()).texts == words

    def test_the_tasks_own_folder_will_do(self, tmp_path: Path) -> None:
        write(tmp_path, "dev.tsv", "sentence\tlabel", "good\t1")

        assert only(glue(tmp_path, "sst-2").evaluation_texts()).labels == (1,)

    def test_a_file_of_another_task_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel", *["good\tentailment"] * 12)

        with pytest.raises(DataError, match=r"12 of 12 rows lack .* first line 2; check columns and task"):
            glue(tmp_path, "sst-2").evaluation_texts()

    def test_a_test_set_without_labels_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, "SST-2/dev.tsv", "index\tsentence", "0\tgood")

        with pytest.raises(DataError, match="has no column 'label': it has index, sentence"):
            glue(tmp_path, "sst-2").evaluation_texts()

    def test_a_missing_file_names_where_it_should_be(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no dev_matched\.tsv of mnli in .*MNLI/dev_matched\.tsv"):
            glue(tmp_path, "mnli").evaluation_texts()

    @pytest.mark.parametrize("content", [b"", b"sentence\tlabel\ncaf\xe9\t1\n"])
    def test_an_empty_file_or_another_encoding_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "dev.tsv").write_bytes(content)

        with pytest.raises(DataError, match=r"dev\.tsv' is (empty|not UTF-8)"):
            glue(tmp_path, "sst-2").evaluation_texts()


class TestLabelOrder:
    """RoBERTa's MNLI checkpoints number the last two labels the other way round."""

    ROBERTA = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")

    def mnli(self, folder: Path) -> LabelledSource:
        rows = ("a\tb\tcontradiction", "c\td\tentailment", "e\tf\tneutral")
        write(folder, "MNLI/train.tsv", "sentence1\tsentence2\tgold_label", *rows)
        return glue(folder, "mnli")

    def test_labels_are_matched_with_the_models_by_name(self, tmp_path: Path) -> None:
        source = self.mnli(tmp_path)

        assert source.training_texts().labels == (0, 1, 2)
        assert source.training_texts(self.ROBERTA).labels == (0, 2, 1)
        assert source.training_texts(self.ROBERTA).names == self.ROBERTA

    def test_a_model_without_label_names_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"model has LABEL_0, LABEL_1, LABEL_2: name .* with --labels"):
            self.mnli(tmp_path).training_texts(("LABEL_0", "LABEL_1", "LABEL_2"))

    def test_the_hubs_order_does_not_matter(self, tmp_path: Path) -> None:
        hub_order = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        features = datasets.Features(
            premise=datasets.Value("string"), hypothesis=datasets.Value("string"), label=hub_order
        )
        rows = {"premise": ["a", "b", "c", "x"], "hypothesis": ["d"] * 4, "label": [0, 1, 2, -1]}
        data = datasets.Dataset.from_dict(rows, features=features)
        splits = {"train": data, "validation_matched": data, "validation_mismatched": data.select([2])}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "mnli")
        source = LabelledSource(data=str(tmp_path / "mnli"), task="mnli", columns=PLAIN)

        assert source.training_texts().labels == (1, 2, 0)  # -1 has no label
        assert named(source.training_texts()) == ["entailment", "neutral", "contradiction"]
        assert source.training_texts(self.ROBERTA).labels == (2, 1, 0)
        assert {k: v.labels for k, v in source.evaluation_texts().items()} == {
            "matched": (1, 2, 0),
            "mismatched": (0,),
        }

    @pytest.mark.parametrize("numbers", ["01", ("0.0", "1.0")])
    def test_numbers_of_mnli_without_names_are_refused(self, tmp_path: Path, numbers: Sequence[str]) -> None:
        rows = (f"a,b,{number}" for number in numbers)
        write(tmp_path, "mnli.csv", "premise,hypothesis,label", *rows)
        source = LabelledSource(data=str(tmp_path / "mnli.csv"), task="mnli", columns=PLAIN)

        with pytest.raises(DataError, match="numbers the labels of mnli, which differ from source to source"):
            source.training_texts()

    def test_a_single_file_of_mnli_is_one_set(self, tmp_path: Path) -> None:
        self.mnli(tmp_path)
        source = LabelledSource(data=str(tmp_path / "MNLI/train.tsv"), task="mnli", columns=PLAIN)

        assert only(source.evaluation_texts()).labels == (0, 1, 2)

    @pytest.mark.parametrize(
        ("name", "labels"),
        [
            ("sst-2", ("negative", "positive")),
            ("mrpc", ("not_equivalent", "equivalent")),
            ("qqp", ("not_duplicate", "duplicate")),
            ("qnli", ("entailment", "not_entailment")),
            ("rte", ("entailment", "not_entailment")),
            ("mnli", ("contradiction", "entailment", "neutral")),
        ],
    )
    def test_orders_are_those_of_the_original_checkpoints(self, name: str, labels: tuple[str, ...]) -> None:
        assert find_task(name).labels == labels


class TestTasks:
    @pytest.mark.parametrize(("given", "name"), [("SST-2", "sst-2"), ("sst2", "sst-2"), ("MNLI", "mnli")])
    def test_names_are_forgiving(self, given: str, name: str) -> None:
        assert find_task(given).name == name

    def test_an_unknown_task_names_those_there_are(self) -> None:
        with pytest.raises(UsageError, match="unknown GLUE task 'cola': choose one of sst-2, mrpc, qnli"):
            find_task("cola")

    def test_a_hub_id_is_loaded_by_its_configuration_and_splits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        labels = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
        kinds = {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"), "label": labels}
        asked: list[tuple[str, str | None, str]] = []

        def hub(name: str, configuration: str | None = None, *, split: str) -> datasets.Dataset:
            asked.append((name, configuration, split))
            rows = {"premise": ["a"], "hypothesis": [split], "label": [2]}
            return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

        monkeypatch.setattr(datasets, "load_dataset", hub)  # no test talks to a hub
        source = LabelledSource(data="nyu-mll/glue:mnli", columns=PLAIN)

        sets = {"train": source.training_texts(), **source.evaluation_texts()}

        splits = {"train": "train", "matched": "validation_matched", "mismatched": "validation_mismatched"}
        assert asked == [("nyu-mll/glue", "mnli", split) for split in splits.values()]
        assert {name: texts.pairs for name, texts in sets.items()} == {n: (s,) for n, s in splits.items()}
        assert {name: named(texts) for name, texts in sets.items()} == {
            key: ["contradiction"] for key in splits
        }

    @pytest.mark.parametrize(
        ("source", "task"),
        [
            ("nyu-mll/glue:sst2", "sst-2"),
            ("glue:mnli", "mnli"),
            ("nyu-mll/glue", None),
            ("glue:cola", None),
            ("stanfordnlp/sst2", None),
            ("data.csv", None),
        ],
    )
    def test_a_hub_id_may_name_its_task(self, source: str, task: str | None) -> None:
        found = task_of_hub_id(source)

        assert (found.name if found else None) == task

    def test_f1_is_the_score_of_mrpc_and_qqp_alone(self) -> None:
        positive = {task.name: task.positive for task in TASKS if task.positive}

        assert positive == {"mrpc": "equivalent", "qqp": "duplicate"}

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({}, "give the labelled texts as --data, or as --glue-dir with --task"),
            ({"data": "a.csv", "glue_dir": "glue"}, "give the labelled texts as --data, or"),
            ({"glue_dir": "glue"}, "--glue-dir holds several tasks: say which with --task"),
        ],
    )
    def test_a_source_is_data_or_a_task_of_a_folder(self, given: dict[str, str], says: str) -> None:
        with pytest.raises(UsageError, match=says):
            LabelledSource(**{"data": None, "columns": PLAIN, **given})  # type: ignore[arg-type]


def test_train_needs_labelled_texts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--backbone", "b", "--output", "nowhere"]) == 2
    said = "deebert train: give the labelled texts as --data, or as --glue-dir with --task\n"
    assert capsys.readouterr().err == said


class TestOtherData:
    def load(self, path: Path, names: tuple[str, ...] | None = None, **options: Any) -> LabelledTexts:
        return LabelledSource(data=str(path), columns=PLAIN, **options).training_texts(names)

    def test_names_are_found_in_the_data(self, tmp_path: Path) -> None:
        write(tmp_path, "a.csv", "text,label", "x,good", "y,bad", "z,good")

        texts = self.load(tmp_path / "a.csv")

        assert (texts.names, texts.labels) == (("bad", "good"), (1, 0, 1))

    def test_integers_are_ids_where_they_are_no_names(self, tmp_path: Path) -> None:
        write(tmp_path, "a.csv", "text,label", "x,1", "y,0")

        assert self.load(tmp_path / "a.csv", names=("bad", "good")).labels == (1, 0)

    def test_integers_that_are_names_are_matched_as_such(self, tmp_path: Path) -> None:
        write(tmp_path, "a.csv", "text,label", "x,4", "y,1", "z,3", "w,2")

        assert self.load(tmp_path / "a.csv").names == ("1", "2", "3", "4")
        assert self.load(tmp_path / "a.csv", names=("1", "2", "3", "4")).labels == (3, 0, 2, 1)

    @pytest.mark.parametrize(
        ("labels", "names", "ids"),
        [
            (("1.0", "2.0"), ("1", "2", "3"), (0, 1)),
            (("0.0", "1.0"), ("-1", "0", "1"), (1, 2)),
            (("1", "2.0"), ("1", "2", "3"), (0, 1)),
            (("1", "2"), ("1.0", "2.0", "3.0"), (0, 1)),
            (("2.0", "b"), ("2", "b"), (0, 1)),
        ],
    )
    def test_a_column_with_gaps_has_the_labels_that_it_would_have_without(
        self, tmp_path: Path, labels: tuple[str, ...], names: tuple[str, ...], ids: tuple[int, ...]
    ) -> None:
        write(tmp_path, "a.csv", "text,label", *(f"x,{label}" for label in labels))

        assert self.load(tmp_path / "a.csv", names=names).labels == ids

    def test_numbers_are_no_positions_among_names_that_are_numbers(self, tmp_path: Path) -> None:
        write(tmp_path, "a.csv", "text,label", "x,0.0", "y,0.0")

        with pytest.raises(DataError, match=r"label '0\.0', which is not among 1, 2"):
            self.load(tmp_path / "a.csv", names=("1", "2"))

    def test_a_sample_is_drawn_before_any_text_becomes_tokens(self, tmp_path: Path) -> None:
        write(tmp_path, "a.csv", "text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(9)))
        texts = self.load(tmp_path / "a.csv")
        rows = np.random.default_rng(7).permutation(9)[:4]

        drawn = sample(texts, 4, seed=7)

        assert drawn.texts == tuple(f"text {i}" for i in rows)
        assert drawn.labels == tuple(i % 2 for i in rows)
        assert sample(texts, 9, seed=7) is sample(texts, None, seed=7) is texts

    @pytest.mark.parametrize("ending", ["csv", "tsv"])
    def test_values_are_texts_as_they_stand(self, tmp_path: Path, ending: str) -> None:
        between = "\t" if ending == "tsv" else ","
        rows = (("007", "01"), ("1.50", "02"), ("1e5", "01"), ("null", "02"), ("True", "01"))
        write(tmp_path, f"a.{ending}", *(between.join(row) for row in (("text", "label"), *rows)))

        texts = self.load(tmp_path / f"a.{ending}")

        assert texts.texts == ("007", "1.50", "1e5", "null", "True")
        assert (texts.names, texts.labels) == (("01", "02"), (0, 1, 0, 1, 0))

    @pytest.mark.parametrize("ending", ["csv", "tsv"])
    def test_quotes_are_read_as_the_pipeline_reads_them(self, tmp_path: Path, ending: str) -> None:
        between = "\t" if ending == "tsv" else ","
        quoted = '"he said ""good""' + between + '\nand left"'
        write(tmp_path, f"a.{ending}", f"text{between}label", f"{quoted}{between}good", f'"x"{between}"bad"')

        texts = self.load(tmp_path / f"a.{ending}")

        assert texts.texts == (f'he said "good"{between}\nand left', "x")
        assert named(texts) == ["good", "bad"]

    def test_a_tasks_own_tsv_has_no_quotes_wherever_it_lies(self, tmp_path: Path) -> None:
        write(tmp_path, "dev.tsv", "sentence\tlabel", '" a lone one\t1', '"a whole one"\t0')
        source = LabelledSource(data=str(tmp_path / "dev.tsv"), task="sst-2", columns=PLAIN)

        assert source.training_texts().texts == ('" a lone one', '"a whole one"')

    @pytest.mark.parametrize(
        ("labels", "names", "ids"),
        [
            (("-1", "1", "0"), ("-1", "0", "1"), (0, 2, 1)),
            (("10", "9", "b"), ("9", "10", "b"), (1, 0, 2)),
            (("1.0", "0.0"), ("0.0", "1.0"), (1, 0)),
        ],
    )
    def test_names_that_are_numbers_are_in_their_order(
        self, tmp_path: Path, labels: tuple[str, ...], names: tuple[str, ...], ids: tuple[int, ...]
    ) -> None:
        write(tmp_path, "a.csv", "text,label", *(f"x,{label}" for label in labels))

        texts = self.load(tmp_path / "a.csv")

        assert (texts.names, texts.labels) == (names, ids)

    def test_fractions_are_names_where_they_are_named(self, tmp_path: Path) -> None:
        write(tmp_path, "a.csv", "text,label", "x,4.0", "y,3.5")
        assert self.load(tmp_path / "a.csv", names=("3.5", "4.0")).labels == (1, 0)

        write(tmp_path, "b.csv", "text,label", "x,1.0", "y,0.0")
        assert self.load(tmp_path / "b.csv", names=("bad", "good")).labels == (1, 0)

    def test_a_row_that_cannot_be_read_is_skipped_with_the_reason(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "a.csv").write_bytes(b"text,label\nx,good\ny,bad,3\ncaf\xe9,good\n")

        with caplog.at_level(logging.WARNING):
            texts = self.load(tmp_path / "a.csv")

        assert texts.texts == ("x",)
        assert "first row 1 (the row has 3 columns, not 2)" in caplog.text

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("")

        with pytest.raises(DataError, match=r"a\.csv' is empty: give a file with a header line"):
            self.load(tmp_path / "a.csv")

    def test_class_labels_are_matched_by_name(self, tmp_path: Path) -> None:
        features = datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=["good", "bad"])
        )
        data = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
        data.save_to_disk(tmp_path / "saved")

        assert self.load(tmp_path / "saved").names == ("good", "bad")
        assert self.load(tmp_path / "saved", names=("bad", "good")).labels == (1, 0)

    @pytest.mark.parametrize("names", [["1", "2"], ["1.0", "2.0"]])
    def test_class_labels_that_are_digits_are_names(self, tmp_path: Path, names: list[str]) -> None:
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        data = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
        data.save_to_disk(tmp_path / "saved")

        assert self.load(tmp_path / "saved").labels == (0, 1)
        with pytest.raises(DataError, match=r"has the label '1(\.0)?', which is not among bad, good"):
            self.load(tmp_path / "saved", names=("bad", "good"))

    def test_a_folder_of_files_is_a_data_set(self, tmp_path: Path) -> None:
        write(tmp_path, "local/train.csv", "text,label", "x,good")
        write(tmp_path, "local/test.csv", "text,label", "007,bad")

        assert self.load(tmp_path / "local", split="test").texts == ("007",)

    def test_a_split_that_is_not_there(self, tmp_path: Path) -> None:
        data = datasets.Dataset.from_dict({"text": ["x"], "label": ["a"]})
        datasets.DatasetDict(train=data).save_to_disk(tmp_path / "saved")

        with pytest.raises(DataError, match="has no split 'dev': it has train"):
            self.load(tmp_path / "saved", split="dev")

    def test_missing_labels_are_left_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, "a.jsonl", '{"text": "x", "label": null}', '{"text": "y", "label": "good"}')

        with caplog.at_level(logging.INFO):
            texts = self.load(tmp_path / "a.jsonl")

        assert texts.texts == ("y",)
        assert "left out 1 of 2 rows, which have no label" in caplog.text

    def test_a_missing_text_is_skipped_with_its_place(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(tmp_path, "a.jsonl", '{"text": "y", "label": 1}', '{"text": null, "label": 0}')

        with caplog.at_level(logging.WARNING):
            texts = self.load(tmp_path / "a.jsonl")

        assert texts.texts == ("y",)
        assert "skipped 1 of 2 rows lack a column, a text or a known label, first row 1" in caplog.text

    @pytest.mark.parametrize(
        ("lines", "names", "says"),
        [
            (("x,good", "y,ugly"), ("bad", "good"), "has the label 'ugly', which is not among bad, good"),
            (("x,0", "y,2"), ("bad", "good"), "has the label 2, which is not among bad, good"),
            (("x,", "y,"), None, "has no row with a label"),
            (("x,3.8", "y,1.2"), None, "has the label 1.2, a measure and not a class"),
            (("x,1", "y,2", "z,0"), ("1", "2", "3"), "has the label 0, which is not among 1, 2, 3: name all"),
            (("x,01",), ("0", "1"), "has the label '01', which is not among 0, 1"),
        ],
    )
    def test_labels_that_cannot_be_meant(
        self, tmp_path: Path, lines: tuple[str, ...], names: tuple[str, ...] | None, says: str
    ) -> None:
        write(tmp_path, "a.csv", "text,label", *lines)

        with pytest.raises(DataError, match=says):
            self.load(tmp_path / "a.csv", names=names)

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(DataError, match=r"no such file: 'nowhere\.tsv'"):
            self.load(Path("nowhere.tsv"))


@pytest.mark.assets
@pytest.mark.parametrize(
    ("task", "train", "train_positive", "dev", "dev_positive"),
    [("sst-2", 67_349, 37_569, 872, 444), ("mrpc", 3_668, 2_474, 408, 279)],
)
def test_the_real_files_have_every_row(
    assets: Path, task: str, train: int, train_positive: int, dev: int, dev_positive: int
) -> None:
    source = glue(assets / "glue", task)

    texts, held_out = source.training_texts(), only(source.evaluation_texts())

    assert (len(texts), sum(texts.labels)) == (train, train_positive)
    assert (len(held_out), sum(held_out.labels)) == (dev, dev_positive)
