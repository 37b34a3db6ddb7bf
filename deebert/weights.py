"""Weights files: which of them a folder has, and that reading them runs no code.

A pickle can run anything when it is read. Weights come from safetensors, unless a caller allows pickles; then
only their tensors are read (`torch.load(weights_only=True)`). Knows nothing of what the models are for.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deebert.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
UNREADABLE = (
    OSError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    RuntimeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
"""What the libraries raise for weights and configurations that are broken."""
_UNREADABLE_PICKLE = (*UNREADABLE, AssertionError, LookupError, struct.error)
"""A pickle is a program: one that was cut short or damaged fails anywhere in `torch.load`."""


def reason(error: Exception) -> str:
    """The first line of what a library says, to be quoted; with the next, where it only announces that.

    Of a name that is no folder's, transformers says no more than that the network failed.
    """
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return "there is no such folder here, and the hub cannot be asked for that name: check the path, or the network"
    if isinstance(error, KeyError):  # whose text is the key alone
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def is_folder_name(name_or_path: str) -> bool:
    """Whether a name means a folder: a hub id has at most one slash and does not exist as one."""
    return (
        Path(name_or_path).exists()
        or name_or_path.startswith((".", "~", os.sep))
        or name_or_path.count("/") > 1
    )


def announce_hub(name_or_path: str) -> None:
    """Say that a name is no folder's before the hub is asked for it: without a network, that takes a while."""
    if not is_folder_name(name_or_path):
        log.info("there is no folder %r here: asking the hub for it", name_or_path)


def refuse_pickles(
    name_or_path: str, *, allow_pickle: bool, remedy: str = "save the model again as safetensors"
) -> None:
    """Refuse a folder whose weights are all pickled, unless that is allowed; hub ids pass.

    Args:
        name_or_path: a model folder or hub id.
        allow_pickle: whether pickled weights will do.
        remedy: what the reader of the refusal should do.

    Raises:
        CheckpointError: there are pickled weights only.
    """
    folder = Path(name_or_path)
    if allow_pickle or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(path.name for path in folder.glob("*.bin") if path.name != "training_args.bin"):
        raise CheckpointError(
            f"the weights of {name_or_path!r} are pickled ({pickled[0]}), and reading a pickle can run code: {remedy}"
        )


def load_pretrained(
    model: type[PreTrainedModel], name_or_path: str, *, allow_pickle: bool, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained model in float32, and the names of its weights that were not there and are random now.

    float32 whatever the storage: optimizers need it, and narrower weights convert exactly.

    Args:
        model: its class.
        name_or_path: folder or hub id.
        allow_pickle: whether pickled weights will do where there are no others.
        options: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: pickled weights that are not allowed, or weights that are broken or do not fit the
            configuration.
    """
    refuse_pickles(name_or_path, allow_pickle=allow_pickle)
    try:
        loaded: Any = model.from_pretrained(
            name_or_path,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the refusal can name one of them
            **options,
        )
    except UNREADABLE as error:
        raise CheckpointError(f"cannot load the model {name_or_path!r}: {reason(error)}") from error
    pretrained, loading = loaded
    if unfit := sorted(loading["mismatched_keys"]):
        name, stored, expected = unfit[0]
        raise misfit(name_or_path, name, stored, expected)
    return pretrained, sorted(loading["missing_keys"])


def misfit(model: str, weight: str, stored: Sequence[int], expected: Sequence[int]) -> CheckpointError:
    """What to raise for a weight of another shape than the configuration gives it."""
    return CheckpointError(
        f"the weight {weight!r} of {model!r} has shape {tuple(stored)}, its config.json makes it {tuple(expected)}: "
        "give the configuration that belongs to the weights"
    )


def read_weights(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of a folder's `model.safetensors`, else of its `pytorch_model.bin` where that is allowed.

    Raises:
        CheckpointError: no weights, pickled ones that are not allowed, or a file that cannot be read.
    """
    safe, pickled = folder / SAFETENSORS, folder / PICKLE
    try:
        if safe.is_file():
            return load_file(safe)
        if allow_pickle and pickled.is_file():
            return _tensors(torch.load(pickled, map_location="cpu", weights_only=True), pickled)
    except _UNREADABLE_PICKLE as error:
        file = safe if safe.is_file() else pickled
        raise CheckpointError(f"cannot read the weights {str(file)!r}: {reason(error)}") from error
    refuse_pickles(
        str(folder), allow_pickle=allow_pickle, remedy="give --allow-pickle if you trust where it comes from"
    )
    raise CheckpointError(f"the folder {str(folder)!r} has no weights ({SAFETENSORS}): give a complete one")


def _tensors(content: object, file: Path) -> dict[str, Tensor]:
    if isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    raise CheckpointError(
        f"{str(file)!r} holds no plain set of weights: give a file that `torch.save` made of one"
    )
