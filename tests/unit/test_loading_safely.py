"""Loading a model runs no code that came with it: not a pickle's, not a model's own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from deebert.checkpoint import load_checkpoint
from deebert.errors import BackboneError, CheckpointError
from deebert.importing import import_checkpoint
from deebert.modeling import DeeBertForSequenceClassification
from tests.conftest import REPOSITORY, make_backbone_config, randomize
from tests.original_deebert import make_original

Load = Callable[..., Any]


def from_backbone(name: str, **options: Any) -> DeeBertForSequenceClassification:
    return DeeBertForSequenceClassification.from_backbone(name, labels=["no", "yes"], **options)


LOADERS: dict[str, Load] = {
    "load_checkpoint": load_checkpoint,
    "from_backbone": from_backbone,
    "from_classifier": DeeBertForSequenceClassification.from_classifier,
    "import_checkpoint": import_checkpoint,
}


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A Hugging Face BERT classifier, 2 labels, safetensors."""
    model = BertForSequenceClassification(make_backbone_config("bert", num_layers=2))
    randomize(model, seed=1)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(loader: str, saved_model: Path, classifier: Path, tmp_path: Path) -> Path:
    """What the loader takes, complete and safe, for a test to spoil."""
    if loader == "load_checkpoint":
        return Path(shutil.copytree(saved_model, tmp_path / "model"))
    if loader == "import_checkpoint":
        return make_original().save(tmp_path / "theirs")
    return classifier


def pickle_weights(folder: Path) -> None:
    """Move a folder's weights into a pickle."""
    safe = folder / "model.safetensors"
    torch.save(load_file(safe), folder / "pytorch_model.bin")
    safe.unlink()


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class TestPickles:
    def test_are_refused_by_name_with_the_remedy(self, loader: str, folder: Path) -> None:
        pickle_weights(folder)

        with pytest.raises(CheckpointError) as caught:
            LOADERS[loader](str(folder))
        remedy = (
            "give --allow-pickle if you trust where it comes from"
            if loader == "import_checkpoint"
            else "save the model again as safetensors"
        )
        assert str(caught.value) == (
            f"the weights of '{folder}' are pickled (pytorch_model.bin), and reading a pickle can run code: {remedy}"
        )

    def test_give_the_same_weights_when_allowed(self, loader: str, folder: Path) -> None:
        safe = model_of(LOADERS[loader](str(folder))).backbone.state_dict()
        pickle_weights(folder)

        pickled = model_of(LOADERS[loader](str(folder), allow_pickle=True)).backbone.state_dict()

        assert safe.keys() == pickled.keys()
        assert all(torch.equal(safe[name], pickled[name]) for name in safe)

    def test_run_nothing_even_when_allowed(self, loader: str, folder: Path, tmp_path: Path) -> None:
        weights, mark = load_file(folder / "model.safetensors"), tmp_path / "mark"
        (folder / "model.safetensors").unlink()
        torch.save({**weights, "trap": Trap(mark)}, folder / "pytorch_model.bin")

        with pytest.raises(Exception, match=r"(?i)weights.only"):
            LOADERS[loader](str(folder), allow_pickle=True)

        assert not mark.exists()
        torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap works
        assert mark.exists()

    def test_beside_safetensors_are_not_read(self, loader: str, folder: Path, tmp_path: Path) -> None:
        torch.save({"trap": Trap(tmp_path / "mark")}, folder / "pytorch_model.bin")

        LOADERS[loader](str(folder))
        LOADERS[loader](str(folder), allow_pickle=True)

        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("loader", ["load_checkpoint", "from_backbone", "from_classifier"], indirect=True)
    def test_beside_safetensors_in_several_files_are_not_read(
        self, loader: str, folder: Path, tmp_path: Path
    ) -> None:
        whole = model_of(LOADERS[loader](str(folder))).backbone.state_dict()
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(weights)}
        for file in set(places.values()):
            save_file(
                {n: v for n, v in weights.items() if places[n] == file}, folder / file, {"format": "pt"}
            )
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        torch.save({"trap": Trap(tmp_path / "mark")}, folder / "pytorch_model.bin")

        shards = model_of(LOADERS[loader](str(folder))).backbone.state_dict()

        assert all(torch.equal(whole[name], shards[name]) for name in whole)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("loader", ["load_checkpoint", "from_backbone", "from_classifier"], indirect=True)
    def test_of_a_hub_id_are_refused_unless_allowed(
        self, loader: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        pickle_weights(folder)
        # As if the hub's library had fetched it earlier.
        cache, commit = tmp_path / "hub" / "models--someone--model", "0" * 40
        shutil.copytree(folder, cache / "snapshots" / commit)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text(commit)

        with pytest.raises(CheckpointError, match=r"^cannot load the model 'someone/model': "):
            LOADERS[loader]("someone/model")
        assert model_of(LOADERS[loader]("someone/model", allow_pickle=True)).config.num_labels in (2, 3)


def model_of(loaded: Any) -> DeeBertForSequenceClassification:
    return loaded if isinstance(loaded, DeeBertForSequenceClassification) else loaded.model  # type: ignore[no-any-return]


class TestCode:
    def add_code(self, folder: Path, mark: Path) -> None:
        """Point the model, its configuration and its tokenizer to a module of the folder that makes a file."""
        (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
        auto_map = {
            "AutoConfig": "own.Config",
            "AutoModel": "own.Model",
            "AutoModelForSequenceClassification": "own.Model",
            "AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"],
        }
        for name in ("config.json", "tokenizer_config.json"):
            path = folder / name
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**content, "auto_map": auto_map}))

    def test_of_a_model_is_never_run(
        self, loader: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mark = tmp_path / "mark"
        self.add_code(folder, mark)

        labels = model_of(LOADERS[loader](str(folder))).config.num_labels

        assert labels == (3 if loader == "load_checkpoint" else 2)
        assert not mark.exists()
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        with pytest.raises(AttributeError, match="Config"):  # the trap works
            get_class_from_dynamic_module("own.Config", str(folder))
        assert mark.exists()

    @pytest.mark.parametrize("loader", ["load_checkpoint", "from_backbone", "from_classifier"], indirect=True)
    def test_of_a_family_that_only_its_own_code_knows_is_not_even_recommended(
        self, loader: str, folder: Path, tmp_path: Path
    ) -> None:
        self.add_code(folder, tmp_path / "mark")
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "their-own"}))

        with pytest.raises((CheckpointError, BackboneError), match="'their-own'") as caught:
            LOADERS[loader](str(folder))

        assert "trust_remote_code" not in str(caught.value)
        assert not (tmp_path / "mark").exists()

    def test_is_trusted_nowhere(self) -> None:
        sources = [p for name in ("deebert", "pipeline", "jobs") for p in (REPOSITORY / name).rglob("*.py")]

        found = [
            line.strip()
            for path in sources
            for line in path.read_text().splitlines()
            if "trust_remote_code" in line
        ]

        assert len(sources) > 50
        assert found
        assert all("trust_remote_code=False" in line for line in found)
