"""The families of encoders that can carry off-ramps, and where each keeps its parts.

One description per family; the training form, the packed form and the reference read an encoder through it.
Knows nothing of off-ramps, packed tokens or files. Names transformers' classes and does not import them: who only
runs a model does without that library's modelling code, which takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deebert.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a fine-tuned classifier of the family keeps its head, which has the shape of an off-ramp."""

    dense: str
    out: str
    activation: str = "tanh"
    """Between the two, by its name in `transformers.activations`."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Dotted module names and configuration fields of one family of post-norm encoders; the defaults are BERT's.

    Every family has ``embeddings`` with ``word_embeddings``, ``position_embeddings`` and ``LayerNorm``.
    """

    prefix: str
    """Of the names of transformers' classes."""
    head: Head
    has_pooler: bool = True
    """Whether the encoder can bring a pretrained pooler, as ``pooler.dense``."""

    layers: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    intermediate: str = "intermediate.dense"
    output: str = "output.dense"
    output_norm: str = "output.LayerNorm"

    has_token_types: bool = True
    """Whether ``embeddings.token_type_embeddings`` is there."""
    projection: str = "embeddings_project"
    """From the embeddings' width to the layers', in models where the two differ."""
    positions_follow_padding: bool = False
    """RoBERTa's convention: positions count from the padding id + 1, and padding stays at it."""

    intermediate_size: str = "intermediate_size"
    activation: str = "hidden_act"
    layer_norm_eps: str | None = "layer_norm_eps"
    """None: always 1e-12."""
    dropout: str = "hidden_dropout_prob"
    classifier_dropout: str = "classifier_dropout"

    @property
    def model(self) -> type[PreTrainedModel]:
        """The bare encoder."""
        return self._of_transformers("Model")

    @property
    def classifier(self) -> type[PreTrainedModel]:
        """The encoder under Hugging Face's own sequence classification head."""
        return self._of_transformers("ForSequenceClassification")

    def _of_transformers(self, kind: str) -> type[PreTrainedModel]:
        import transformers

        found: type[PreTrainedModel] = getattr(transformers, f"{self.prefix}{kind}")
        return found

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A fresh encoder without a pooler."""
        options: dict[str, Any] = {"add_pooling_layer": False} if self.has_pooler else {}
        return self.model(config, **options)

    def layers_of(self, backbone: nn.Module) -> nn.ModuleList:
        """The transformer layers, shallowest first."""
        layers = backbone.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def projection_of(self, backbone: nn.Module) -> nn.Linear | None:
        """What lies between the embeddings and the first layer, if anything."""
        return getattr(backbone, self.projection, None)

    def embed(self, backbone: Any, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """What the first layer reads: (N, L) ids -> (N, L, H), through the encoder's own modules."""
        types = {"token_type_ids": token_type_ids} if self.has_token_types else {}
        states: Tensor = backbone.embeddings(input_ids=input_ids, **types)
        projection = self.projection_of(backbone)
        return states if projection is None else projection(states)


_BERT = Family(
    prefix="Bert",
    head=Head(dense="bert.pooler.dense", out="classifier"),
)
_ROBERTA = Family(
    prefix="Roberta",
    head=Head(dense="classifier.dense", out="classifier.out_proj"),
    positions_follow_padding=True,
)
_DISTILBERT = Family(
    prefix="DistilBert",
    head=Head(dense="pre_classifier", out="classifier", activation="relu"),
    has_pooler=False,
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    output="ffn.lin2",
    output_norm="output_layer_norm",
    has_token_types=False,
    intermediate_size="hidden_dim",
    activation="activation",
    layer_norm_eps=None,
    dropout="dropout",
    classifier_dropout="seq_classif_dropout",
)

FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, prefix="XLMRoberta"),
    "camembert": replace(_ROBERTA, prefix="Camembert"),
    "electra": replace(
        _BERT,
        prefix="Electra",
        head=Head(dense="classifier.dense", out="classifier.out_proj", activation="gelu"),
        has_pooler=False,
    ),
    "distilbert": _DISTILBERT,
}
"""The families by `model_type`."""


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a backbone configuration.

    Raises:
        BackboneError: no off-ramps are implemented for it, or it is a decoder.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or getattr(config, "is_decoder", False):
        raise no_family(f"{config.model_type} decoder" if family else config.model_type)
    return family


def no_family(kind: str) -> BackboneError:
    """What to raise for a kind of model that is not among `FAMILIES`."""
    return BackboneError(f"a {kind!r} backbone cannot have off-ramps: use one of {', '.join(FAMILIES)}")
