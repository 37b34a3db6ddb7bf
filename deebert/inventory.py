"""The weights that a DeeBERT model consists of: their names and shapes, from its configuration alone.

What a checkpoint must hold, and what its digest is over. Knows nothing of files, tensors or transformers' modules.
"""

from __future__ import annotations

from collections.abc import Iterator

from deebert.backbones import Family, family_of
from deebert.config import DeeBertConfig

Shape = tuple[int, ...]


def weight_shapes(config: DeeBertConfig) -> dict[str, Shape]:
    """Every weight of the training form, `deebert.modeling`, by its name there.

    Raises:
        BackboneError: a family without off-ramps.
    """
    return dict((*_of_embeddings(config), *_of_layers(config), *_of_exits(config)))


def layer_name(family: Family, index: int) -> str:
    """What the names of a layer's weights begin with; `index` is 0-based."""
    return f"backbone.{family.layers}.{index}."


def embedding_size(config: DeeBertConfig) -> int:
    """Width of the embeddings, which in some families is not that of the layers."""
    return int(getattr(config.backbone_config, "embedding_size", config.hidden_size))


def _of_embeddings(config: DeeBertConfig) -> Iterator[tuple[str, Shape]]:
    backbone, family = config.backbone_config, family_of(config.backbone_config)
    inside, width = "backbone.embeddings.", embedding_size(config)
    yield f"{inside}word_embeddings.weight", (config.vocab_size, width)
    yield f"{inside}position_embeddings.weight", (int(backbone.max_position_embeddings), width)
    if family.has_token_types:
        yield f"{inside}token_type_embeddings.weight", (int(backbone.type_vocab_size), width)
    yield from _norm(f"{inside}LayerNorm", width)
    if width != config.hidden_size:
        yield from _linear(f"backbone.{family.projection}", width, config.hidden_size)


def _of_layers(config: DeeBertConfig) -> Iterator[tuple[str, Shape]]:
    names, hidden, inner = family_of(config.backbone_config), config.hidden_size, config.intermediate_size
    for index in range(config.num_hidden_layers):
        inside = layer_name(names, index)
        for square in (names.query, names.key, names.value, names.attention_output):
            yield from _linear(inside + square, hidden, hidden)
        yield from _norm(inside + names.attention_norm, hidden)
        yield from _linear(inside + names.intermediate, hidden, inner)
        yield from _linear(inside + names.output, inner, hidden)
        yield from _norm(inside + names.output_norm, hidden)


def _of_exits(config: DeeBertConfig) -> Iterator[tuple[str, Shape]]:
    pooled, hidden = config.pooled_size, config.hidden_size
    ramps = [f"off_ramps.{i}" for i in range(len(config.off_ramp_layers))]
    shares = config.shares_off_ramp_pooler and bool(ramps)
    for ramp in (*ramps, "final_classifier"):
        if ramp == "final_classifier" or not shares:
            yield from _linear(f"{ramp}.dense", pooled, hidden)
        yield from _linear(f"{ramp}.classifier", hidden, int(config.num_labels or 0))
        if config.off_ramp_pooling == "attention":
            yield f"{ramp}.query", (hidden,)
    if shares:
        yield from _linear("off_ramp_pooler", pooled, hidden)
    if config.learns_to_exit:
        yield from _linear("exit_head.linear", pooled, 1)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
