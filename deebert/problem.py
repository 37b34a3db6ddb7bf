"""What a model is asked: to choose one label, any number of labels, or a number.

One object a problem type, with the names that Hugging Face gives them: its loss, how unsure an answer is, what
logits mean as a prediction, and how far two answers are apart. Everything else asks it instead of asking which
problem it is. Knows nothing of models, files or policies.

Shapes: logits are (..., N, C), N samples and C outputs; leading dimensions, such as one for the off-ramps, are
carried along.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert.exit_policy import entropy

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
_DEVIATION_OF_STS_B = 1.5
"""Standard deviation of STS-B's labels, 0 to 5, which BERxiT's correctness of a number was made for."""


@dataclass(frozen=True)
class Problem(ABC):
    """One problem type."""

    name: ClassVar[ProblemType]
    """Hugging Face's."""

    def __reduce__(self) -> tuple[Any, ...]:
        return problem_of, (self.name,)  # one object a problem type, in other processes too

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Each sample's loss, float32: (..., N, C) logits, labels as `label_tensor` makes them -> (..., N)."""

    @abstractmethod
    def divergences(self, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """How far answers are from another model's: (..., N, C), (N, C) -> (..., N) float32.

        Targets get no gradient. T² keeps the gradient's size whatever the temperature (Hinton et al., 2015).
        """

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """What an answer says: label ids (..., N) int64, chosen labels (..., N, C) bool, or (..., N) float32."""

    @abstractmethod
    def predict_scores(self, scores: Tensor) -> Tensor:
        """The same, of `scores` or of a mean of several: (..., N, C) float."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities of the labels, or the value itself, (..., N, C) float32."""

    @abstractmethod
    def agreement(self, predictions: Tensor, others: Tensor) -> Tensor:
        """How far predictions agree with others, or with labels, from 0 to 1: (..., N), float32."""

    @abstractmethod
    def entropy(self, logits: Tensor) -> Tensor:
        """How unsure answers are, in nats: (..., N) float32, NaN where the problem has no such thing."""

    @abstractmethod
    def entropy_of_scores(self, scores: Tensor) -> Tensor:
        """The same, of `scores` or of a mean of several, in their dtype."""

    @abstractmethod
    def outcomes(self, num_labels: int) -> int | None:
        """Of the question that entropy is about, whose largest is their logarithm; None where it is about none."""

    @abstractmethod
    def label_tensor(self, labels: Sequence[Any], num_labels: int) -> Tensor:
        """Labels as losses take them: from ids, from sequences of ids, or from numbers."""

    @abstractmethod
    def misfit(self, labels: Tensor, num_labels: int) -> str | None:
        """What is wrong with labels for a model of `num_labels` outputs; None where they fit."""

    def correctness(self, logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
        """What a learning-to-exit head should say (Xin et al., BERxiT, 2021, section 4): (..., N) in [0, 1].

        `scale` is `label_scale` of the labels that the model trains on.
        """
        return self.agreement(self.predict(logits), labels)

    def label_scale(self, labels: Tensor) -> float:
        """The error that counts as an error of 1 does on STS-B; 1 where answers are right or wrong."""
        return 1.0


@dataclass(frozen=True)
class _SingleLabel(Problem):
    name = "single_label_classification"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        wanted = labels.expand(logits.shape[:-1])
        flat = F.cross_entropy(logits.float().flatten(0, -2), wanted.flatten(), reduction="none")
        return flat.view(wanted.shape)

    def divergences(self, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        wanted = F.log_softmax(targets.detach().float() / temperature, dim=-1)
        said = F.log_softmax(logits.float() / temperature, dim=-1)
        return temperature**2 * (wanted.exp() * (wanted - said)).sum(-1)

    def predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def predict_scores(self, scores: Tensor) -> Tensor:
        return scores.argmax(-1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)

    def agreement(self, predictions: Tensor, others: Tensor) -> Tensor:
        return (predictions == others).float()

    def entropy(self, logits: Tensor) -> Tensor:
        return entropy(logits)

    def entropy_of_scores(self, scores: Tensor) -> Tensor:
        nats: Tensor = torch.special.entr(scores).sum(-1)
        return nats

    def outcomes(self, num_labels: int) -> int:
        return num_labels

    def label_tensor(self, labels: Sequence[Any], num_labels: int) -> Tensor:
        return torch.tensor(labels, dtype=torch.long)

    def misfit(self, labels: Tensor, num_labels: int) -> str | None:
        least, most = int(labels.min()), int(labels.max())
        if 0 <= least <= most < num_labels:
            return None
        return f"the labels run from {least} to {most} but the model has {num_labels}: name all labels"


@dataclass(frozen=True)
class _MultiLabel(Problem):
    """Each label is a question of its own, answered through a sigmoid."""

    name = "multi_label_classification"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        wanted = labels.to(torch.float32).expand(logits.shape)
        return F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").mean(-1)

    def divergences(self, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The mean of the labels' own divergences."""
        wanted, said = targets.detach().float() / temperature, logits.float() / temperature
        p = wanted.sigmoid()
        of_yes = F.logsigmoid(wanted) - F.logsigmoid(said)
        of_no = F.logsigmoid(-wanted) - F.logsigmoid(-said)
        return temperature**2 * (p * of_yes + (1 - p) * of_no).mean(-1)

    def predict(self, logits: Tensor) -> Tensor:
        """Labels whose probability is above one half."""
        return logits > 0

    def predict_scores(self, scores: Tensor) -> Tensor:
        return scores > 0.5

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def agreement(self, predictions: Tensor, others: Tensor) -> Tensor:
        """1 where the two sets of labels are the same, else 0."""
        return (predictions.bool() == others.bool()).all(-1).float()

    def entropy(self, logits: Tensor) -> Tensor:
        """The largest of the labels' binary entropies: all labels leave together, so the least sure one decides.

        Their mean would let one open question hide behind many labels that hardly ever apply.
        """
        z = logits.float()
        p = z.sigmoid()
        return (-(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z))).amax(-1)

    def entropy_of_scores(self, scores: Tensor) -> Tensor:
        nats: Tensor = (torch.special.entr(scores) + torch.special.entr(1 - scores)).amax(-1)
        return nats

    def outcomes(self, num_labels: int) -> int:
        return 2

    def label_tensor(self, labels: Sequence[Any], num_labels: int) -> Tensor:
        hot = torch.zeros(len(labels), num_labels)
        rows = [row for row, ids in enumerate(labels) for _ in ids]
        hot[rows, [i for ids in labels for i in ids]] = 1.0
        return hot

    def misfit(self, labels: Tensor, num_labels: int) -> str | None:
        if (
            labels.dim() == 2
            and labels.shape[1] == num_labels
            and bool(((labels == 0) | (labels == 1)).all())
        ):
            return None
        return (
            f"multi-label data of shape {tuple(labels.shape)} does not say yes or no to each of the model's "
            f"{num_labels} labels: give one 0 or 1 a row and label"
        )


@dataclass(frozen=True)
class _Regression(Problem):
    """One number a sample. Nothing about it says how sure it is: only a learning-to-exit head can."""

    name = "regression"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (self.predict(logits) - labels.float()).square()

    def divergences(self, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The squared distance; a number has no temperature."""
        return (self.predict(logits) - self.predict(targets.detach())).square()

    def predict(self, logits: Tensor) -> Tensor:
        return logits.float()[..., 0]

    def predict_scores(self, scores: Tensor) -> Tensor:
        return scores[..., 0].float()

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float()

    def agreement(self, predictions: Tensor, others: Tensor) -> Tensor:
        """1 - tanh|a - b|."""
        return 1 - (predictions.float() - others.float()).abs().tanh()

    def correctness(self, logits: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
        """BERxiT's, in units of `scale`: of labels from 0 to 100 an error of 5 would be as wrong as any."""
        return self.agreement(self.predict(logits) / scale, labels / scale)

    def label_scale(self, labels: Tensor) -> float:
        """The labels' standard deviation over STS-B's, so that there it is the paper's; 1 where all are the same."""
        return float(labels.double().std(correction=0)) / _DEVIATION_OF_STS_B or 1.0

    def entropy(self, logits: Tensor) -> Tensor:
        return torch.full(logits.shape[:-1], math.nan, device=logits.device)

    def entropy_of_scores(self, scores: Tensor) -> Tensor:
        return torch.full(scores.shape[:-1], math.nan, dtype=scores.dtype)

    def outcomes(self, num_labels: int) -> None:
        return None

    def label_tensor(self, labels: Sequence[Any], num_labels: int) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)

    def misfit(self, labels: Tensor, num_labels: int) -> str | None:
        if labels.dim() == 1 and bool(labels.isfinite().all()):
            return None
        return (
            "a regression learns from one finite number a row, and some labels are none: leave those rows out"
        )


SINGLE_LABEL: Problem = _SingleLabel()
MULTI_LABEL: Problem = _MultiLabel()
REGRESSION: Problem = _Regression()


def problem_of(problem_type: str | None) -> Problem:
    """The problem of this name; None is single-label classification.

    Raises:
        ValueError: there is none.
    """
    for problem in (SINGLE_LABEL, MULTI_LABEL, REGRESSION):
        if problem_type in (None, problem.name):
            return problem
    raise ValueError(f"problem_type is {problem_type!r}: choose one of {', '.join(PROBLEM_TYPES)}")
