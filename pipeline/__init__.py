"""Parquet, JSONL, CSV or text in, early-exit predictions out: the streaming batch-inference pipeline.

    from pipeline import ClassifyConfig, classify
    result = classify(ClassifyConfig(model="model", input=("corpus/*.parquet",), output="out"))

Names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import ClassifyConfig, Replicas
    from pipeline.engine import Engine, EngineConfig
    from pipeline.report import write_report
    from pipeline.run import ClassifyResult, classify
    from pipeline.stream import StreamConfig

_HOMES = {
    "ClassifyConfig": "config",
    "ClassifyResult": "run",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Replicas": "config",
    "StreamConfig": "stream",
    "classify": "run",
    "write_report": "report",
}

__all__ = [
    "ClassifyConfig",
    "ClassifyResult",
    "Engine",
    "EngineConfig",
    "Replicas",
    "StreamConfig",
    "classify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pipeline.{_HOMES[name]}"), name)
