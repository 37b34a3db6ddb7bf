"""The optimizer of stages on cached states: AdamW whose learning rate rises, then falls linearly to 0.

What the Trainer makes for stages through the backbone. Knows nothing of losses or models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from deebert.training.config import StageConfig


def scheduled_adamw(
    parameters: Iterable[nn.Parameter], stage: StageConfig, learning_rate: float, num_steps: int
) -> tuple[torch.optim.AdamW, Any]:
    """The optimizer, with the hyper-parameters of `stage` but its learning rate, and its schedule."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        eps=stage.adam_epsilon,
        weight_decay=stage.weight_decay,
        fused=True,  # as the Trainer's: one pass over the weights instead of ten, half of a step here
    )
    return optimizer, get_linear_schedule_with_warmup(
        optimizer, round(stage.warmup_share * num_steps), num_steps
    )
