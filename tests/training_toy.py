"""A toy problem that a tiny model learns in seconds, and quick recipes for it."""

from __future__ import annotations

import torch
from torch import Tensor

from deebert.encoder import PackedEncoder
from deebert.evaluation import LabelledSequences, off_ramp_scores, trace
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.training import BackboneStage, OffRampStage

MARKED = (90, 91, 92)
"""Token ids, one for each label: a text belongs to the label whose token it holds."""
QUICK_1 = BackboneStage(epochs=4, batch_size=16, learning_rate=2e-3)
QUICK_2 = OffRampStage(epochs=6, batch_size=16, learning_rate=5e-3)


def toy(num_rows: int, seed: int) -> LabelledSequences:
    """Random texts of 4 to 12 tokens, half of them the marked token that gives the label away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    texts, labels = [], []
    for _ in range(num_rows):
        (label,), (length,) = draw(0, 3), draw(2, 11)
        words = draw(5, 80, length)
        words = [
            MARKED[label] if place == 0 or marked else w
            for place, (w, marked) in enumerate(zip(words, draw(0, 2, length), strict=True))
        ]
        texts.append([2, *words, 3])
        labels.append(label)
    return LabelledSequences(tokens=PackedTokens.pack(texts), labels=torch.tensor(labels))


def weights(model: DeeBertForSequenceClassification) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: DeeBertForSequenceClassification) -> set[str]:
    """Names of the weights that are not bit for bit what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def accuracies(model: DeeBertForSequenceClassification, data: LabelledSequences) -> tuple[float, ...]:
    return off_ramp_scores(trace(PackedEncoder.of(model), data.tokens), data.labels)
