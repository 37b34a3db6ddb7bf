"""DeeBERT: transformer encoders with off-ramps, so that easy samples leave early.

Names are imported on first use: `import deebert` alone costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deebert.checkpoint import load_checkpoint
    from deebert.config import DeeBertConfig
    from deebert.encoder import PackedEncoder
    from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, ExitPolicy, LearningToExit, entropy
    from deebert.modeling import DeeBertForSequenceClassification
    from deebert.packing import PackedTokens

_HOMES = {
    "DeeBertConfig": "config",
    "DeeBertForSequenceClassification": "modeling",
    "EntropyThreshold": "exit_policy",
    "ExitPolicy": "exit_policy",
    "FULL_DEPTH": "exit_policy",
    "LearningToExit": "exit_policy",
    "PackedEncoder": "encoder",
    "PackedTokens": "packing",
    "entropy": "exit_policy",
    "load_checkpoint": "checkpoint",
}

__all__ = [
    "FULL_DEPTH",
    "DeeBertConfig",
    "DeeBertForSequenceClassification",
    "EntropyThreshold",
    "ExitPolicy",
    "LearningToExit",
    "PackedEncoder",
    "PackedTokens",
    "entropy",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deebert' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"deebert.{_HOMES[name]}"), name)
