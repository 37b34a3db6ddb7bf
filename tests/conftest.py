"""What tests share: tiny random models, a tiny real tokenizer, a saved model folder, one Ray, and the real assets."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers: no test talks to a hub

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from deebert.backbones import FAMILIES
from deebert.config import DeeBertConfig
from deebert.fused import FusedModel
from deebert.fusing import fuse
from deebert.modeling import DeeBertForSequenceClassification

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("deterministic")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")
WORDS = ("the", "film", "is", "was", "not", "very", "good", "bad", "great", "dull", "and", "but", "of", "it")
VOCABULARY = (*SPECIAL_TOKENS, *LETTERS, *(f"##{x}" for x in LETTERS), *".,!?'-", *WORDS)
LONGEST = 64
"""Tokens that the tiny models' positions allow."""

_SPREAD = {"word_embeddings": 1.0, "embeddings_project": 0.2, "classifier": 0.6}
"""Standard deviations of matrices, by the module that holds them; 0.3 elsewhere."""

ModelFactory = Callable[..., DeeBertForSequenceClassification]


def make_model(
    family: str = "bert",
    pooling: str = "mean",
    *,
    seed: int = 0,
    num_layers: int = 5,
    num_labels: int = 3,
    **config: object,
) -> DeeBertForSequenceClassification:
    """A random model of 5 layers and width 32 whose off-ramps disagree and whose entropies spread."""
    names = ("negative", "neutral", "positive", "other")[:num_labels]
    model = DeeBertForSequenceClassification(
        DeeBertConfig(
            backbone_config=make_backbone_config(family, num_layers=num_layers),
            off_ramp_pooling=pooling,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            **config,
        )
    )
    randomize(model, seed)
    return model.eval()


def fused_model(model: DeeBertForSequenceClassification) -> FusedModel:
    """The weights of a model's inference form."""
    return fuse(model.config, model.state_dict())


def make_backbone_config(family: str, *, num_layers: int = 5) -> PreTrainedConfig:
    """A family's configuration at width 32 and 64 tokens; ELECTRA's embeddings are narrower, as its small ones' are."""
    shape: dict[str, object] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": LONGEST,
        "pad_token_id": 0,
    }
    if family == "distilbert":
        return AutoConfig.for_model(family, **shape, hidden_dim=48)
    if FAMILIES[family].positions_follow_padding:
        shape |= {"max_position_embeddings": LONGEST + 2, "pad_token_id": 1, "type_vocab_size": 1}
    if family == "electra":
        shape["embedding_size"] = 20
    return AutoConfig.for_model(family, **shape, intermediate_size=48)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights far from a fresh model's: wide enough that samples differ, off-ramps disagree, entropies spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * _SPREAD.get(name.split(".")[-2], 0.3))


@pytest.fixture(scope="session")
def tiny_model() -> ModelFactory:
    """Makes a fresh tiny random model: ``tiny_model(family, pooling, seed=…, num_layers=…, **config)``."""
    return make_model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["cls", "mean"])
def pooling(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, pooling: str) -> DeeBertForSequenceClassification:
    """A tiny model of each family with each pooling."""
    return make_model(family, pooling)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A real WordPiece tokenizer that spells what it does not know, so that any English text has tokens."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=LONGEST,
    )


def save_tiny_model(folder: Path) -> Path:
    """A model folder: tiny BERT, mean pooling, labels negative, neutral, positive; no operating point."""
    make_model("bert", "mean").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See `make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_tiny_model`."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and labelled data."""
    folder = Path(os.environ.get("DEEBERT_ASSETS", REPOSITORY / ".." / "shared" / "assets")).resolve()
    if not folder.is_dir():
        pytest.skip(f"real assets are absent: no folder {folder} (set DEEBERT_ASSETS)")
    return folder


@contextmanager
def local_ray() -> Iterator[None]:
    """A local Ray on two cores, which `classify` finds running and leaves running."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    # Sockets lie below this folder and their paths are short or refused: not in pytest's.
    with tempfile.TemporaryDirectory(prefix="dbt-", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One `local_ray` for all tests that need one."""
    with local_ray():
        yield
