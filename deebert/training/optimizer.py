"""The optimizer of stages on cached states: AdamW whose learning rate rises, then falls linearly to 0.

Biases do not decay, nor would norms, of which there are none here: what the Trainer makes for stages through the
backbone. Knows nothing of losses or models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from deebert.training.config import StageConfig


def scheduled_adamw(
    module: nn.Module, stage: StageConfig, learning_rate: float, num_steps: int
) -> tuple[torch.optim.AdamW, Any]:
    """A module's optimizer, with the hyper-parameters of `stage` but its learning rate, and its schedule."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        groups["bias" not in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[decays], "weight_decay": stage.weight_decay if decays else 0.0}
            for decays in groups
        ],
        lr=learning_rate,
        eps=stage.adam_epsilon,
        fused=True,  # as the Trainer's: one pass over the weights instead of ten, half of a step here
    )
    return optimizer, get_linear_schedule_with_warmup(
        optimizer, round(stage.warmup_share * num_steps), num_steps
    )
