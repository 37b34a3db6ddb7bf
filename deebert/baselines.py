"""What DeeBERT must beat: the same backbone with fewer layers, at full depth for every sample.

A static baseline keeps k of the backbone's n layers, the first k or evenly spread ones (as DistilBERT starts
from its teacher, Sanh et al., 2019), has no off-ramps, and is fine-tuned like stage 1. Knows nothing of
training or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from deebert.backbones import family_of
from deebert.config import DeeBertConfig
from deebert.errors import BackboneError

if TYPE_CHECKING:
    from deebert.modeling import DeeBertForSequenceClassification

StaticStyle = Literal["first", "every-other"]


def kept_layers(num_layers: int, depth: int, style: StaticStyle) -> tuple[int, ...]:
    """Which layers (1-based) a static baseline of `depth` layers keeps.

    ``first`` keeps 1..depth; ``every-other`` spreads them over the whole depth: 1, 3, 5, … for half of it.

    Raises:
        BackboneError: `depth` is not between 1 and the backbone's.
    """
    if not 1 <= depth <= num_layers:
        raise BackboneError(
            f"a static baseline of {depth} layers cannot be cut from {num_layers}: give 1 to {num_layers}"
        )
    if style == "first":
        return tuple(range(1, depth + 1))
    return tuple(1 + i * num_layers // depth for i in range(depth))


def cut(model: DeeBertForSequenceClassification, layers: Sequence[int]) -> DeeBertForSequenceClassification:
    """A model of `layers` (1-based) of `model` alone, without off-ramps; weights are copies.

    The final classifier is copied too: cut a model fresh from `from_backbone`, whose classifier is untrained.
    """
    # Imported here: it takes seconds, and most who count layers cut none.
    from deebert.modeling import DeeBertForSequenceClassification

    fields = model.config.backbone_config.to_dict()
    labels = dict(model.config.id2label or {})
    config = DeeBertConfig(
        backbone_config={**fields, "num_hidden_layers": len(layers)},
        off_ramp_layers=[],
        off_ramp_pooling=model.config.off_ramp_pooling,
        off_ramp_activation=model.config.off_ramp_activation,
        max_seq_length=model.config.max_seq_length,
        problem_type=model.config.problem_type,
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )
    static = DeeBertForSequenceClassification(config)
    static.final_classifier.load_state_dict(model.final_classifier.state_dict())
    family = family_of(config.backbone_config)
    theirs, prefix = family.layers_of(model.backbone), f"{family.layers}."
    outside = {k: v for k, v in model.backbone.state_dict().items() if not k.startswith(prefix)}
    unmatched = static.backbone.load_state_dict(outside, strict=False)
    assert all(name.startswith(prefix) for name in unmatched.missing_keys)
    for mine, layer in zip(family.layers_of(static.backbone), layers, strict=True):
        mine.load_state_dict(theirs[layer - 1].state_dict())
    static.train(model.training)
    return static
