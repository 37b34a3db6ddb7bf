"""`deebert train`: what the flags mean, what they refuse, and what lies in the model folder afterwards."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from deebert.backbones import FAMILIES
from deebert.checkpoint import load_checkpoint
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.training import (
    ALTERNATING,
    BEST,
    JOINT,
    LOG_NAME,
    OFF_RAMPS,
    PAPER_EPOCHS,
    PAPER_STAGE_2,
    RECIPES,
    TWO_STAGE,
    Alternating,
    BackboneStage,
    BornAgain,
    Distillation,
    EarlyStopping,
    Interpolation,
    Joint,
    OffRampStage,
    Recipe,
    Teacher,
    read_log,
)
from jobs import recipes as recipes_job
from jobs.cli import main
from jobs.flags import parse_job
from jobs.recipe_scores import score_at
from jobs.recipe_variants import VARIANTS, Between, Trained
from jobs.train import _RECIPE_NAMES, TrainJob, train
from jobs.train_recipe import recipe_of
from jobs.training_plot import draw_training_log
from pipeline.errors import UsageError
from tests.conftest import VOCABULARY
from tests.training_toy import CutAt, PowerCutError, add_to_every_trainer


def described(**flags: Any) -> Recipe:
    """The recipe of these flags, in float32."""
    return recipe_of(TrainJob(backbone="b", data="d", output="o", precision="float32", **flags))


class TestRecipeOfFlags:
    @pytest.mark.parametrize(
        ("name", "recipe"),
        [
            ("two-stage", TWO_STAGE),
            ("joint", JOINT),
            ("alternating", ALTERNATING),
            ("off-ramps", OFF_RAMPS),
            ("best", BEST),
        ],
    )
    def test_a_name_alone_is_the_named_recipe(self, name: str, recipe: Recipe) -> None:
        assert described(recipe=name) == recipe

    def test_every_named_recipe_is_a_choice(self) -> None:
        assert tuple(RECIPES) == _RECIPE_NAMES

    def test_nothing_is_the_papers(self) -> None:
        assert described() == TWO_STAGE

    def test_left_out_epochs_are_the_papers_for_the_backbone(self) -> None:
        def epochs(model_type: str, **flags: Any) -> list[float]:
            job = TrainJob(backbone="b", data="d", output="o", precision="float32", **flags)
            return [stage.epochs for stage in recipe_of(job, model_type=model_type).stages.values()]

        assert epochs("bert", stage_2="exact") == [3, 3]
        assert epochs("roberta", stage_2="exact") == [10, 10]
        assert epochs("roberta") == [10, 3]
        assert epochs("roberta", epochs=2.0, off_ramp_epochs=1.0, recipe="best") == [2, 1, 2]
        assert epochs("camembert", recipe="best") == [3, 3, 3]

    def test_a_third_stage_takes_the_same_numbers_and_its_own_teacher(self) -> None:
        recipe = described(recipe="best", epochs=1.5, learning_rate=1e-4, teacher="t", temperature=3.0)

        assert recipe.stage_1 is not None
        assert recipe.stage_3 is not None
        assert isinstance(recipe.stage_1.teacher, Teacher)
        assert recipe.stage_3.teacher == BornAgain(weight=0.5, temperature=3.0)
        assert (recipe.stage_1.epochs, recipe.stage_3.epochs) == (1.5, 1.5)
        assert recipe.stage_3.learning_rate == 1e-4

    def test_interpolation_is_of_the_stage_that_goes_on_with_a_finished_model(self) -> None:
        kept = Interpolation(first=0.25, last=0.5)
        best = described(recipe="best", interpolation=(0.25, 0.5))
        assert best.stage_1 is not None
        assert best.stage_3 is not None
        assert (best.stage_1.interpolation, best.stage_3.interpolation) == (None, kept)

        further = described(recipe="joint", from_model="m", interpolation=(0.25, 0.5))
        assert further.stage_1 is not None
        assert further.stage_1.interpolation == kept

        whole = described(recipe="best", interpolation=(1.0, 1.0))
        assert whole.stage_3 is not None
        assert whole.stage_3.interpolation is None

    @pytest.mark.parametrize(("text", "shares"), [("0.4", (0.4, 0.4)), ("0.8,0", (0.8, 0.0))])
    def test_interpolation_is_a_share_or_two(self, text: str, shares: tuple[float, float]) -> None:
        words = ["--backbone", "b", "--data", "d", "--output", "o", "--interpolation", text]
        assert parse_job(TrainJob, words, prog="train", description="").interpolation == shares

    def test_every_number_can_be_set(self) -> None:
        recipe = described(
            epochs=1.5,
            batch_size=16,
            learning_rate=1e-4,
            weight_decay=0.01,
            warmup=0.1,
            adam_epsilon=1e-6,
            max_grad_norm=2.0,
            exit_head_learning_rate=1e-2,
            accumulation_steps=2,
            off_ramp_epochs=5,
            off_ramp_batch_size=64,
            off_ramp_learning_rate=1e-3,
            seed=7,
            checkpoint_steps=50,
            held_out=0.2,
            patience=2,
            evaluate_every=10,
        )

        alike: dict[str, Any] = {
            "weight_decay": 0.01,
            "warmup_share": 0.1,
            "adam_epsilon": 1e-6,
            "max_grad_norm": 2.0,
            "exit_head_learning_rate": 1e-2,
        }
        numbers = {f.name for f in fields(BackboneStage) if f.type in ("float", "int")}
        assert numbers == {"epochs", "batch_size", "learning_rate", "accumulation_steps", *alike}
        assert recipe == Recipe(
            stage_1=BackboneStage(
                epochs=1.5,
                batch_size=16,
                learning_rate=1e-4,
                accumulation_steps=2,
                **alike,
            ),
            stage_2=OffRampStage(epochs=5, batch_size=64, learning_rate=1e-3, **alike),
            seed=7,
            checkpoint_steps=50,
            early_stopping=EarlyStopping(held_out=0.2, patience=2, every_steps=10),
        )

    def test_losses(self) -> None:
        recipe = described(
            recipe="alternating",
            weighting="uniform",
            self_distillation=0.3,
            temperature=4.0,
            teacher="t",
            teacher_weight=0.6,
            teacher_hidden_weight=0.1,
            stage_2="fast",
        )

        distilled = Distillation(weight=0.3, temperature=4.0)
        assert recipe.stage_1 == BackboneStage(
            objective=Alternating(weighting="uniform", self_distillation=distilled),
            teacher=Teacher(folder="t", weight=0.6, temperature=4.0, hidden_weight=0.1),
        )
        assert recipe.stage_2 == OffRampStage(self_distillation=distilled)

    def test_the_off_ramps_learning_rate_holds_wherever_they_train(self) -> None:
        recipe = described(recipe="joint", stage_2="fast", off_ramp_learning_rate=1e-3)

        assert recipe.stage_1 == BackboneStage(objective=Joint(off_ramp_learning_rate=1e-3))
        assert recipe.stage_2 == OffRampStage(learning_rate=1e-3)

    def test_an_exact_stage_2_is_the_papers_and_accumulates_as_stage_1_does(self) -> None:
        paper = OffRampStage(mode="exact", epochs=3, batch_size=8, learning_rate=2e-5)

        assert described(stage_2="exact").stage_2 == PAPER_STAGE_2 == paper
        assert described(stage_2="exact", accumulation_steps=4).stage_2 == replace(
            paper, accumulation_steps=4
        )

    def test_stage_2_none_ends_a_joint_training_after_stage_1(self) -> None:
        assert described(recipe="joint", stage_2="none") == JOINT

    def test_from_a_classifier_it_is_stage_2_alone(self) -> None:
        job = TrainJob(from_classifier="c", data="d", output="o", precision="float32")

        assert recipe_of(job) == OFF_RAMPS

    def test_distillation_of_a_named_recipe_can_be_turned_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taught = replace(JOINT, stage_1=BackboneStage(objective=Joint(self_distillation=Distillation())))
        monkeypatch.setattr("deebert.training.RECIPES", {**RECIPES, "joint": taught})

        assert described(recipe="joint") == taught
        assert described(recipe="joint", self_distillation=0.0) == JOINT


DATA = "text,label\n" + "the film is good,positive\nthe film is bad,negative\nit is,neutral\n" * 12
LABELS = "negative,neutral,positive"


@pytest.fixture
def words(saved_model: Path, tmp_path: Path) -> list[str]:
    """A training of seconds, from a DeeBERT folder."""
    (tmp_path / "data.csv").write_text(DATA)
    paths = ["--from-model", str(saved_model), "--data", str(tmp_path / "data.csv")]
    return [
        *paths,
        "--output",
        str(tmp_path / "model"),
        "--labels",
        LABELS,
        "--epochs",
        "1",
        "--precision",
        "float32",
    ]


def save_classifier(folder: Path, tokenizer: Any, **config: Any) -> BertForSequenceClassification:
    """A classifier of Hugging Face; where nothing names its labels, they are LABEL_0 and so on."""
    classifier = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=64,
            **config,
        )
    )
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return classifier


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["train", *argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("deebert train: ")


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (
                "",
                "neither of --backbone, --from-classifier and --from-model is given: give the one to start from",
            ),
            (
                "--backbone a --from-model b",
                "more than one of --backbone, --from-classifier and --from-model is given: give the one to start from",
            ),
            (
                "--from-classifier a --recipe joint",
                "--from-classifier keeps its weights and --recipe joint would change them: leave --recipe out",
            ),
            (
                "--from-classifier a --off-ramp-pooling cls",
                "--from-classifier reads what its classifier was trained on: leave --off-ramp-pooling out",
            ),
            (
                "--from-classifier a --epochs 1",
                "--epochs is for stage 1, which this training has not: leave it out",
            ),
            (
                "--from-model a --recipe off-ramps --teacher t",
                "--teacher is for stage 1, which this training has not: leave it out",
            ),
            (
                "--backbone a --weighting uniform",
                "--weighting says nothing to --recipe two-stage: give joint or alternating",
            ),
            (
                "--backbone a --recipe joint --interpolation 0.5",
                "--interpolation is between a finished model and what training makes of it: give --recipe best, or "
                "--from-model with a recipe that trains the backbone",
            ),
            (
                "--from-model a --recipe off-ramps --interpolation 0.5",
                "--interpolation is between a finished model and what training makes of it: give --recipe best, or "
                "--from-model with a recipe that trains the backbone",
            ),
            (
                "--backbone a --recipe best --interpolation 0",
                "interpolation is 0: give a share above 0, or no such stage",
            ),
            (
                "--backbone a --recipe best --interpolation 0.5,1.5",
                "the interpolation's last share is 1.5: give one from 0 to 1",
            ),
            (
                "--backbone a --recipe best --interpolation 0.5,1,1",
                "argument --interpolation: '0.5,1,1' is neither a share nor two: write 0.4 or 0.8,0; see "
                "`deebert train --help`",
            ),
            (
                "--backbone a --recipe best --stage-2 none --interpolation 0.5",
                "a stage 3 whose change is kept in part needs off-ramps that answer before it: add stage 2, or keep "
                "the whole change",
            ),
            (
                "--backbone a --stage-2 none",
                "a stage 1 of the final loss alone leaves the off-ramps untrained: add stage 2, or train jointly",
            ),
            (
                "--backbone a --recipe alternating --weighting equilibrium",
                "gradient equilibrium averages over all classifiers and every other step of alternating training "
                "has one: choose linear or uniform weights",
            ),
            (
                "--backbone a --teacher-weight 0.9",
                "--teacher-weight says nothing without --teacher: give both or neither",
            ),
            ("--backbone a --patience 5", "--patience says nothing without --held-out: give both or neither"),
            (
                "--backbone a --recipe joint --off-ramp-epochs 5",
                "--off-ramp-epochs and --off-ramp-batch-size are for stage 2, which this training has not: give "
                "--stage-2 fast or leave them out",
            ),
            (
                "--from-model a --off-ramp-layers 0,2",
                "--from-model has its off-ramps already: leave --off-ramp-pooling, --off-ramp-layers and "
                "--shared-pooler out, or begin with --backbone",
            ),
            (
                "--backbone a --off-ramp-pooling attention",
                "--off-ramp-pooling attention learns what it reads, which a fast stage 2 keeps as it is: give "
                "--stage-2 exact, or --recipe best, whose third stage trains it",
            ),
            ("--backbone a --batch-size 0", "batch_size is 0: give at least 1"),
            (
                "--backbone a --recipe off-ramps",
                "--recipe off-ramps leaves the final classifier as it is, and that of a bare --backbone is random: "
                "give --from-classifier or --from-model, or leave --recipe out",
            ),
            (
                "--backbone a --seed -1",
                "argument --seed: '-1' is not a whole number from 0; see `deebert train --help`",
            ),
            (
                "--backbone a --seed 4294967296",
                "argument --seed: '4294967296' is not a whole number below 2^32; see `deebert train --help`",
            ),
            (
                "--backbone a --labels negative,positive,positive",
                "argument --labels: 'positive' is named twice, give each label once; see `deebert train --help`",
            ),
            ("--backbone a --held-out 1.5", "held_out is 1.5: give a share between 0 and 1"),
        ],
    )
    def test_what_cannot_be_meant(
        self, flags: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        found = refusal(capsys, *flags.split(), "--data", "d.csv", "--output", str(tmp_path / "model"))

        assert found == sentence

    def test_an_unfinished_training_is_not_begun_again_by_accident(
        self, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "model.training").mkdir()
        (tmp_path / "model.training" / "training.json").write_text("{}")

        assert refusal(capsys, *words) == (
            f"a training of '{tmp_path / 'model'}' was cut short: give --resume to go on with it or --overwrite to "
            "begin again"
        )

    def test_a_model_of_other_labels(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        words[words.index(LABELS)] = "neutral,negative,positive"

        assert "knows negative, neutral, positive and the data has neutral, negative, positive" in refusal(
            capsys, *words
        )

    def test_more_tokens_than_the_model_has_positions_for(
        self, words: list[str], backbone_words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for start in (words, backbone_words):
            assert refusal(capsys, *start, "--max-length", "65") == (
                "--max-length 65 is more than the 64 tokens that the model has positions for: give at most that"
            )


def test_help_states_what_a_stage_through_the_backbone_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())

    stages = [stage for recipe in RECIPES.values() for stage in recipe.stages.values()]
    (defaults,) = {(s.epochs, s.batch_size, s.learning_rate) for s in stages if isinstance(s, BackboneStage)}
    assert defaults == (3, 8, 2e-5)
    assert PAPER_EPOCHS == {"roberta": 10}
    assert "epochs (as in the paper: 3; RoBERTa 10)" in text
    assert "of all processes (8, as in the paper)" in text
    assert "peak learning rate (2e-5, as in the paper)" in text


class TestModelFolder:
    def test_knows_what_its_training_truncated_to(self, words: list[str], tmp_path: Path) -> None:
        assert main(["train", *words, "--max-length", "10"]) == 0
        assert load_checkpoint(str(tmp_path / "model")).model.config.max_seq_length == 10

        words[words.index("--from-model") + 1] = str(tmp_path / "model")
        words[words.index("--output") + 1] = str(tmp_path / "next")
        assert main(["train", *words]) == 0
        assert load_checkpoint(str(tmp_path / "next")).model.config.max_seq_length == 10

    def test_without_a_model_texts_are_cut_to_what_the_backbone_has_positions_for(
        self, backbone_words: list[str], tmp_path: Path
    ) -> None:
        assert main(["train", *backbone_words]) == 0

        assert load_checkpoint(str(tmp_path / "model")).model.config.max_seq_length == 64

    @pytest.mark.parametrize("recipe", ["two-stage", "joint", "alternating", "best"])
    def test_is_a_model_with_its_log_and_drawing(self, recipe: str, words: list[str], tmp_path: Path) -> None:
        assert main(["train", *words, "--recipe", recipe]) == 0

        model = load_checkpoint(str(tmp_path / "model")).model
        records = read_log(tmp_path / "model" / "training_log.jsonl")
        drawing = ElementTree.parse(tmp_path / "model" / "training_log.svg")
        assert model.config.num_hidden_layers == 5
        assert records[-1]["done"]
        assert drawing.getroot().tag.endswith("svg")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "model"]

    def test_off_ramps_alone_keep_the_rest_of_the_model(
        self, words: list[str], saved_model: Path, tmp_path: Path
    ) -> None:
        place = words.index("--epochs")
        assert main(["train", *words[:place], *words[place + 2 :], "--recipe", "off-ramps"]) == 0

        before, after = (
            load_checkpoint(str(folder)).model.state_dict() for folder in (saved_model, tmp_path / "model")
        )
        assert {n for n in before if not before[n].equal(after[n])} == {
            n for n in before if n.startswith("off_ramps.")
        }

    def test_new_weights_have_no_operating_point_yet(
        self, words: list[str], saved_model: Path, tmp_path: Path
    ) -> None:
        calibrated = Path(shutil.copytree(saved_model, tmp_path / "calibrated"))
        config = json.loads((calibrated / "config.json").read_text())
        config["exit_policy"] = {"type": "entropy", "thresholds": 0.5}
        (calibrated / "config.json").write_text(json.dumps(config))

        words[words.index("--from-model") + 1] = str(calibrated)
        assert main(["train", *words]) == 0

        assert load_checkpoint(str(calibrated)).exit_policy == EntropyThreshold(0.5)
        assert load_checkpoint(str(tmp_path / "model")).exit_policy == FULL_DEPTH

    def test_the_folder_may_be_the_one_that_one_is_in(
        self, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        words[words.index("--output") + 1] = "."

        assert main(["train", *words]) == 0

        assert (tmp_path / "here" / "model.safetensors").exists()
        assert not (tmp_path / "here.training").exists()

    @pytest.mark.parametrize("there", [False, True], ids=["a new folder", "a folder that is there"])
    def test_a_training_cut_short_while_it_is_written_goes_on(
        self, there: bool, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output, moved = tmp_path / "model", []

        def cut(source: Path, *rest: object) -> None:
            if there and not moved:
                moved.append(shutil.copy(source, *rest))  # type: ignore[call-overload]
                return
            raise PowerCutError

        if there:
            output.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr("jobs.train.shutil.move" if there else "jobs.training_plot.draw_training_log", cut)
            with pytest.raises(PowerCutError):
                main(["train", *words])
        assert output.exists() == there
        assert [path.name for path in output.glob("*")] == [Path(path).name for path in moved]

        add_to_every_trainer(monkeypatch, CutAt(1))  # nothing is trained again
        assert main(["train", *words, "--resume"]) == 0

        load_checkpoint(str(output))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data.csv", "model"]

    def test_pickled_weights_are_read_where_they_are_allowed(
        self, words: list[str], saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pickled = Path(shutil.copytree(saved_model, tmp_path / "pickled"))
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
        teacher = ["--teacher", str(pickled)]
        as_start = [str(pickled) if word == str(saved_model) else word for word in words]

        for wanted in ([*words, *teacher], as_start):
            assert "are pickled (pytorch_model.bin)" in refusal(capsys, *wanted, "--overwrite")
        assert main(["train", *as_start, *teacher, "--allow-pickle", "--overwrite"]) == 0

    def test_from_a_classifier_the_weights_are_kept(
        self, words: list[str], tokenizer: Any, tmp_path: Path
    ) -> None:
        names = dict(enumerate(LABELS.split(",")))
        classifier = save_classifier(
            tmp_path / "classifier",
            tokenizer,
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
        data, output = words[words.index("--data") + 1], str(tmp_path / "model")

        start = ["--from-classifier", str(tmp_path / "classifier"), "--labels", LABELS]
        assert main(["train", *start, "--data", data, "--output", output, "--precision", "float32"]) == 0

        model = load_checkpoint(output).model
        assert model.final_classifier.classifier.weight.equal(classifier.classifier.weight)
        kept = classifier.bert.encoder.state_dict()
        assert all(value.equal(kept[name]) for name, value in model.backbone.encoder.state_dict().items())


class TestClassifiersWithoutNames:
    """Very many on the hub call their labels LABEL_0, LABEL_1."""

    @pytest.fixture
    def nameless(self, tokenizer: Any, tmp_path: Path) -> list[str]:
        save_classifier(tmp_path / "classifier", tokenizer)
        start = ["--from-classifier", str(tmp_path / "classifier"), "--output", str(tmp_path / "model")]
        return [*start, "--precision", "float32", "--overwrite"]

    @pytest.fixture
    def data(self, tmp_path: Path) -> str:
        (tmp_path / "two.csv").write_text("text,label\n" + "it is good,positive\nit is bad,negative\n" * 12)
        return str(tmp_path / "two.csv")

    def names(self, tmp_path: Path) -> tuple[str, ...]:
        config = load_checkpoint(str(tmp_path / "model")).model.config
        assert config.label2id == {name: i for i, name in config.id2label.items()}
        return tuple(config.id2label.values())

    @pytest.mark.parametrize("names", ["negative,positive", "positive,negative"])
    def test_are_given_them_in_the_order_of_their_ids(
        self, nameless: list[str], data: str, tmp_path: Path, names: str
    ) -> None:
        assert main(["train", *nameless, "--data", data, "--labels", names]) == 0

        assert ",".join(self.names(tmp_path)) == names

    def test_numbers_are_their_ids(self, nameless: list[str], tmp_path: Path) -> None:
        (tmp_path / "ids.csv").write_text("text,label\n" + "it is good,1\nit is bad,0\n" * 12)
        words = [*nameless, "--data", str(tmp_path / "ids.csv")]

        assert main(["train", *words, "--labels", "negative,positive"]) == 0

        assert self.names(tmp_path) == ("negative", "positive")

    def test_a_task_names_them(self, nameless: list[str], tmp_path: Path) -> None:
        (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "it is good\t1\nit is bad\t0\n" * 12)

        assert main(["train", *nameless, "--glue-dir", str(tmp_path), "--task", "sst-2"]) == 0

        assert self.names(tmp_path) == ("negative", "positive")

    def test_no_order_is_guessed(
        self,
        nameless: list[str],
        data: str,
        tokenizer: Any,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        asks = "name the model's 2 labels with --labels, in the order of its ids"
        assert refusal(capsys, *nameless, "--data", data).endswith(
            f"has 2 labels without names and the data has negative, positive: {asks}"
        )
        assert refusal(capsys, *nameless, "--data", data, "--labels", "bad,negative,positive").endswith(asks)

        # Models of MNLI differ in what they number how.
        save_classifier(tmp_path / "classifier", tokenizer, num_labels=3)
        (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tgold_label\na\tb\tneutral\n")
        said = refusal(capsys, *nameless, "--glue-dir", str(tmp_path), "--task", "mnli")
        assert "has 3 labels without names and the data has contradiction, entailment, neutral" in said


@pytest.fixture
def backbone_words(words: list[str], tokenizer: Any, tmp_path: Path) -> list[str]:
    """Like `words`, from a tiny BERT without off-ramps."""
    from tests.conftest import make_backbone_config

    FAMILIES["bert"].model(make_backbone_config("bert", num_layers=3)).save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    place = words.index("--from-model")
    return [*words[:place], "--backbone", str(tmp_path / "backbone"), *words[place + 2 :]]


def test_one_label_in_every_row_is_a_wrong_column(
    backbone_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.csv").write_text("text,label\nx,film\ny,film\n")
    place = backbone_words.index("--labels")

    assert refusal(capsys, *backbone_words[:place], *backbone_words[place + 2 :]) == (
        "the data has the label 'film' in every row, which leaves nothing to tell apart: check --label-column, or "
        "name all labels with --labels"
    )


@pytest.mark.parametrize("fields", [{"id2label": ["a", "b"]}, {"hidden_act": "gelu_newer"}])
def test_a_backbone_whose_configuration_is_broken(
    backbone_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    config = tmp_path / "backbone" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))

    said = refusal(capsys, *backbone_words)

    assert re.match(rf"cannot load the (backbone|model) '{tmp_path / 'backbone'}': ", said)


class TestTokenizersOfBackbones:
    """Texts that become other ids than the backbone was pretrained on train, and mean nothing."""

    def test_none(
        self, backbone_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for file in (tmp_path / "backbone").glob("*token*"):
            file.unlink()

        assert refusal(capsys, *backbone_words) == (
            f"'{tmp_path / 'backbone'}' has no tokenizer: put the one that it was trained with into the folder"
        )

    def test_one_that_knows_more_than_the_model(
        self, backbone_words: list[str], tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        larger = copy.deepcopy(tokenizer)
        larger.add_tokens(["cinema"])
        larger.save_pretrained(tmp_path / "backbone")

        assert refusal(capsys, *backbone_words) == (
            f"the tokenizer in '{tmp_path / 'backbone'}' knows {len(larger)} tokens, the model {len(tokenizer)}: put "
            "the one that the model was trained with into the folder"
        )

    def test_one_that_cannot_be_read(
        self, backbone_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "backbone" / "tokenizer.json").write_text('{"broken": 1}')

        said = refusal(capsys, *backbone_words)

        assert said.startswith(f"cannot read the tokenizer in '{tmp_path / 'backbone'}'")


class TestKindsOfOffRamps:
    @pytest.mark.parametrize(
        ("flags", "layers", "pooling", "shares"),
        [
            ("", [1, 2], "mean", False),
            ("--off-ramp-layers 0,2 --shared-pooler", [0, 2], "mean", True),
            ("--off-ramp-pooling both --off-ramp-layers 0", [0], "both", False),
            ("--off-ramp-pooling attention --stage-2 exact", [1, 2], "attention", False),
            ("--recipe best", [1, 2], "attention", False),
            ("--recipe best --stage-2 fast", [1, 2], "attention", False),
            ("--recipe best --off-ramp-pooling mean", [1, 2], "mean", False),
            ("--off-ramp-pooling attention --recipe joint --shared-pooler", [1, 2], "attention", True),
        ],
    )
    def test_are_what_the_flags_say(
        self,
        flags: str,
        layers: list[int],
        pooling: str,
        shares: bool,
        backbone_words: list[str],
        tmp_path: Path,
    ) -> None:
        assert main(["train", *backbone_words, *flags.split()]) == 0

        config = load_checkpoint(str(tmp_path / "model")).model.config
        assert (config.off_ramp_layers, config.off_ramp_pooling) == (layers, pooling)
        assert config.shares_off_ramp_pooler == shares

    @pytest.mark.parametrize(
        ("layers", "says"),
        [
            ("0,3", "off_ramp_layers is [0, 3]: give increasing layers between 0, the embeddings, and 2"),
            ("1,x", "'1,x' is not a list of layers"),
        ],
    )
    def test_layers_that_are_not_there_are_refused(
        self, layers: str, says: str, backbone_words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["train", *backbone_words, "--off-ramp-layers", layers]) == 2
        assert says in capsys.readouterr().err


class TestDrawing:
    def test_has_a_curve_for_each_trained_classifier_of_each_stage(self, tmp_path: Path) -> None:
        log = tmp_path / "log.jsonl"
        records: list[dict[str, Any]] = [
            {"stage": 1, "step": s, "losses": {"3": 1 / s}, "seconds": float(s)} for s in (1, 2, 3)
        ]
        records.append({"stage": 1, "step": 3, "held_out_loss": 1.0, "held_out_losses": {"3": 0.5}})
        records += [{"stage": 2, "step": s, "losses": {"1": 2.0, "2": 1.0}, "seconds": 9.0} for s in (1, 2)]
        log.write_text("".join(json.dumps(r) + "\n" for r in records))

        drawing = draw_training_log(log)

        text = drawing.read_text()
        assert drawing == tmp_path / "log.svg"
        assert text.count("loss after each layer") >= 2
        # matplotlib names curves line2d_…; the two stages' panels hold 2 (trained, held out) and 2 (off-ramps).
        assert [text.count(f'id="axes_{i}"') for i in (1, 2, 3)] == [1, 1, 0]

    def test_an_empty_log_draws_nothing_and_does_not_fail(self, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text("")

        assert draw_training_log(tmp_path / "log.jsonl").exists()


class TestRecipesJob:
    def test_every_variant_is_a_recipe_and_builds_on_variants(self) -> None:
        for name, variant in VARIANTS.items():
            if isinstance(variant, Trained):
                assert isinstance(described(**variant.flags), Recipe), name
            if isinstance(variant, Between):
                other = VARIANTS[variant.towards]
                assert isinstance(other, Trained)
                assert other.start == variant.start
            assert variant.builds_on <= set(VARIANTS)

    def test_the_best_recipe_is_the_variant_that_its_name_promises(self) -> None:
        continued = VARIANTS["continued-attention"]
        assert isinstance(continued, Trained)
        assert continued.start is not None
        assert continued.start == continued.teacher
        start = VARIANTS[continued.start]
        assert isinstance(start, Trained)
        before, goes_on = described(**start.flags), described(**continued.flags).stage_1
        assert (before.stage_1, before.stage_2) == (BEST.stage_1, BEST.stage_2)
        assert goes_on is not None
        assert BEST.stage_3 is not None
        assert (goes_on.objective, goes_on.interpolation) == (BEST.stage_3.objective, None)
        assert BEST.stage_3.interpolation is None
        best = TrainJob(backbone="b", data="d", output="o", recipe="best")
        assert best.new_off_ramps_read == start.flags["off_ramp_pooling"]

    def test_accuracy_between_operating_points(self) -> None:
        points = [(1.0, 0.9), (2.0, 0.8), (4.0, 0.6)]

        assert score_at(points, 1.5) == pytest.approx(0.85)
        assert score_at(points, 4.0) == pytest.approx(0.6)
        assert score_at(points, 4.1) is None

    def test_trains_what_a_variant_builds_on_and_does_nothing_twice(
        self, saved_model: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from transformers import BertConfig, BertModel

        from tests.conftest import VOCABULARY

        shape = {
            "vocab_size": len(VOCABULARY),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        BertModel(BertConfig(**shape, intermediate_size=48)).save_pretrained(tmp_path / "backbone")
        tokenizer.save_pretrained(tmp_path / "backbone")
        (tmp_path / "data.csv").write_text(DATA)
        data = str(tmp_path / "data.csv")
        words = ["--backbone", str(tmp_path / "backbone"), "--data", data, "--evaluation-data", data]
        words += ["--output", str(tmp_path / "out"), "--variants", "taught", "--precision", "float32"]

        assert recipes_job.execute(words, prog="recipes") == 0
        first = capsys.readouterr().out
        trained = (tmp_path / "out" / "taught-42" / "model.safetensors").stat().st_mtime_ns
        assert recipes_job.execute(words, prog="recipes") == 0

        title, _, head, _, row, *_ = first.splitlines()
        assert title == "Score at equal layer speed-up"
        assert [c.strip() for c in head.split("|")[1:6]] == ["variant", "full depth", "2×", "3×", "4×"]
        assert row.split("|")[1].strip() == "taught"
        assert capsys.readouterr().out == first == (tmp_path / "out" / "results.md").read_text()
        assert (tmp_path / "out" / "taught-42" / "model.safetensors").stat().st_mtime_ns == trained
        assert sorted(p.stem for p in (tmp_path / "out").glob("*-42.json")) == ["taught-42", "two-stage-42"]
        assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()

        # What a training took is what its log says, over all attempts.
        assert kept_seconds(tmp_path / "out", "taught") == pytest.approx(
            sum(r["seconds"] for r in read_log(tmp_path / "out" / "taught-42" / LOG_NAME) if "done" in r)
        )

        # Part of the way to a model that goes on from there: nothing is trained for it, and it is a model like another.
        words[words.index("--variants") + 1] = "continued-40"
        assert recipes_job.execute(words, prog="recipes") == 0
        assert capsys.readouterr().out.splitlines()[4].split("|")[1].strip() == "continued-40"
        start, end, between = (
            load_checkpoint(str(tmp_path / "out" / f"{name}-42")).model.state_dict()
            for name in ("two-stage", "continued", "continued-40")
        )
        for name, weight in between.items():
            torch.testing.assert_close(weight, 0.6 * start[name] + 0.4 * end[name], rtol=0, atol=1e-6)
        assert kept_seconds(tmp_path / "out", "continued-40", total=True) == pytest.approx(
            kept_seconds(tmp_path / "out", "continued", total=True)
            + kept_seconds(tmp_path / "out", "continued-40")
        )
        words[words.index("--variants") + 1] = "taught"

        # At other speed-ups what is there is judged again, not trained; asked twice, not even that.
        assert recipes_job.execute([*words, "--speed-ups", "2.5"], prog="recipes") == 0
        other = capsys.readouterr().out
        assert [c.strip() for c in other.splitlines()[2].split("|")[3:5]] == ["2.5×", "seconds"]
        assert "chosen for 2.5×" in other
        assert (tmp_path / "out" / "taught-42" / "model.safetensors").stat().st_mtime_ns == trained
        judged = (tmp_path / "out" / "taught-42.json").stat().st_mtime_ns
        assert recipes_job.execute([*words, "--speed-ups", "2.5,4"], prog="recipes") == 0
        assert (tmp_path / "out" / "taught-42.json").stat().st_mtime_ns == judged

        # Nor for other policies; what was known stays known.
        words += ["--policies", "patience,entropy"]
        assert recipes_job.execute([*words, "--speed-ups", "4"], prog="recipes") == 0
        _, table = capsys.readouterr().out.split("\n\nExit policies\n\n")
        head, _, *rows = table.splitlines()
        assert [c.strip() for c in head.split("|")[1:4]] == ["variant", "policy", "4×"]
        assert [row.split("|")[2].strip() for row in rows[:2]] == ["patience", "entropy"]
        by_policy = json.loads((tmp_path / "out" / "taught-42.json").read_text())["by_policy"]
        assert [list(scores) for scores in by_policy.values()] == [["4"], ["4"]]
        assert recipes_job.execute([*words, "--speed-ups", "2.5"], prog="recipes") == 0
        by_policy = json.loads((tmp_path / "out" / "taught-42.json").read_text())["by_policy"]
        assert {name: list(scores) for name, scores in by_policy.items()} == {
            "patience": ["4", "2.5"],
            "entropy": ["4", "2.5"],
        }
        assert (tmp_path / "out" / "taught-42" / "model.safetensors").stat().st_mtime_ns == trained

    def test_what_it_does_not_know_is_refused(self) -> None:
        words = ["--backbone", "b", "--glue-dir", "g", "--task", "sst-2", "--output", "o"]
        with pytest.raises(UsageError, match=r"^unknown variant 'worst': choose among two-stage, "):
            recipes_job.execute([*words, "--variants", "worst"], prog="recipes")
        with pytest.raises(UsageError, match=r"^unknown policy 'hope': choose among entropy, "):
            recipes_job.execute([*words, "--policies", "hope"], prog="recipes")


def test_python_users_get_the_model_back(words: list[str], tmp_path: Path, saved_model: Path) -> None:
    model = train(
        TrainJob(
            from_model=str(saved_model),
            data=str(tmp_path / "data.csv"),
            labels=tuple(LABELS.split(",")),
            output=str(tmp_path / "model"),
            recipe="joint",
            epochs=1,
            precision="float32",
        )
    )

    assert not model.training


def kept_seconds(study: Path, variant: str, *, total: bool = False) -> float:
    score = json.loads((study / f"{variant}-42.json").read_text())
    return float(score["total_seconds" if total else "seconds"])
