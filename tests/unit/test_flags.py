"""One set of dataclass fields gives flags, job-file keys and help: all three must mean the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import VERBS, main
from jobs.flags import parse_job
from pipeline.config import ClassifyConfig, Replicas
from pipeline.errors import UsageError

REQUIRED = ("--model", "m", "--input", "a", "--output", "o")

JobFile = Callable[[str], str]


def parse(*words: str) -> ClassifyConfig:
    return parse_job(ClassifyConfig, words, prog="deebert classify", description="")


@pytest.fixture
def job_file(tmp_path: Path) -> JobFile:
    """Writes a job file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def job_class(verb: str) -> Any:
    """The dataclass that the verb parses its words into."""
    if verb == "classify":
        return ClassifyConfig
    names = vars(import_module(f"jobs.{verb}"))
    return names[f"{verb.title()}Job"]


def help_of_flags(text: str) -> dict[str, str]:
    """Each flag's paragraph of a help text."""
    return {block.split()[0]: " ".join(block.split()) for block in re.split(r"\n  (?=--)", text)}


def one_sentence(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


class TestRequired:
    def test_all_missing_flags_are_named_at_once(self) -> None:
        with pytest.raises(UsageError) as error:
            parse("--model", "m")
        assert one_sentence(error.value) == ("--input, --output are missing; see `deebert classify --help`")

    def test_one_missing_flag(self) -> None:
        with pytest.raises(UsageError) as error:
            parse(*REQUIRED[:4])
        assert one_sentence(error.value) == "--output is missing; see `deebert classify --help`"

    def test_the_job_file_counts(self, job_file: JobFile) -> None:
        config = parse("--config", job_file("model: m\ninput: a\noutput: o\n"))
        assert (config.model, config.input, config.output) == ("m", ("a",), "o")

    def test_an_empty_key_is_left_out(self, job_file: JobFile) -> None:
        with pytest.raises(UsageError, match=r"^--model is missing"):
            parse("--config", job_file("model:\ninput: a\noutput: o\n"))


class TestHelp:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_flag_and_its_default_are_shown(
        self, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "1000")  # argparse breaks lines at hyphens
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        shown = help_of_flags(capsys.readouterr().out)
        for field in dataclasses.fields(job_class(verb)):
            line = shown["--" + field.name.replace("_", "-")]
            if field.default is dataclasses.MISSING:
                assert "(required)" in line
            elif isinstance(field.default, tuple) and field.default:
                assert f"(default: {','.join(map(str, field.default))})" in line
            elif field.default not in (None, False, ()):
                assert f"(default: {field.default})" in line

    def test_a_shown_list_can_be_given_back(self) -> None:
        job = job_class("evaluate")
        default: Any = next(f.default for f in dataclasses.fields(job) if f.name == "thresholds")
        given = parse_job(
            job,
            ["--model", "m", "--data", "d", "--thresholds", ",".join(map(str, default))],
            prog="deebert evaluate",
            description="",
        )
        assert given.thresholds == default

    def test_usage_lists_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in VERBS)

    def test_every_verb_is_a_module_with_an_entry(self) -> None:
        assert all(callable(import_module(f"jobs.{verb}").execute) for verb in VERBS)


class TestValues:
    def test_defaults(self) -> None:
        config = parse(*REQUIRED)
        given = {"model": "m", "input": ("a",), "output": "o"}
        for field in dataclasses.fields(config):
            assert getattr(config, field.name) == given.get(field.name, field.default)

    def test_a_flag_that_takes_several_adds_up(self) -> None:
        config = parse("--model", "m", "--output", "o", "--input", "a", "b", "--input", "c")
        assert config.input == ("a", "b", "c")

    def test_switches_need_no_value(self) -> None:
        assert parse(*REQUIRED, "--overwrite").overwrite is True
        assert parse(*REQUIRED).overwrite is False

    @pytest.mark.parametrize(
        ("text", "value"), [("a", ("a",)), ("a,b", ("a", "b")), (" a , b ,", ("a", "b")), ("", ())]
    )
    def test_comma_lists(self, text: str, value: tuple[str, ...]) -> None:
        assert parse(*REQUIRED, "--keep-columns", text).keep_columns == value

    @pytest.mark.parametrize(
        ("text", "value"), [("2", Replicas(2, 2)), ("1:4", Replicas(1, 4)), ("auto", None)]
    )
    def test_replicas(self, text: str, value: Replicas | None) -> None:
        assert parse(*REQUIRED, "--replicas", text).replicas == value

    def test_replicas_print_as_they_are_written(self) -> None:
        assert [str(Replicas(2, 2)), str(Replicas(1, 4))] == ["2", "1:4"]

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("0.2", 0.2),
            ("none", -1.0),
            ("-1", -1.0),
            ("none,0.1,0.2", (None, 0.1, 0.2)),
            ("0.1,None", (0.1, None)),
        ],
    )
    def test_thresholds(self, text: str, value: object) -> None:
        assert parse(*REQUIRED, "--entropy-threshold", text).entropy_threshold == value

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("--replicas", "0"), "'0' is not a number of replicas: write N, MIN:MAX or auto"),
            (("--replicas", "4:1"), "'4:1' is not a number of replicas"),
            (("--replicas", "many"), "'many' is not a number of replicas"),
            (("--entropy-threshold", "high"), "'high' is not a number of nats"),
            (("--entropy-threshold", ""), "give a number of nats"),
            (("--shard-rows", "0"), "'0' is not a whole number above 0"),
            (("--shard-rows", "ten"), "--shard-rows: 'ten' is not a whole number; "),
            (("--shard-rows", "50,000"), "--shard-rows: '50,000' is not a whole number: write 50000; "),
            (("--shard-rows", "1e6"), "'1e6' is not a whole number: write 1000000; "),
            (("--shard-rows", "1,5"), "'1,5' is not a whole number; "),
            (("--threads", "1.5"), "--threads: '1.5' is not a whole number; "),
            (("--control", "5%"), "--control: '5%' is not a number: write 0.05 for 5 %; "),
            (("--control", "some"), "--control: 'some' is not a number; "),
            (("--hang-seconds", "1h"), "--hang-seconds: '1h' is not a number; "),
            (("--control", "2"), "'2' is not a share between 0 and 1"),
            (("--control", "nan"), "'nan' is not a share between 0 and 1"),
            (("--max-bad-rows", "few"), "--max-bad-rows: 'few' is not a whole number; "),
            (("--max-bad-rows", "-5"), "--max-bad-rows: '-5' is not a whole number from 0; "),
            (("--precision", "int4"), "invalid choice: 'int4'"),
            (("--on-changed", "ask"), "invalid choice: 'ask'"),
            (("--treads", "2"), "--treads"),
            (("--keep-columns",), "expected one argument"),
            (("stray",), "stray"),
        ],
    )
    def test_misuse_names_the_flag_and_points_to_help(self, words: tuple[str, ...], says: str) -> None:
        with pytest.raises(UsageError) as error:
            parse(*REQUIRED, *words)
        message = one_sentence(error.value)
        assert says in message
        assert "`deebert classify --help`" in message

    @pytest.mark.parametrize(
        ("verb", "words", "says"),
        [
            ("train", ("--batch-size", "1e3"), "--batch-size: '1e3' is not a whole number: write 1000; "),
            ("train", ("--held-out", "5%"), "--held-out: '5%' is not a number: write 0.05 for 5 %; "),
            ("evaluate", ("--certainty-thresholds", "0.9,5"), "'5' is not a share between 0 and 1; "),
            ("evaluate", ("--thresholds", "0.1;0.2"), "--thresholds: '0.1;0.2' is not a number; "),
            ("evaluate", ("--learning-rate", "small"), "--learning-rate: 'small' is not a number; "),
            ("bench", ("--seed", "-1"), "--seed: '-1' is not a whole number from 0; "),
            ("recipes", ("--seeds", "42,-1"), "--seeds: '-1' is not a whole number from 0; "),
            ("recipes", ("--held-out", "3"), "--held-out: '3' is not a share between 0 and 1; "),
            ("demo", ("--control", "5"), "--control: '5' is not a share between 0 and 1; "),
        ],
    )
    def test_other_verbs_say_it_likewise_before_they_do_anything(
        self, verb: str, words: tuple[str, ...], says: str
    ) -> None:
        with pytest.raises(UsageError) as error:
            parse_job(job_class(verb), words, prog=f"deebert {verb}", description="")
        assert says in one_sentence(error.value)


class TestPython:
    """The same fields from Python, where no parser stands before them."""

    @pytest.mark.parametrize(
        ("field", "value", "says"),
        [
            ("input", (), "() is empty: give at least one"),
            ("input", (Path("a"),), "is neither a str nor a tuple of them"),
            ("output", Path("o"), "is not a str: give one"),
            ("text_column", ("a", "b"), "('a', 'b') is not a str: give one"),
            ("keep_columns", 5, "5 is neither a str nor a tuple of them: give one of the two"),
            ("replicas", 0, "'0' is not a number of replicas"),
            ("replicas", Replicas(3, 1), "'3:1' is not a number of replicas"),
            ("replicas", "1:4", "'1:4' is neither an int nor Replicas(MIN, MAX): give one of the two"),
            ("entropy_threshold", "0.69", "'0.69' is neither a number nor a tuple of one for each layer"),
            ("entropy_threshold", [0.1, None], "[0.1, None] is neither a number nor a tuple"),
            ("certainty_threshold", ("0.9",), "('0.9',) is neither a number nor a tuple"),
            ("precision", "bf16", "'bf16' is none of auto, float32, bfloat16, float16, int8"),
            ("device", "gpu", "'gpu' is none of auto, cpu, cuda"),
            ("on_changed", "Refuse", "'Refuse' is none of refuse, redo"),
            ("max_length", 0, "'0' is not a whole number above 0"),
            ("threads", "2", "'2' is neither an int nor a float"),
            ("threads", Replicas(2, 2), "is neither an int nor a float"),
            ("control", 5, "'5' is not a share between 0 and 1"),
            ("max_bad_rows", -5, "'-5' is not a whole number from 0"),
            ("probabilities", "no", "'no' is not a switch: give True or False"),
        ],
    )
    def test_what_no_flag_could_have_given_is_refused(self, field: str, value: object, says: str) -> None:
        given: dict[str, Any] = {"model": "m", "input": "a", "output": "o", field: value}
        with pytest.raises(UsageError) as error:
            ClassifyConfig(**given)
        message = one_sentence(error.value)
        assert message.startswith(f"{field}: ")
        assert says in message

    def test_one_path_and_one_column_need_no_tuple(self) -> None:
        config = ClassifyConfig(model="m", input="corpus/", output="o", keep_columns="doc_id")
        assert (config.inputs, config.kept_columns) == (("corpus/",), ("doc_id",))
        config = ClassifyConfig(model="m", input=["a", "b"], output="o", keep_columns=[])
        assert (config.inputs, config.kept_columns) == (("a", "b"), ())

    def test_a_fixed_number_of_replicas_needs_no_range(self) -> None:
        config = ClassifyConfig(model="m", input="a", output="o", replicas=2)
        assert config.replica_range == Replicas(2, 2)
        assert dataclasses.replace(config, replicas=Replicas(1, 4)).replica_range == Replicas(1, 4)
        assert dataclasses.replace(config, replicas=None).replica_range is None

    def test_the_range_is_exported(self) -> None:
        import pipeline

        assert pipeline.Replicas is Replicas


class TestJobFile:
    def test_flags_win_over_the_file_and_the_file_over_defaults(self, job_file: JobFile) -> None:
        config = parse(
            "--config",
            job_file("model: m\ninput: [a, b]\noutput: o\nshard-rows: 7\ncontrol: 0.1\n"),
            "--shard-rows",
            "9",
            "--input",
            "c",
        )
        assert (config.shard_rows, config.input, config.control) == (9, ("c",), 0.1)
        assert config.micro_batch_tokens is None

    @pytest.mark.parametrize(
        ("line", "name", "value"),
        [
            ("shard_rows: 9", "shard_rows", 9),
            ("shard-rows: 9", "shard_rows", 9),
            ("overwrite: true", "overwrite", True),
            ("overwrite: False", "overwrite", False),
            ("keep-columns: a,b", "keep_columns", ("a", "b")),
            ("keep-columns: [a, b]", "keep_columns", ("a", "b")),
            ("entropy-threshold: 0.2", "entropy_threshold", 0.2),
            ("entropy-threshold: none", "entropy_threshold", -1.0),
            ("entropy-threshold: [none, 0.1]", "entropy_threshold", (None, 0.1)),
            ("entropy-threshold: null", "entropy_threshold", None),
            ("replicas: auto", "replicas", None),
            ("replicas: 2", "replicas", Replicas(2, 2)),
            ("replicas: 1:4", "replicas", Replicas(1, 4)),  # a YAML 1.1 reader sees 64 here
            ("text-column: 2020-01-01", "text_column", "2020-01-01"),
            ("text-column: on", "text_column", "on"),
            ("id-column: 007", "id_column", "007"),
            ("id-column: ~", "id_column", None),
        ],
    )
    def test_values_mean_what_they_mean_as_flags(
        self, job_file: JobFile, line: str, name: str, value: object
    ) -> None:
        found = (
            getattr(parse(*REQUIRED[:2], *REQUIRED[4:], "--config", job_file(f"input: i\n{line}")), name)
            if (name != "input")
            else getattr(parse(*REQUIRED[:2], *REQUIRED[4:], "--config", job_file(line)), name)
        )
        assert found == value

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("shard-row: 7", "unknown key 'shard-row': did you mean 'shard-rows'?"),
            ("Model: m", "unknown key 'Model': did you mean 'model'?"),
            ("xyzzy: 1", "unknown key 'xyzzy': known: model, input, "),
            ("overwrite: maybe", "overwrite is a switch, write true or false"),
            ("overwrite: [true]", "overwrite is a switch, write true or false"),
            ("shard-rows: many", "shard_rows: "),
            ("shard-rows: true", "shard_rows: "),
            ("shard-rows: 1.5", "shard_rows: "),
            ("model: [a, b]", "model is not a single value"),
            ("model: {a: b}", "model is not a single value"),
            ("control: 2", "control: '2' is not a share between 0 and 1"),
            ("precision: int4", "precision is 'int4', choose from auto, float32"),
            ("- model", "is not a mapping of flags to values"),
            ("", "is not a mapping of flags to values"),
            ("model: [", "cannot read --config"),
        ],
    )
    def test_misuse_names_the_file_and_the_key(self, job_file: JobFile, text: str, says: str) -> None:
        path = job_file(text)
        with pytest.raises(UsageError) as error:
            parse("--config", path)
        message = one_sentence(error.value)
        assert says in message
        assert path in message

    def test_a_missing_file(self) -> None:
        with pytest.raises(UsageError, match=r"cannot read --config 'nowhere\.yaml'"):
            parse("--config", "nowhere.yaml")

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "job.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError, match="cannot read --config"):
            parse("--config", str(path))
