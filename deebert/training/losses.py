"""What the stages minimise: small losses on the answers of one batch, composed from a recipe.

Each is a mean over samples, in float32. Knows nothing of models, optimizers or data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.problem import SINGLE_LABEL, Problem
from deebert.training.config import (
    Alternating,
    BackboneStage,
    BornAgain,
    Distillation,
    Joint,
    OffRampStage,
    Teacher,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a model says of one batch, and what it should say."""

    off_ramp_logits: Tensor
    """(R, N, C), shallowest first; R may be 0."""
    final_logits: Tensor
    """(N, C)."""
    labels: Tensor
    """N, in the form that the problem gives them: see `LabelledSequences.labels`."""
    problem: Problem = SINGLE_LABEL
    label_scale: float = 1.0
    """`Problem.label_scale` of the rows to train on."""
    certainties: Tensor | None = None
    """(R + 1, N), of the learning-to-exit head where it trains."""
    target_logits: Tensor | None = None
    """(N, C): a teacher's in stage 1, the frozen final classifier's in stage 2."""
    hidden_distance: Tensor | None = None
    """Scalar: see `hidden_distance`."""


Loss = Callable[[Answers], Tensor]
"""Answers -> a scalar."""


@dataclass(frozen=True)
class StageLoss:
    """What a stage minimises: one loss, or several that take turns."""

    turns: tuple[Loss, ...]

    def at(self, step: int) -> Loss:
        """The loss of one optimizer step, counted from 0."""
        return self.turns[step % len(self.turns)]

    @property
    def whole(self) -> Loss:
        """The one that covers all that the stage trains: what held-out rows are judged by."""
        return self.turns[-1]


def distilled(
    problem: Problem,
    logits: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    distillation: Distillation | None,
) -> Tensor:
    """Each classifier's mean loss, labels and targets mixed as `Distillation` says: (R, N, C) -> (R,)."""
    hard = problem.losses(logits, labels).mean(-1)
    if distillation is None:
        return hard
    assert targets is not None
    soft = problem.divergences(logits, targets, distillation.temperature).mean(-1)
    return (1 - distillation.weight) * hard + distillation.weight * soft


def certainty_losses(
    problem: Problem, certainties: Tensor, logits: Tensor, labels: Tensor, label_scale: float = 1.0
) -> Tensor:
    """Mean squared distance of each certainty to how right the answer is (BERxiT, section 4): (R, N) -> (R,).

    Args:
        problem: says how right an answer is.
        certainties: (R, N).
        logits: (R, N, C), the answers; they get no gradient.
        labels: N.
        label_scale: `Problem.label_scale` of the rows to train on.
    """
    right = problem.correctness(logits.detach(), labels, label_scale)
    return (certainties.float() - right).square().mean(-1)


def hidden_distance(states: Sequence[Tensor], targets: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Mean squared distance of a model's token states to its teacher's, over real tokens, widths and layers.

    Args:
        states: one (N, L, H) a layer.
        targets: the same of the teacher.
        attention_mask: (N, L), 1 for real tokens.
    """
    real = attention_mask.bool()
    distances = [F.mse_loss(s[real].float(), t[real].float()) for s, t in zip(states, targets, strict=True)]
    return torch.stack(distances).mean()


@dataclass(frozen=True, kw_only=True)
class FinalLoss:
    """The final classifier's, towards the labels and a teacher if there is one."""

    teacher: Teacher | BornAgain | None = None

    def __call__(self, answers: Answers) -> Tensor:
        """See `Loss`."""
        loss = distilled(
            answers.problem, answers.final_logits[None], answers.labels, answers.target_logits, self.teacher
        )[0]
        if isinstance(self.teacher, Teacher) and answers.hidden_distance is not None:
            loss = loss + self.teacher.hidden_weight * answers.hidden_distance
        return loss


@dataclass(frozen=True, kw_only=True)
class JointLoss:
    """The weighted sum of the off-ramps' losses, and the final classifier's and the exit head's with weight 1."""

    weights: tuple[float, ...]
    """One per off-ramp."""
    final: FinalLoss
    self_distillation: Distillation | None = None

    def __call__(self, answers: Answers) -> Tensor:
        """See `Loss`."""
        ramps = distilled(
            answers.problem,
            answers.off_ramp_logits,
            answers.labels,
            answers.final_logits.detach(),
            self.self_distillation,
        )
        weighted = (ramps * ramps.new_tensor(self.weights)).sum()
        return self.final(answers) + weighted + _certainty_loss(answers)


@dataclass(frozen=True, kw_only=True)
class OffRampLoss:
    """The sum of the off-ramps' losses, and the exit head's: unless they share a pooler, no weight that trains is
    shared, and each has its own gradient, of which the stage cuts one norm over all."""

    self_distillation: Distillation | None = None

    def __call__(self, answers: Answers) -> Tensor:
        """See `Loss`."""
        ramps = distilled(
            answers.problem,
            answers.off_ramp_logits,
            answers.labels,
            answers.target_logits,
            self.self_distillation,
        )
        return ramps.sum() + _certainty_loss(answers)


def _certainty_loss(answers: Answers) -> Tensor:
    """The learning-to-exit head's, summed over all classifiers; 0 where it does not train."""
    if answers.certainties is None:
        return answers.final_logits.new_zeros(())
    logits = torch.cat([answers.off_ramp_logits, answers.final_logits[None]])
    losses = certainty_losses(
        answers.problem, answers.certainties, logits, answers.labels, answers.label_scale
    )
    return losses.sum()


def backbone_loss(stage: BackboneStage, off_ramp_layers: Sequence[int], num_layers: int) -> StageLoss:
    """The loss of a stage through the backbone.

    Args:
        stage: the objective and the teacher.
        off_ramp_layers: 1-based.
        num_layers: the model's depth.
    """
    final, objective = FinalLoss(teacher=stage.teacher), stage.objective
    if not isinstance(objective, Joint):
        return StageLoss((final,))
    joint = JointLoss(
        weights=off_ramp_weights(objective, off_ramp_layers, num_layers),
        final=final,
        self_distillation=objective.self_distillation,
    )
    return StageLoss((final, joint) if isinstance(objective, Alternating) else (joint,))


def off_ramp_loss(stage: OffRampStage) -> StageLoss:
    """Stage 2's loss."""
    return StageLoss((OffRampLoss(self_distillation=stage.self_distillation),))


def off_ramp_weights(objective: Joint, off_ramp_layers: Sequence[int], num_layers: int) -> tuple[float, ...]:
    """Each off-ramp's weight in the joint loss."""
    linear = objective.weighting == "linear"
    # On the embeddings as after layer 1: weight 0 would leave that off-ramp untrained.
    return tuple(max(layer, 1) / num_layers if linear else 1.0 for layer in off_ramp_layers)
