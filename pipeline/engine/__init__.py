"""Early exits in batches: layer buffers, a scheduler, a runner, and the engine that joins them.

    submit ──▶ buffer 1 ──▶ runner: layers 1..a, off-ramp a ──▶ exits
                                        │ survivors
               buffer a+1 ◀─────────────┘
                   └──────▶ runner: layers a+1..b, off-ramp b ──▶ exits …

Pure torch: no Ray, no Arrow, no files.
"""

from pipeline.engine.engine import Engine, EngineConfig, warm_up
from pipeline.engine.runner import Exits
from pipeline.engine.stats import EngineStats

__all__ = ["Engine", "EngineConfig", "EngineStats", "Exits", "warm_up"]
