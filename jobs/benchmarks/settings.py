"""How a benchmark runs, with everything that the command line may leave open settled."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from deebert.exit_policy import StoredPolicy
from deebert.fused import state_dtype
from deebert.precision import DTYPES, Precision


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What all suites share."""

    device: str
    """``cpu`` or ``cuda``."""
    precision: Precision
    """Ours; rivals name their own."""
    threads: int
    """CPU threads of every contender of the engine suite, in all."""
    replicas: int
    """How many of each contender run side by side, the threads shared out among them."""
    repetitions: int
    """Timed rounds; one more warms up."""
    batch_size: int
    """Samples in a padded batch of the rivals."""
    micro_batch_tokens: tuple[int, ...]
    """Budgets to try; the first is the pipeline's."""
    mean_exit_layers: tuple[float, ...]
    """Of scripted profiles, for a model of 12 layers; scaled to others."""
    policy: StoredPolicy
    """The model's own operating point, or the one asked for; full depth where there is none."""
    rivals: tuple[str, ...]
    """Libraries to compare with."""
    shards: tuple[int, ...]
    """Numbers of shards that the scaling suite tries."""
    memory_rows: tuple[int, ...]
    """Numbers of rows at which the scaling suite looks at memory."""

    @property
    def dtype(self) -> torch.dtype:
        """Ours."""
        return DTYPES[self.precision]

    @property
    def float_precision(self) -> Precision:
        """What transformers, and training, compute in beside us: ours, or what we compute in beside int8."""
        if self.precision != "int8":
            return self.precision
        return next(name for name, dtype in DTYPES.items() if dtype == state_dtype(torch.int8))

    @property
    def threads_each(self) -> int:
        """CPU threads of one replica."""
        return max(1, self.threads // self.replicas)

    @property
    def job_warm_up(self) -> int:
        """Uncounted rounds of whole jobs, on Ray or in training: one; none for a single trial round."""
        return min(1, self.repetitions - 1)

    @property
    def torch_device(self) -> torch.device:
        """As torch wants it."""
        return torch.device(self.device)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "policy": self.policy.to_dict()}
