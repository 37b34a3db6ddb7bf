"""When a sample may leave: entropy, certainty, and the policies that decide on them.

The rule of the paper (Xin et al., 2020, section 2.2 and Eq. for entropy): a sample leaves at the first
off-ramp whose output entropy is strictly below the threshold S. Learning to exit (Xin et al., BERxiT, EACL 2021,
section 4) asks a head that was trained to tell how right the off-ramp is. Layers are counted from 1; an off-ramp
on the embeddings is layer 0. The last layer is not a policy's business: it always answers. Knows nothing of
models, batches or engines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deebert import native
from deebert.errors import PolicyError
from deebert.transfer import to_host

if TYPE_CHECKING:
    from deebert.problem import Problem

Thresholds = float | tuple[float | None, ...] | None
"""One for all layers, or one per layer before the last; None never fires."""


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, ``-Σ p ln p``; (N, C) any float -> (N,) float32.

    Through float32 `log_softmax`: the original's ``-Σ p·log(p)`` is NaN once a probability underflows, so
    that its surest samples never left.
    """
    logits = logits.float()
    if native.measures(logits):
        return native.entropy(logits)
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class OffRampAnswer:
    """What an off-ramp says of N samples, and what it shows of how sure it is."""

    logits: Tensor
    """(N, C) float32."""
    entropy: Tensor
    """(N,) float32, nats; NaN where the problem has none."""
    certainty: Tensor | None = None
    """(N,) float32 between 0 and 1, of the learning-to-exit head; None where it was not asked."""

    def __len__(self) -> int:
        return len(self.logits)

    def to_host(self) -> OffRampAnswer:
        """The same on the host, valid once the device has come that far."""
        return OffRampAnswer(
            logits=to_host(self.logits),
            entropy=to_host(self.entropy),
            certainty=None if self.certainty is None else to_host(self.certainty),
        )


class ExitPolicy(Protocol):
    """Decides, at an off-ramp, which samples leave."""

    @property
    def reads_certainty(self) -> bool:
        """Whether `fires` needs the learning-to-exit head's word."""
        ...

    def can_fire(self, layer: int) -> bool:
        """Whether any sample could leave after `layer` (1-based, 0: the embeddings); else its off-ramp is not
        computed."""
        ...

    def fires(self, layer: int, answer: OffRampAnswer) -> Tensor:
        """Which samples leave after `layer`.

        Args:
            layer: 1-based, 0 for the embeddings.
            answer: of this layer's off-ramp, N samples.

        Returns:
            (N,) bool.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `policy_from_dict`."""
        ...


@dataclass(frozen=True)
class _ByThreshold(ABC):
    """A policy that holds one number an off-ramp's answer shows against a threshold: one for all layers, or one
    per layer."""

    thresholds: Thresholds
    """Entry 0 of a tuple is layer 1's."""
    layer_0: float | None = None
    """Of an off-ramp on the embeddings. None: what `thresholds` says of all layers; a tuple says nothing of it."""

    name: ClassVar[str]
    """In the JSON form."""
    quantity: ClassVar[str]
    """What is held against the threshold."""
    rule: ClassVar[str]
    """In words, around the threshold."""

    def __post_init__(self) -> None:
        for value in self._values:
            if value is not None:
                self._refuse_impossible(value)
        # 1 and 1.0 are one threshold, and must be one text where a policy is stored or makes a digest.
        of_layers = self.thresholds
        floats = tuple(map(_float, of_layers)) if isinstance(of_layers, tuple) else _float(of_layers)
        object.__setattr__(self, "thresholds", floats)
        object.__setattr__(self, "layer_0", _float(self.layer_0))

    def __str__(self) -> str:
        """``entropy < 0.2 nats``; of several thresholds, layer 1's first; ``full depth`` where none can fire."""
        on_embeddings, *of_layers = (None if v is None or self._never_fires(v) else v for v in self._values)
        # Twelve digits: a threshold that is read here can be given again, and is the same.
        embeddings = "none" if on_embeddings is None else f"{on_embeddings:.12g}"
        if all(value is None for value in of_layers):
            return (
                "full depth" if on_embeddings is None else f"{self.rule.format(embeddings)} on the embeddings"
            )
        words = self.rule.format(", ".join("none" if v is None else f"{v:.12g}" for v in of_layers))
        return words if self.layer_0 is None else f"{words} ({embeddings} on the embeddings)"

    def at(self, layer: int) -> float | None:
        """The threshold after `layer` (1-based, 0: the embeddings), None where it cannot fire."""
        if layer == 0 and (self.layer_0 is not None or isinstance(self.thresholds, tuple)):
            value = self.layer_0
        else:
            value = self.thresholds[layer - 1] if isinstance(self.thresholds, tuple) else self.thresholds
        return None if value is None or self._never_fires(value) else value

    def can_fire(self, layer: int) -> bool:
        """See `ExitPolicy`."""
        if isinstance(self.thresholds, tuple) and layer > len(self.thresholds):
            return False
        return self.at(layer) is not None

    def fires(self, layer: int, answer: OffRampAnswer) -> Tensor:
        """See `ExitPolicy`."""
        threshold = self.at(layer)
        if threshold is None:
            return torch.zeros(len(answer), dtype=torch.bool, device=answer.logits.device)
        return self._passes(answer, threshold)

    def to_dict(self) -> dict[str, Any]:
        """See `ExitPolicy`."""
        values = list(self.thresholds) if isinstance(self.thresholds, tuple) else self.thresholds
        # Left out where it says nothing: operating points without it keep their form, and their digest.
        of_embeddings = {} if self.layer_0 is None else {"layer_0": self.layer_0}
        return {"type": self.name, "thresholds": values, **of_embeddings}

    @property
    def _values(self) -> tuple[float | None, ...]:
        values = self.thresholds if isinstance(self.thresholds, tuple) else (self.thresholds,)
        return (self.layer_0, *values)

    def _check_number(self, num_layers: int) -> None:
        if isinstance(self.thresholds, tuple) and len(self.thresholds) != num_layers - 1:
            raise PolicyError(
                f"{len(self.thresholds)} {self.quantity} thresholds for {num_layers} layers: give one, or one for "
                f"each of the {num_layers - 1} layers before the last"
            )

    @abstractmethod
    def _refuse_impossible(self, value: float) -> None: ...

    @abstractmethod
    def _never_fires(self, value: float) -> bool: ...

    @abstractmethod
    def _passes(self, answer: OffRampAnswer, threshold: float) -> Tensor: ...


@dataclass(frozen=True)
class EntropyThreshold(_ByThreshold):
    """Leave when the entropy is strictly below the threshold, in nats; None or a negative number never fires."""

    name = "entropy"
    quantity = "entropy"
    rule = "entropy < {} nats"

    @property
    def reads_certainty(self) -> bool:
        """See `ExitPolicy`."""
        return False

    def check(self, *, problem: Problem, num_labels: int, num_layers: int, learns_to_exit: bool) -> None:
        """Refuse what cannot be meant for this model.

        Raises:
            PolicyError: a threshold above the largest entropy there is, any threshold where there is no
                entropy, or a number of thresholds that is not the number of layers that can exit.
        """
        self._check_number(num_layers)
        outcomes = problem.outcomes(num_labels)
        for value in self._values:
            if value is None or value <= 0:
                continue
            if outcomes is None:
                raise PolicyError(
                    f"the entropy threshold {value:g} means nothing to a regression, whose answers have no entropy: "
                    "train with --learn-to-exit and give --certainty-threshold"
                )
            if value > math.log(outcomes):
                raise PolicyError(
                    f"the entropy threshold {value:g} is above ln({outcomes}) = {math.log(outcomes):.4g}, the largest "
                    f"entropy of {num_labels} labels: give at most that, or -1 to run at full depth"
                )

    def _refuse_impossible(self, value: float) -> None:
        if not math.isfinite(value):
            raise PolicyError(
                f"the entropy threshold {value} is not a number: give nats between 0 and ln(labels)"
            )

    def _never_fires(self, value: float) -> bool:
        # Entropy is never negative, so that 0 cannot fire under a strict `<` either.
        return value <= 0

    def _passes(self, answer: OffRampAnswer, threshold: float) -> Tensor:
        return answer.entropy < threshold


@dataclass(frozen=True)
class LearningToExit(_ByThreshold):
    """Leave when the learning-to-exit head's certainty, 0 to 1, is strictly above the threshold; None or 1 never
    fires."""

    name = "learning-to-exit"
    quantity = "certainty"
    rule = "certainty > {}"

    @property
    def reads_certainty(self) -> bool:
        """See `ExitPolicy`."""
        return True

    def check(self, *, problem: Problem, num_labels: int, num_layers: int, learns_to_exit: bool) -> None:
        """Refuse what cannot be meant for this model.

        Raises:
            PolicyError: it has no learning-to-exit head, or another number of layers that can exit.
        """
        self._check_number(num_layers)
        if not learns_to_exit:
            raise PolicyError(
                "a certainty threshold asks a learning-to-exit head, which this model has not: train it with "
                "--learn-to-exit, or give --entropy-threshold"
            )

    def _refuse_impossible(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise PolicyError(
                f"the certainty threshold {value} is no certainty: give a number between 0 and 1"
            )

    def _never_fires(self, value: float) -> bool:
        return value >= 1

    def _passes(self, answer: OffRampAnswer, threshold: float) -> Tensor:
        assert answer.certainty is not None  # asked for by `reads_certainty`
        return answer.certainty > threshold


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


FULL_DEPTH = EntropyThreshold(None)
"""No exits: every sample runs through all layers."""

_CALIBRATE = "store another one with `deebert calibrate`"

StoredPolicy = EntropyThreshold | LearningToExit
"""The policies that a model's configuration can hold."""


def policy_from_dict(values: Any) -> StoredPolicy:
    """The policy whose `to_dict` gave `values`, which come from a file that anybody may have written.

    Raises:
        PolicyError: no dictionary, an unknown type, or thresholds that are no numbers.
    """
    kinds: dict[str, type[StoredPolicy]] = {kind.name: kind for kind in (EntropyThreshold, LearningToExit)}
    if not isinstance(values, dict):
        raise PolicyError(f"the exit policy {values!r} has no type and thresholds: {_CALIBRATE}")
    name, thresholds, layer_0 = (values.get(key) for key in ("type", "thresholds", "layer_0"))
    if not isinstance(name, str) or name not in kinds:
        raise PolicyError(
            f"unknown exit policy {name!r}: this version knows {' and '.join(map(repr, kinds))}"
        )
    of_layers = thresholds if isinstance(thresholds, list | tuple) else [thresholds]
    for value in (*of_layers, layer_0):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PolicyError(f"the {name} exit policy has a threshold {value!r}, no number: {_CALIBRATE}")
    return kinds[name](tuple(thresholds) if isinstance(thresholds, list | tuple) else thresholds, layer_0)
