"""`deebert calibrate`: the point that it stores is what classifies from then on; misuse is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deebert.checkpoint import load_checkpoint, store_int8_agreement, weights_digest
from deebert.exit_policy import EntropyThreshold
from deebert.precision import resolve_precision
from jobs.cli import main
from pipeline.config import ClassifyConfig
from pipeline.planning import make_plan
from tests.conftest import make_model, make_tokenizer

Refusal = Callable[..., str]
TEXTS = [f"the film is {word} and {other}" for word in ("good", "bad", "dull") for other in "abcdefghijklm"]


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture
def data(model: Path, tmp_path: Path) -> Path:
    """Labelled with what the model says at full depth."""
    checkpoint = load_checkpoint(str(model))
    tokens = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        said = checkpoint.model(**tokens).logits.argmax(-1).tolist()
    path = tmp_path / "data.csv"
    path.write_text(
        "text,label\n" + "".join(f"{t},{checkpoint.labels[i]}\n" for t, i in zip(TEXTS, said, strict=True))
    )
    return path


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    def calibrate(*words: object) -> str:
        capsys.readouterr()
        assert main(["calibrate", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err.removeprefix("deebert calibrate: ").rstrip()

    return calibrate


def test_the_point_is_stored_and_runs_go_by_it(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_checkpoint(str(model))

    # In the precision that the labels were said in: in another, what is nearly a tie may be another label.
    words = ["--model", str(model), "--data", str(data), "--precision", "float32"]
    assert main(["calibrate", *words, "--keep", "0.9"]) == 0

    after = load_checkpoint(str(model))
    policy = after.exit_policy
    assert isinstance(policy, EntropyThreshold)
    assert isinstance(policy.thresholds, float)
    assert weights_digest(after.model) == weights_digest(before.model)
    config = ClassifyConfig(model=str(model), input=(str(data),), output=str(tmp_path / "out"))
    assert make_plan(config, has_gpu=False).identity.exit_policy == policy.to_dict()
    said = capsys.readouterr().out
    assert f"operating point   entropy < {policy.thresholds} nats\n" in said
    assert "100.00 % at full depth\n" in said
    assert f"stored in         {model / 'config.json'}\n" in said


@pytest.mark.parametrize(
    ("stored", "said"),
    [({"type": "entropy", "thresholds": 0.25}, "entropy < 0.25 nats"), ("mine", "mine"), (None, None)],
)
def test_a_point_that_is_replaced_is_named(
    model: Path, data: Path, stored: object, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "exit_policy": stored}))

    assert main(["calibrate", "--model", str(model), "--data", str(data), "--speed-up", "1.01"]) == 0

    lines = capsys.readouterr().out.splitlines()
    found = [line.removeprefix("in place of").strip() for line in lines if line.startswith("in place of")]
    assert found == ([] if said is None else [said])


def test_a_point_that_saves_nothing_is_not_stored(model: Path, data: Path, refusal: Refusal) -> None:
    checkpoint = load_checkpoint(str(model))
    for ramp in checkpoint.model.off_ramps:  # all but even, whatever the text
        for parameter in ramp.parameters():
            parameter.data.zero_()
        ramp.classifier.bias.data[:] = torch.tensor([1e-4, 0.0, 0.0])
    checkpoint.model.save_pretrained(model)
    config = (model / "config.json").read_bytes()

    said = refusal("--model", model, "--data", data, "--keep", 1)

    assert said == (
        "no threshold that meets this target saves anything, so none is stored: relax the target, or train longer"
    )
    assert (model / "config.json").read_bytes() == config


def test_a_trace_that_is_there_spares_running_the_model(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["--model", str(model), "--data", str(data), "--trace", str(tmp_path / "t.parquet")]
    assert main(["evaluate", *words, "--timing-rows", "0"]) == 0
    written = (tmp_path / "t.parquet").stat().st_mtime_ns

    assert main(["calibrate", *words, "--speed-up", "1.01"]) == 0

    assert (tmp_path / "t.parquet").stat().st_mtime_ns == written
    assert load_checkpoint(str(model)).exit_policy != EntropyThreshold(None)


@pytest.mark.parametrize(
    ("target", "bounded"), [("--max-disagreement", "other answers"), ("--max-drop", "drop in accuracy")]
)
def test_the_bound_that_was_asked_for_is_stated_and_no_other(
    model: Path, data: Path, target: str, bounded: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--model", str(model), "--data", str(data), target, "0.2"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "95 % confidence" in line] == [bounded]


def test_of_numbers_it_is_not_said_how_many_are_full_depths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    make_model(num_labels=1, problem_type="regression", learns_to_exit=True).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"{t},{i}\n" for i, t in enumerate(TEXTS)))
    words = ["--model", str(model), "--data", str(tmp_path / "data.csv"), "--speed-up", "1.01"]

    assert main(["calibrate", *words]) == 0

    said = capsys.readouterr().out
    assert "other answers" not in said
    assert f"% on {len(TEXTS)} texts; " in said


def test_a_bound_is_of_what_classify_chooses_by_itself(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_int8_agreement(model, 1.0)
    precision = resolve_precision("auto", int8_agreement=1.0)

    assert main(["calibrate", "--model", str(model), "--data", str(data), "--max-disagreement", "0.2"]) == 0

    said = f"less than 20 % (95 % confidence; {precision}, texts cut to 64 tokens)\n"
    assert said in capsys.readouterr().out


def test_a_bound_from_a_trace_is_of_the_traces_precision_and_windows(
    model: Path, data: Path, tmp_path: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(model), "--data", str(data), "--trace", str(tmp_path / "t.parquet")]
    words += ["--max-length", "32", "--window-stride", "4"]
    assert main(["evaluate", *words, "--precision", "bfloat16", "--timing-rows", "0"]) == 0

    assert main(["calibrate", *words, "--max-disagreement", "0.2"]) == 0

    said = "(95 % confidence; bfloat16, texts in windows of 32 tokens that share 4)\n"
    assert said in capsys.readouterr().out
    asked = refusal(*words, "--max-disagreement", "0.2", "--precision", "float32")
    assert "is of another precision (bfloat16, not float32)" in asked


def test_no_bound_that_the_texts_cannot_show(model: Path, data: Path, refusal: Refusal) -> None:
    config = (model / "config.json").read_bytes()

    said = refusal("--model", model, "--data", data, "--max-disagreement", 0.02)

    assert said == (
        "39 texts cannot show that less than 0.02 of all differ from full depth: give at least 149, or a larger share"
    )
    assert (model / "config.json").read_bytes() == config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no target is given: give one of --keep, --max-disagreement, --max-drop and --speed-up"),
        (("--keep", "0.9", "--speed-up", "2"), "more than one target is given: give one of --keep"),
        (("--keep", "0"), "argument --keep: '0' is not a share between 0 and 1"),
        (("--max-disagreement", "1"), "argument --max-disagreement: '1' is not a share between 0 and 1"),
        (("--keep", "99%"), "argument --keep: '99%' is not a number: write 0.99 for 99 %"),
        (("--speed-up", "1"), "argument --speed-up: '1' is not a number above 1"),
        (("--speed-up", "6"), "no threshold makes the model 6 times as fast: the most is "),
    ],
)
def test_misuse(model: Path, data: Path, words: tuple[str, ...], says: str, refusal: Refusal) -> None:
    assert refusal("--model", model, "--data", data, *words).startswith(says)


def test_what_there_is_to_calibrate_by(model: Path, refusal: Refusal) -> None:
    assert refusal("--model", model, "--keep", 0.9).startswith("give texts that training has not seen")
    assert refusal("--model", "someone/model", "--data", "d.csv", "--keep", 0.9) == (
        "the model 'someone/model' is no folder, where an operating point could be stored"
    )


def test_the_configuration_keeps_all_else(model: Path, data: Path) -> None:
    before = json.loads((model / "config.json").read_text())

    assert main(["calibrate", "--model", str(model), "--data", str(data), "--keep", "0.5"]) == 0

    after = json.loads((model / "config.json").read_text())
    assert {**after, "exit_policy": None} == {**before, "exit_policy": None}
