"""Model folders: loading with checks, and the digests that identify what was loaded.

A folder is what `save_pretrained` of the model and of its tokenizer wrote; hub ids work wherever a folder
does. Knows nothing of runs or outputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from deebert.backbones import family_of
from deebert.config import DeeBertConfig
from deebert.errors import CheckpointError
from deebert.exit_policy import FULL_DEPTH, ExitPolicy, StoredPolicy, policy_from_dict
from deebert.fused import FusedModel
from deebert.fusing import activation, fuse
from deebert.inventory import weight_shapes
from deebert.problem import SINGLE_LABEL
from deebert.weights import (
    SAFETENSORS,
    UNREADABLE,
    announce_hub,
    is_folder_name,
    load_pretrained,
    misfit,
    read_weights,
    reason,
    refuse_pickles,
)

if TYPE_CHECKING:
    from deebert.modeling import DeeBertForSequenceClassification

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
# What decides a backbone's answers and does not show in its weights' names and shapes; beside its activation.
_DECISIVE_FIELDS = ("model_type", "num_attention_heads", "layer_norm_eps", "pad_token_id")


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A loaded DeeBERT model, in whichever form is asked for, and its tokenizer."""

    path: str
    config: DeeBertConfig
    weights: Mapping[str, Tensor]
    """All that `deebert.inventory.weight_shapes` names, float32."""
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(
        cls, path: str, model: DeeBertForSequenceClassification, tokenizer: PreTrainedTokenizerBase
    ) -> Checkpoint:
        """Of a model in its training form, which shares its weights with the checkpoint."""
        made = cls(path=path, config=model.config, weights=model.state_dict(), tokenizer=tokenizer)
        vars(made)["model"] = model  # what the property would make again
        return made

    @cached_property
    def fused(self) -> FusedModel:
        """The weights of the inference form, on the CPU; most are shared."""
        return fuse(self.config, self.weights)

    @cached_property
    def model(self) -> DeeBertForSequenceClassification:
        """The training form, in eval mode; its weights are copies."""
        # Imported here: whoever only runs a model does without transformers' modelling code, which takes seconds.
        from deebert.modeling import DeeBertForSequenceClassification

        return DeeBertForSequenceClassification.of_weights(self.config, self.weights)

    @property
    def digest(self) -> str:
        """See `weights_digest`."""
        return _digest(self.config, self.weights)

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the order of their ids."""
        names: dict[Any, str] = dict(self.config.id2label or {})
        return tuple(str(names[i]) for i in range(len(names)))

    @property
    def exit_policy(self) -> StoredPolicy:
        """The operating point stored with the model, or full depth."""
        stored = self.config.exit_policy
        return FULL_DEPTH if stored is None else policy_from_dict(stored)

    @property
    def longest_input(self) -> int:
        """Tokens that the position embeddings allow."""
        return longest_input(self.config)

    @property
    def default_max_length(self) -> int:
        """What training truncated to, else the longest input."""
        return min(self.config.max_seq_length or self.longest_input, self.longest_input)


def longest_input(config: DeeBertConfig) -> int:
    """Tokens that a model's position embeddings allow."""
    backbone = config.backbone_config
    reserved = backbone.pad_token_id + 1 if family_of(backbone).positions_follow_padding else 0
    return int(backbone.max_position_embeddings) - reserved


def load_checkpoint(name_or_path: str, *, allow_pickle: bool = False) -> Checkpoint:
    """Load a model folder or hub id, in float32. Code that comes with it is never run.

    Args:
        name_or_path: what `deebert train` or `deebert import` wrote.
        allow_pickle: whether weights may be read from `pytorch_model.bin` (tensors only).

    Raises:
        CheckpointError: no such folder, or weights, configuration or tokenizer are missing or do not fit, or
            the weights are pickled.
    """
    if is_folder_name(name_or_path):
        _check_folder(Path(name_or_path), allow_pickle=allow_pickle)
    announce_hub(name_or_path)
    try:
        config = DeeBertConfig.from_pretrained(name_or_path)
    except UNREADABLE as error:
        raise CheckpointError(f"cannot load the model {name_or_path!r}: {reason(error)}") from error
    if config.model_type != "deebert":
        raise CheckpointError(_not_deebert(name_or_path, config.model_type))
    weights = _weights(name_or_path, config, allow_pickle=allow_pickle)
    tokenizer = read_tokenizer(name_or_path, AutoTokenizer, trust_remote_code=False)
    return Checkpoint(path=name_or_path, config=config, weights=weights, tokenizer=tokenizer)


def _weights(name_or_path: str, config: DeeBertConfig, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All that the configuration names, each of its shape, float32; what there is beside them is left."""
    expected = _expected(name_or_path, config)
    if (Path(name_or_path) / SAFETENSORS).is_file():
        found = read_weights(Path(name_or_path), allow_pickle=allow_pickle)
        missing = sorted(expected.keys() - found.keys())
    else:
        found, missing = _found_by_transformers(name_or_path, config, allow_pickle=allow_pickle)
    unfit = sorted(n for n, shape in expected.items() if n in found and tuple(found[n].shape) != shape)
    if unfit:
        raise misfit(name_or_path, unfit[0], found[unfit[0]].shape, expected[unfit[0]])
    if missing:
        raise CheckpointError(
            f"the model {name_or_path!r} lacks {len(missing)} weights, first {missing[0]!r}: save it again"
        )
    # Copies: what safetensors reads lies in the file's own pages, which change or vanish with the file.
    return {name: found[name].to(torch.float32, copy=True) for name in expected}


def _expected(name_or_path: str, config: DeeBertConfig) -> dict[str, tuple[int, ...]]:
    backbone = config.backbone_config
    try:
        activation(getattr(backbone, family_of(backbone).activation))
        expected = weight_shapes(config)
        if config.hidden_size % backbone.num_attention_heads:
            raise ValueError(
                f"its hidden_size is {config.hidden_size}, no multiple of its {backbone.num_attention_heads} heads"
            )
    except UNREADABLE as error:
        raise CheckpointError(f"cannot load the model {name_or_path!r}: {reason(error)}") from error
    return expected


def _found_by_transformers(
    name_or_path: str, config: DeeBertConfig, *, allow_pickle: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights on the hub, in several files, or pickled; and the names of those that are not there."""
    from deebert.modeling import DeeBertForSequenceClassification

    kind = DeeBertForSequenceClassification
    model, missing = load_pretrained(kind, name_or_path, allow_pickle=allow_pickle, config=config)
    return model.state_dict(), missing


def store_int8_agreement(folder: Path, agreement: float) -> None:
    """Note in a model's configuration what was measured; its weights and their digest stay as they are.

    Raises:
        CheckpointError: not a model's folder, or not writable.
    """
    _store(folder, int8_agreement=agreement)


def store_operating_point(folder: Path, policy: ExitPolicy) -> None:
    """Make `policy` what a model does where nobody gives another one.

    Raises:
        CheckpointError: not a model's folder, or not writable.
    """
    _store(folder, exit_policy=policy.to_dict())


def _store(folder: Path, **fields: Any) -> None:
    _check_folder(folder, allow_pickle=True)
    config = folder / "config.json"
    document = {**json.loads(config.read_text()), **fields}
    unfinished = config.with_name("config.json.unfinished")
    try:
        unfinished.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        unfinished.replace(config)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(config)!r}: {error.strerror or error}") from error


def read_tokenizer(name_or_path: str, kind: Any, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer of a class, or of whatever class an Auto class finds.

    Raises:
        CheckpointError: its files cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(name_or_path, **options)
    except Exception as error:  # of a broken file: KeyErrors, and bare exceptions of the Rust side
        raise CheckpointError(
            f"cannot read the tokenizer in {name_or_path!r} ({reason(error)}): save it again"
        ) from error
    return tokenizer


def pretrained_tokenizer(name_or_path: str, backbone: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a backbone or classifier came with.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another model.
    """
    tokenizer = read_tokenizer(name_or_path, AutoTokenizer, trust_remote_code=False)
    # Where there is none, transformers makes one up that knows the special tokens alone.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise CheckpointError(
            f"{name_or_path!r} has no tokenizer: put the one that it was trained with into the folder"
        )
    check_vocabulary(name_or_path, tokenizer, backbone)
    return tokenizer


def check_vocabulary(
    name_or_path: str, tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedConfig
) -> None:
    """Refuse a tokenizer with tokens that the model has no embeddings for.

    Raises:
        CheckpointError: it is one.
    """
    if len(tokenizer) > backbone.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {name_or_path!r} knows {len(tokenizer)} tokens, the model {backbone.vocab_size}: put "
            "the one that the model was trained with into the folder"
        )


def weights_digest(model: DeeBertForSequenceClassification) -> str:
    """SHA-256 of the model's architecture and float32 weights: equal where the answers are.

    The stored operating point and label names do not count; the exit policy has its own digest. Nor do dropout,
    the storage format or the library's version: an upgrade must not make another model of the same one.
    """
    return _digest(model.config, model.state_dict())


def _digest(config: DeeBertConfig, weights: Mapping[str, Tensor]) -> str:
    backbone = config.backbone_config
    fields = {name: getattr(backbone, name, None) for name in _DECISIVE_FIELDS}
    shape = {
        "backbone": {**fields, "hidden_act": getattr(backbone, family_of(backbone).activation)},
        "off_ramp_layers": config.off_ramp_layers,
        "off_ramp_pooling": config.off_ramp_pooling,
        "off_ramp_activation": config.off_ramp_activation,
        # Said only where it differs: models from before problem types keep their digest.
        **({} if config.problem is SINGLE_LABEL else {"problem_type": config.problem_type}),
    }
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_folder(folder: Path, *, allow_pickle: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"no such model folder: {str(folder)!r}; train one with `deebert train`")
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"the model folder {str(folder)!r} has no config.json: give a complete folder")
    try:
        document = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"{str(config)!r} is not JSON ({error}): save the model again") from error
    kind = document.get("model_type") if isinstance(document, dict) else None
    if kind != "deebert":
        raise CheckpointError(_not_deebert(str(folder), kind))
    refuse_pickles(str(folder), allow_pickle=allow_pickle)
    if not any(folder.glob("*.safetensors")) and not (allow_pickle and any(folder.glob("*.bin"))):
        raise CheckpointError(
            f"the model folder {str(folder)!r} has no weights (model.safetensors): save the model again"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"the model folder {str(folder)!r} has no tokenizer (tokenizer.json): save the tokenizer into it"
        )


def _not_deebert(name: str, kind: object) -> str:
    return f"{name!r} holds a {kind!r} model, not a DeeBERT one: give it off-ramps with `deebert train --backbone`"
