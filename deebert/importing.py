"""Checkpoints of the original DeeBERT and of Hugging Face's research project of that name, turned into ours.

Knows their names, and what of them was ever trained: https://github.com/castorini/DeeBERT and its port, BERT and
RoBERTa. Their "highways" are our off-ramps. Knows nothing of commands.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
)

from deebert.checkpoint import Checkpoint, check_vocabulary, longest_input, read_tokenizer
from deebert.config import DeeBertConfig, names_by_id
from deebert.errors import CheckpointError
from deebert.exit_policy import policy_from_dict
from deebert.modeling import DeeBertForSequenceClassification
from deebert.weights import PICKLE, SAFETENSORS, UNREADABLE, is_folder_name, misfit, read_weights, reason

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One of the two families that those projects know; the other names are the same in both."""

    config: type[BertConfig] | type[RobertaConfig]
    tokenizer: type[PreTrainedTokenizerBase]
    vocabulary: tuple[str, ...]
    pad_token_id: int
    """As written into their embeddings' code: what their configurations say of it had no effect."""


_KINDS: Mapping[str, _Kind] = {
    "bert": _Kind(config=BertConfig, tokenizer=BertTokenizer, vocabulary=("vocab.txt",), pad_token_id=0),
    "roberta": _Kind(
        config=RobertaConfig,
        tokenizer=RobertaTokenizer,
        vocabulary=("vocab.json", "merges.txt"),
        pad_token_id=1,
    ),
}
"""By the prefix of the weights' names: their oldest configurations do not name a model type."""

_BACKBONE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def import_checkpoint(
    source: str, *, labels: Sequence[str] | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Read a checkpoint of theirs as a model of ours, with its tokenizer in the fast form.

    Off-ramps and final classifier read [CLS]. Their thresholds were flags, not part of a checkpoint, so that
    the model runs at full depth unless its configuration has an `exit_policy` of ours. The highway after the
    last layer is left behind: no loss of theirs ever reached it, and here the final classifier answers.

    Args:
        source: folder or hub id.
        labels: label names in the order of their ids; those of its `config.json` when None.
        allow_pickle: whether weights may be read from `pytorch_model.bin` (tensors only).

    Raises:
        CheckpointError: no such checkpoint, or one that is incomplete, pickled or of another kind.
    """
    folder = _folder(source, allow_pickle=allow_pickle)
    document = _document(folder)
    theirs = read_weights(folder, allow_pickle=allow_pickle)
    prefix = _prefix(folder, theirs)
    config = _config(folder, document, theirs, prefix, labels)
    try:
        model = DeeBertForSequenceClassification(config)
    except UNREADABLE as error:
        raise CheckpointError(_no_model(folder, error)) from error
    _fill(model, theirs, prefix, folder)
    tokenizer = _tokenizer(folder, _KINDS[prefix], model)
    return Checkpoint.of(source, model.train(False), tokenizer)


def _folder(source: str, *, allow_pickle: bool) -> Path:
    """Where the checkpoint's files are; those of a hub id are fetched first, and nothing beyond what is read."""
    if is_folder_name(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"no such checkpoint folder: {source!r}; give a folder or a hub id")
        return folder
    wanted = ["config.json", SAFETENSORS, *_TOKENIZER_FILES, *([PICKLE] if allow_pickle else [])]
    try:
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"cannot fetch {source!r}, which is no folder here, from the hub: {reason(error)}"
        ) from error
    if not allow_pickle and not (folder / SAFETENSORS).is_file():
        raise CheckpointError(
            f"the hub's {source!r} has no {SAFETENSORS}: if you trust its {PICKLE}, give --allow-pickle"
        )
    return folder


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"the checkpoint {str(folder)!r} has no config.json: give a complete folder")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not JSON ({error}): give a complete folder") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{str(path)!r} is no configuration: give a complete folder")
    return document


def _prefix(folder: Path, theirs: Mapping[str, Tensor]) -> str:
    found = [prefix for prefix in _KINDS if any(name.startswith(f"{prefix}.") for name in theirs)]
    if not found:
        raise CheckpointError(
            f"the weights in {str(folder)!r} are of neither a BERT nor a RoBERTa DeeBERT (first name: "
            f"{min(theirs, default='none')!r}): give a checkpoint of castorini/DeeBERT or Hugging Face's port"
        )
    prefix = found[0]
    if not any(name.startswith(f"{prefix}.encoder.highway.") for name in theirs):
        raise CheckpointError(
            f"the checkpoint {str(folder)!r} has no off-ramps ({prefix}.encoder.highway.*): give them to it with "
            "`deebert train --from-classifier`"
        )
    return prefix


def _config(
    folder: Path,
    document: dict[str, Any],
    theirs: Mapping[str, Tensor],
    prefix: str,
    labels: Sequence[str] | None,
) -> DeeBertConfig:
    kind = _KINDS[prefix]
    fields = {name: document[name] for name in _BACKBONE_FIELDS if name in document}
    names = _labels(folder, document, theirs, labels)
    if (policy := document.get("exit_policy")) is not None:
        policy_from_dict(policy)
    try:
        backbone = kind.config(**fields, pad_token_id=kind.pad_token_id)
    except UNREADABLE as error:
        raise CheckpointError(_no_model(folder, error)) from error
    return DeeBertConfig(
        backbone_config=backbone,
        off_ramp_pooling="cls",
        exit_policy=policy,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )


def _no_model(folder: Path, error: Exception) -> str:
    return f"the config.json in {str(folder)!r} describes no model ({reason(error)}): give a complete folder"


def _labels(
    folder: Path, document: dict[str, Any], theirs: Mapping[str, Tensor], given: Sequence[str] | None
) -> list[str]:
    """Label names, as many as the final classifier has outputs."""
    if "classifier.weight" not in theirs:
        raise CheckpointError(
            f"the checkpoint {str(folder)!r} lacks 'classifier.weight': give one of a sequence classifier"
        )
    count = len(theirs["classifier.weight"])
    if count < 2:
        raise CheckpointError(
            f"the checkpoint {str(folder)!r} is a regression, whose answers have no entropy to exit by: give a "
            "classifier"
        )
    if given is not None:
        return _counted(list(given), count, "--labels names", folder)
    stored = document.get("id2label")
    if stored is None:
        log.warning(
            "%s does not name its labels: they are LABEL_0, LABEL_1, … unless --labels names them", folder
        )
        return [f"LABEL_{i}" for i in range(count)]
    try:
        names = list(names_by_id(stored).values())
    except ValueError as error:
        raise CheckpointError(
            f"cannot read the labels in the config.json of {str(folder)!r}: {error}"
        ) from error
    return _counted(names, count, "its config.json names", folder)


def _counted(names: list[str], count: int, who: str, folder: Path) -> list[str]:
    if len(names) != count or len(set(names)) != count:
        raise CheckpointError(
            f"the classifier of {str(folder)!r} has {count} outputs, but {who} {len(set(names))} "
            f"({', '.join(names)}): give {count} different names with --labels"
        )
    return names


def _fill(
    model: DeeBertForSequenceClassification, theirs: Mapping[str, Tensor], prefix: str, folder: Path
) -> None:
    """Give the model their weights; missing ones are refused, surplus ones named."""
    ours, layers = model.state_dict(), model.config.num_hidden_layers
    if any(name.startswith(f"{prefix}.encoder.layer.{layers}.") for name in theirs):
        raise CheckpointError(
            f"the checkpoint {str(folder)!r} has more layers than the {layers} of its config.json: give the "
            "configuration that belongs to the weights"
        )
    sources = {name: _their_name(name, prefix) for name in ours}
    if missing := sorted(source for source in sources.values() if source not in theirs):
        raise CheckpointError(
            f"the checkpoint {str(folder)!r} lacks {len(missing)} weights: {_some(missing)}; give a complete one"
        )
    for name, source in sources.items():
        if ours[name].shape != theirs[source].shape:
            raise misfit(str(folder), source, theirs[source].shape, ours[name].shape)
    model.load_state_dict({name: theirs[source].to(torch.float32) for name, source in sources.items()})
    _name_the_rest(set(theirs) - set(sources.values()), f"{prefix}.", layers)


def _their_name(ours: str, prefix: str) -> str:
    """``off_ramps.3.dense.bias`` -> ``bert.encoder.highway.3.pooler.dense.bias``, and so on."""
    part, rest = ours.split(".", 1)
    if part == "backbone":
        return f"{prefix}.{rest}"
    if part == "final_classifier":
        return f"{prefix}.pooler.{rest}" if rest.startswith("dense.") else rest
    layer, rest = rest.split(".", 1)
    return f"{prefix}.encoder.highway.{layer}.{'pooler.' if rest.startswith('dense.') else ''}{rest}"


def _name_the_rest(unused: set[str], prefix: str, num_layers: int) -> None:
    last = f"{prefix}encoder.highway.{num_layers - 1}."
    if any(name.startswith(last) for name in unused):
        log.info("left behind %s*: the off-ramp after the last layer was never trained", last)
    # A buffer of some versions: 0, 1, 2, …
    known = (last, f"{prefix}embeddings.position_ids")
    if surplus := sorted(name for name in unused if not name.startswith(known)):
        log.warning("left behind %d weights that have no place here: %s", len(surplus), _some(surplus))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tokenizer(folder: Path, kind: _Kind, model: DeeBertForSequenceClassification) -> PreTrainedTokenizerBase:
    files = (("tokenizer.json",), kind.vocabulary)
    if not any(all((folder / name).is_file() for name in names) for names in files):
        raise CheckpointError(
            f"the checkpoint {str(folder)!r} has no tokenizer (tokenizer.json, or "
            f"{' and '.join(kind.vocabulary)}): put the one that it was trained with into it"
        )
    tokenizer = read_tokenizer(str(folder), kind.tokenizer, model_max_length=longest_input(model.config))
    check_vocabulary(str(folder), tokenizer, model.config.backbone_config)
    return tokenizer
