"""Stage 2, fast: the learning-to-exit head, beside the off-ramps that it judges.

It reads the same cached states as they and learns how right what they just said was (Xin et al., BERxiT, EACL
2021, section 4), with an optimizer of its own: the off-ramps train to the bit as they would without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deebert.modeling import ExitHead
from deebert.problem import Problem
from deebert.training.config import OffRampStage
from deebert.training.losses import certainty_losses
from deebert.training.optimizer import scheduled_adamw
from deebert.training.processes import summed


class CachedExitHead:
    """A learning-to-exit head and its optimizer's side of the stage."""

    def __init__(
        self,
        head: ExitHead,
        problem: Problem,
        stage: OffRampStage,
        num_steps: int,
        label_scale: float = 1.0,
    ) -> None:
        """Prepare to train `head` in place for `num_steps` steps, on labels of a `Problem.label_scale`."""
        self._head, self._problem, self._max_grad_norm = head, problem, stage.max_grad_norm
        self._label_scale = label_scale
        self._optimizer, self._schedule = scheduled_adamw(
            head, stage, stage.exit_head_learning_rate, num_steps
        )
        self._sum, self._steps = torch.zeros((), device=head.linear.weight.device), 0

    def step(self, pooled: Tensor, logits: Tensor, labels: Tensor, share: float) -> None:
        """One optimizer step.

        Args:
            pooled: (R + 1, n, H) states of this process's rows, the final classifier's last.
            logits: (R + 1, n, C), what was said of them.
            labels: n.
            share: n over the rows of all processes.
        """
        certainties = self._head(pooled)
        losses = certainties
        if len(labels):
            losses = certainty_losses(self._problem, certainties, logits, labels, self._label_scale)
        loss = share * losses.sum()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        summed([p.grad for p in self._head.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self._head.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._sum += loss.detach()
        self._steps += 1

    def drain(self) -> float:
        """The mean loss since the last time, over all processes and summed over classifiers."""
        summed([self._sum])
        mean = float(self._sum / self._steps)
        self._sum.zero_()
        self._steps = 0
        return mean
