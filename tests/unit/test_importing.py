"""`deebert import`: what it takes from a checkpoint of the original, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from deebert.checkpoint import load_checkpoint
from deebert.errors import CheckpointError, PolicyError
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.importing import import_checkpoint
from jobs import cli
from tests.conftest import REPOSITORY
from tests.original_deebert import BYTE_VOCABULARY, MERGES, make_original, write_json

TEXT = "The good film was not xylophonic!"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A complete BERT checkpoint of theirs: 3 layers, 2 labels, safetensors."""
    return make_original().save(tmp_path / "theirs")


def edit_weights(folder: Path, *, without: str = "", **more: torch.Tensor) -> None:
    """Drop the weights whose name contains `without`, and add others, whose names write a dot as ``__``."""
    path = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not without or without not in name}
    save_file({**kept, **{name.replace("__", "."): value for name, value in more.items()}}, path)


def refusal(source: object, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestWhatBecomesOfIt:
    @pytest.mark.parametrize("prefix", ["bert", "roberta"])
    def test_a_model_folder_that_reads_cls_and_runs_at_full_depth(self, tmp_path: Path, prefix: str) -> None:
        source = make_original(prefix).save(tmp_path / "theirs")

        assert cli.main(["import", str(source), "--output", str(tmp_path / "ours")]) == 0

        checkpoint = load_checkpoint(str(tmp_path / "ours"))
        config = checkpoint.model.config
        assert config.backbone_config.model_type == prefix
        assert config.off_ramp_layers == [1, 2]
        assert config.off_ramp_pooling == "cls"
        assert checkpoint.exit_policy == FULL_DEPTH
        assert checkpoint.tokenizer.is_fast
        assert {path.name for path in (tmp_path / "ours").iterdir()} == {
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        }

    @pytest.mark.parametrize("prefix", ["bert", "roberta"])
    def test_its_own_padding_id_is_the_one_in_their_code(self, tmp_path: Path, prefix: str) -> None:
        source = make_original(prefix).save(tmp_path / "theirs", pad_token_id=7)

        config = import_checkpoint(str(source)).model.config.backbone_config

        assert config.pad_token_id == {"bert": 0, "roberta": 1}[prefix]

    def test_its_backbone_is_what_their_configuration_says(self, tmp_path: Path) -> None:
        # None of these shows in the weights, and none is what a configuration that says nothing means.
        said: dict[str, Any] = {
            "hidden_act": "relu",
            "hidden_dropout_prob": 0.2,
            "attention_probs_dropout_prob": 0.3,
            "initializer_range": 0.05,
            "layer_norm_eps": 1e-6,
        }
        source = make_original().save(tmp_path / "theirs", **said)

        config = import_checkpoint(str(source)).model.config.backbone_config

        assert {name: getattr(config, name) for name in said} == said

    def test_it_is_in_eval_mode(self, source: Path) -> None:
        assert not any(module.training for module in import_checkpoint(str(source)).model.modules())

    def test_half_precision_is_widened_exactly(self, source: Path) -> None:
        halves = {name: value.half() for name, value in load_file(source / "model.safetensors").items()}
        save_file(halves, source / "model.safetensors")

        model = import_checkpoint(str(source)).model

        assert {p.dtype for p in model.parameters()} == {torch.float32}
        stored = halves["bert.encoder.highway.1.pooler.dense.weight"].float()
        assert torch.equal(model.off_ramps[1].dense.weight, stored)

    def test_the_last_highway_is_left_behind_and_named(
        self, source: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO"):
            model = import_checkpoint(str(source)).model

        assert (
            "left behind bert.encoder.highway.2.*: the off-ramp after the last layer was never trained"
            in caplog.messages
        )
        assert len(model.off_ramps) == 2

    def test_a_checkpoint_without_the_last_highway_is_complete(
        self, source: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        edit_weights(source, without="highway.2.")

        with caplog.at_level("INFO"):
            import_checkpoint(str(source))

        assert not [message for message in caplog.messages if "left behind" in message]

    def test_surplus_weights_are_named_and_position_ids_are_no_weights(
        self, source: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        edit_weights(
            source,
            bert__embeddings__position_ids=torch.arange(66)[None],
            cls__predictions__bias=torch.zeros(3),
            lm_head=torch.zeros(1),
        )

        import_checkpoint(str(source))

        assert (
            "left behind 2 weights that have no place here: cls.predictions.bias, lm_head" in caplog.messages
        )

    def test_a_policy_of_ours_in_its_configuration_is_kept(self, tmp_path: Path) -> None:
        policy = {"type": "entropy", "thresholds": 0.3}
        source = make_original().save(tmp_path / "theirs", exit_policy=policy)

        assert import_checkpoint(str(source)).exit_policy == EntropyThreshold(0.3)

    def test_another_policy_is_refused(self, tmp_path: Path) -> None:
        source = make_original().save(tmp_path / "theirs", exit_policy={"type": "patience"})

        with pytest.raises(PolicyError, match="unknown exit policy 'patience'"):
            import_checkpoint(str(source))

    def test_a_folder_at_home_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_original().save(tmp_path / "theirs")
        monkeypatch.setenv("HOME", str(tmp_path))

        assert import_checkpoint("~/theirs").labels == ("LABEL_0", "LABEL_1")


class TestLabels:
    def test_come_from_the_flag(self, source: Path, tmp_path: Path) -> None:
        words = ["import", str(source), "--output", str(tmp_path / "ours"), "--labels", "negative,positive"]

        assert cli.main(words) == 0

        assert load_checkpoint(str(tmp_path / "ours")).labels == ("negative", "positive")

    def test_else_from_its_configuration_in_the_order_of_their_ids(self, tmp_path: Path) -> None:
        names = {"10": "k", **{str(i): f"label {i}" for i in range(10)}}
        source = make_original(num_labels=11).save(tmp_path / "theirs", id2label=names)

        assert import_checkpoint(str(source)).labels == (*(f"label {i}" for i in range(10)), "k")

    def test_else_they_are_numbered_and_it_is_said_so(
        self, source: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert import_checkpoint(str(source)).labels == ("LABEL_0", "LABEL_1")
        assert "does not name its labels" in caplog.text

    @pytest.mark.parametrize("names", [(), ("a",), ("a", "b", "c"), ("a", "a")])
    def test_of_another_number_are_refused(self, source: Path, names: tuple[str, ...]) -> None:
        assert refusal(source, labels=names) == (
            f"the classifier of '{source}' has 2 outputs, but --labels names {len(set(names))} "
            f"({', '.join(names)}): give 2 different names with --labels"
        )

    def test_of_another_number_in_its_configuration_are_refused(self, tmp_path: Path) -> None:
        names = {"0": "a", "1": "b", "2": "c"}
        source = make_original().save(tmp_path / "theirs", id2label=names)

        assert "has 2 outputs, but its config.json names 3 (a, b, c)" in refusal(source)
        assert import_checkpoint(str(source), labels=("x", "y")).labels == ("x", "y")

    @pytest.mark.parametrize("names", [["a", "b"], 5, {"zero": "a", "one": "b"}, {"1": "a", "2": "b"}])
    def test_that_are_not_named_by_their_ids_are_refused(self, tmp_path: Path, names: object) -> None:
        source = make_original().save(tmp_path / "theirs", id2label=names)

        assert refusal(source) == (
            f"cannot read the labels in the config.json of '{source}': id2label is {names}: give the name of each "
            "label by its id, from 0 on"
        )
        assert import_checkpoint(str(source), labels=("x", "y")).labels == ("x", "y")

    def test_a_regression_is_refused(self, tmp_path: Path) -> None:
        source = make_original(num_labels=1).save(tmp_path / "theirs")

        assert "is a regression, whose answers have no entropy to exit by" in refusal(source)


class TestTokenizer:
    def test_berts_is_made_from_its_vocabulary(
        self, source: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        made = import_checkpoint(str(source)).tokenizer

        ours, expected = made(TEXT, "it is dull"), tokenizer(TEXT, "it is dull", return_token_type_ids=True)
        assert made.is_fast
        assert ours.input_ids == expected.input_ids
        assert ours.token_type_ids == expected.token_type_ids
        assert made.model_max_length == 66

    def test_cased_ones_stay_cased(self, source: Path) -> None:
        write_json(source / "tokenizer_config.json", {"do_lower_case": False, "max_len": 512})

        unknown = import_checkpoint(str(source)).tokenizer("The film").input_ids

        assert unknown == [2, 1, import_checkpoint(str(source)).tokenizer.convert_tokens_to_ids("film"), 3]

    def test_robertas_is_made_from_its_vocabulary_and_merges(self, tmp_path: Path) -> None:
        source = make_original("roberta").save(tmp_path / "theirs")

        made = import_checkpoint(str(source)).tokenizer

        expected = ["<s>", "the", "Ġg", "ood", "Ġthe", "</s>"]
        assert ("oo", "d") in MERGES
        assert made.is_fast
        assert made.model_max_length == 64
        assert made("the good the").input_ids == [BYTE_VOCABULARY.index(token) for token in expected]
        assert made("the", "the").tokens() == ["<s>", "the", "</s>", "</s>", "the", "</s>"]

    def test_the_fast_form_is_taken_where_it_lies_there(self, source: Path) -> None:
        usual = import_checkpoint(str(source)).tokenizer
        usual.save_pretrained(source)
        (source / "vocab.txt").unlink()

        assert import_checkpoint(str(source)).tokenizer(TEXT).data == usual(TEXT).data

    @pytest.mark.parametrize(
        ("prefix", "lost", "needed"),
        [
            ("bert", "vocab.txt", "vocab.txt"),
            ("roberta", "vocab.json", "vocab.json and merges.txt"),
            ("roberta", "merges.txt", "vocab.json and merges.txt"),
        ],
    )
    def test_none_is_refused(self, tmp_path: Path, prefix: str, lost: str, needed: str) -> None:
        source = make_original(prefix).save(tmp_path / "theirs")
        (source / lost).unlink()

        assert refusal(source) == (
            f"the checkpoint '{source}' has no tokenizer (tokenizer.json, or {needed}): "
            "put the one that it was trained with into it"
        )

    def test_of_another_model_is_refused(self, source: Path) -> None:
        with (source / "vocab.txt").open("a") as file:
            file.write("one\nmore\n")

        assert "knows 99 tokens, the model 97: put the one that the model was trained with" in refusal(source)

    def test_that_cannot_be_read_is_refused(self, source: Path) -> None:
        (source / "tokenizer.json").write_text("{")

        assert refusal(source).startswith(f"cannot read the tokenizer in '{source}' (")


class TestIncompleteCheckpoints:
    def test_no_folder(self, tmp_path: Path) -> None:
        missing = tmp_path / "nowhere"

        assert refusal(missing) == f"no such checkpoint folder: '{missing}'; give a folder or a hub id"

    def test_no_folder_at_home(self) -> None:
        assert refusal("~/nowhere") == "no such checkpoint folder: '~/nowhere'; give a folder or a hub id"

    def test_no_configuration(self, source: Path) -> None:
        (source / "config.json").unlink()

        assert refusal(source) == f"the checkpoint '{source}' has no config.json: give a complete folder"

    @pytest.mark.parametrize(
        ("content", "said"), [("{", "is not JSON"), ("[]", "is no configuration: give a complete folder")]
    )
    def test_a_configuration_that_is_none(self, source: Path, content: str, said: str) -> None:
        (source / "config.json").write_text(content)

        assert said in refusal(source)

    def test_missing_weights_are_named(self, source: Path) -> None:
        edit_weights(source, without="highway.1.")

        assert refusal(source) == (
            f"the checkpoint '{source}' lacks 4 weights: bert.encoder.highway.1.classifier.bias, "
            "bert.encoder.highway.1.classifier.weight, bert.encoder.highway.1.pooler.dense.bias, "
            "bert.encoder.highway.1.pooler.dense.weight; give a complete one"
        )

    def test_five_missing_weights_are_all_named(self, source: Path) -> None:
        edit_weights(source, without="highway.1.")
        edit_weights(source, without="bert.pooler.dense.bias")

        message = refusal(source)

        assert "lacks 5 weights: bert.encoder.highway.1.classifier.bias, " in message
        assert message.endswith("dense.weight, bert.pooler.dense.bias; give a complete one")

    def test_many_missing_weights_are_counted(self, source: Path) -> None:
        edit_weights(source, without="encoder.layer.0.")

        message = refusal(source)

        assert "lacks 16 weights: bert.encoder.layer.0.attention.output.LayerNorm.bias, " in message
        assert message.endswith(" and 11 more; give a complete one")

    def test_no_final_classifier(self, source: Path) -> None:
        edit_weights(source, without="classifier.weight")

        assert "lacks 'classifier.weight': give one of a sequence classifier" in refusal(source)

    def test_a_classifier_without_off_ramps(self, source: Path) -> None:
        edit_weights(source, without="highway")

        assert refusal(source) == (
            f"the checkpoint '{source}' has no off-ramps (bert.encoder.highway.*): "
            "give them to it with `deebert train --from-classifier`"
        )

    def test_another_family(self, source: Path) -> None:
        save_file({"gpt2.wte.weight": torch.zeros(2, 2)}, source / "model.safetensors")

        assert "are of neither a BERT nor a RoBERTa DeeBERT (first name: 'gpt2.wte.weight')" in refusal(
            source
        )

    def test_weights_that_do_not_fit_the_configuration(self, source: Path) -> None:
        document = json.loads((source / "config.json").read_text())
        write_json(source / "config.json", {**document, "intermediate_size": 40})

        message = refusal(source)

        assert "has shape (48" in message
        assert "its config.json makes it (40" in message

    def test_more_layers_than_the_configuration_says(self, source: Path) -> None:
        document = json.loads((source / "config.json").read_text())
        write_json(source / "config.json", {**document, "num_hidden_layers": 2})

        assert refusal(source) == (
            f"the checkpoint '{source}' has more layers than the 2 of its config.json: "
            "give the configuration that belongs to the weights"
        )

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_attention_heads": 5},
            {"hidden_size": "wide"},
            {"num_hidden_layers": None},
            {"hidden_act": "gelu_newer"},
        ],
    )
    def test_a_configuration_that_describes_no_model(self, source: Path, fields: dict[str, Any]) -> None:
        document = json.loads((source / "config.json").read_text())
        write_json(source / "config.json", {**document, **fields})

        assert refusal(source).startswith(f"the config.json in '{source}' describes no model (")

    @pytest.mark.parametrize("kept_bytes", [0, 5, 1000])
    def test_weights_that_were_cut_short(self, source: Path, kept_bytes: int) -> None:
        weights = source / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept_bytes])

        assert refusal(source).startswith(f"cannot read the weights '{weights}': ")

    def test_no_weights(self, source: Path) -> None:
        (source / "model.safetensors").unlink()

        assert refusal(source) == (
            f"the folder '{source}' has no weights (model.safetensors): give a complete one"
        )


class Trap:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class TestPickles:
    def test_are_refused_unless_allowed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = make_original().save(tmp_path / "theirs", pickled=True)

        assert cli.main(["import", str(source), "--output", str(tmp_path / "ours")]) == 2

        assert capsys.readouterr().err == (
            f"deebert import: the weights of '{source}' are pickled (pytorch_model.bin), and reading a pickle can run "
            "code: give --allow-pickle if you trust where it comes from\n"
        )
        assert not (tmp_path / "ours").exists()

    @pytest.mark.parametrize("kept_bytes", [0, 1, 5, 18, 1000])
    def test_that_were_cut_short(self, tmp_path: Path, kept_bytes: int) -> None:
        weights = make_original().save(tmp_path / "theirs", pickled=True) / "pytorch_model.bin"
        weights.write_bytes(weights.read_bytes()[:kept_bytes])

        assert refusal(weights.parent, allow_pickle=True).startswith(f"cannot read the weights '{weights}': ")

    def test_safetensors_are_read_even_where_pickles_are_allowed(self, source: Path) -> None:
        (source / "pytorch_model.bin").write_bytes(b"not even a pickle")

        import_checkpoint(str(source), allow_pickle=True)

    def test_give_nothing_but_tensors_when_allowed(self, tmp_path: Path) -> None:
        source, mark = make_original().save(tmp_path / "theirs", pickled=True), tmp_path / "mark"
        torch.save({"bert.x": Trap(mark)}, source / "pytorch_model.bin")

        message = refusal(source, allow_pickle=True)

        assert message.startswith(f"cannot read the weights '{source / 'pytorch_model.bin'}': ")
        assert not mark.exists()
        pickle.loads(pickle.dumps(Trap(mark)))  # the trap works
        assert mark.exists()

    @pytest.mark.parametrize("content", [[torch.zeros(1)], {"bert.x": torch.zeros(1), "epoch": 3}])
    def test_of_something_else_are_refused(self, content: object, tmp_path: Path) -> None:
        source = make_original().save(tmp_path / "theirs", pickled=True)
        torch.save(content, source / "pytorch_model.bin")

        assert "holds no plain set of weights" in refusal(source, allow_pickle=True)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """A hub on this machine whose every repository is `folder`: its address, and the files that were fetched."""
    commit, fetched = "0" * 40, set[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path, headers = self.path.split("?")[0], {"Content-Type": "application/json"}
            if "/tree/" in path:
                files = [{"type": "file", "path": f.name, "size": f.stat().st_size} for f in folder.iterdir()]
                content = json.dumps([{**file, "oid": f"{file['path']}"} for file in files]).encode()
            elif "/resolve/" in path:
                name = path.rpartition("/")[2]
                content, headers = (
                    (folder / name).read_bytes(),
                    {"ETag": f'"{name}"', "X-Repo-Commit": commit},
                )
                fetched.add(name)
            else:
                content = json.dumps({"id": "someone/else", "sha": commit, "siblings": []}).encode()
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", fetched
        server.shutdown()


class TestHubIds:
    NAME = "someone/bert_base-SST2-two_stage"

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The hub library's cache, empty."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return tmp_path / "hub" / f"models--{self.NAME.replace('/', '--')}"

    def fetched(self, cache: Path, **options: Any) -> None:
        """As if the library had fetched it earlier."""
        commit = "0" * 40
        make_original().save(cache / "snapshots" / commit, **options)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)

    def test_what_was_fetched_is_imported(self, cache: Path) -> None:
        self.fetched(cache)

        checkpoint = import_checkpoint(self.NAME, labels=("negative", "positive"))

        assert checkpoint.path == self.NAME
        assert checkpoint.labels == ("negative", "positive")

    @pytest.mark.parametrize("allow_pickle", [False, True])
    def test_what_is_read_is_fetched_and_nothing_beyond(
        self, allow_pickle: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        theirs = make_original().save(tmp_path / "theirs")
        for more in ("pytorch_model.bin", "optimizer.pt", "flax_model.msgpack"):
            (theirs / more).write_bytes(b"large")
        with hub(theirs) as (address, fetched):
            of_the_library = huggingface_hub.constants
            template = of_the_library.HUGGINGFACE_CO_URL_TEMPLATE.replace(of_the_library.ENDPOINT, address)
            monkeypatch.setattr(of_the_library, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(of_the_library, "ENDPOINT", address)
            monkeypatch.setattr(of_the_library, "HUGGINGFACE_CO_URL_TEMPLATE", template)

            checkpoint = import_checkpoint(self.NAME, allow_pickle=allow_pickle)

        assert checkpoint.tokenizer(TEXT).data == import_checkpoint(str(theirs)).tokenizer(TEXT).data
        assert fetched == {
            *("config.json", "model.safetensors", "vocab.txt"),
            *("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
            *(["pytorch_model.bin"] if allow_pickle else []),
        }

    def test_pickles_need_the_flag_here_too(self, cache: Path) -> None:
        self.fetched(cache, pickled=True)

        assert refusal(self.NAME) == (
            f"the hub's '{self.NAME}' has no model.safetensors: "
            "if you trust its pytorch_model.bin, give --allow-pickle"
        )
        assert import_checkpoint(self.NAME, allow_pickle=True).labels == ("LABEL_0", "LABEL_1")

    def test_what_cannot_be_fetched_is_refused(self, cache: Path) -> None:
        assert refusal(self.NAME).startswith(
            f"cannot fetch '{self.NAME}', which is no folder here, from the hub: "
        )

    def test_what_cannot_be_a_hub_id_is_refused(self, cache: Path) -> None:
        assert refusal("no such thing").startswith("cannot fetch 'no such thing', which is no folder here")


class TestCommand:
    def test_python_m_jobs_import_is_the_same(self, source: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "jobs.import", "--source", str(source), "--output"]

        done = subprocess.run(
            [*command, str(tmp_path / "ours")], cwd=REPOSITORY, capture_output=True, text=True
        )

        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert "wrote " in done.stderr
        assert load_checkpoint(str(tmp_path / "ours")).model.config.num_hidden_layers == 3

    def test_an_existing_folder_is_kept_unless_told_otherwise(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / "mine.txt").touch()
        words = ["import", str(source), "--output", str(tmp_path / "ours")]

        assert cli.main(words) == 2
        assert "exists: choose another or give --overwrite" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]
        assert cli.main([*words, "--overwrite"]) == 0

    def test_an_output_that_is_a_file_is_refused(
        self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "ours").touch()

        assert cli.main(["import", str(source), "--output", str(tmp_path / "ours")]) == 2
        assert "is a file: choose another" in capsys.readouterr().err
