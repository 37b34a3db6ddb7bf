"""The configuration of a DeeBERT model: a backbone, its off-ramps, the labels and an operating point.

A Hugging Face configuration like any other (``model_type`` "deebert"). Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig

from deebert.backbones import family_of, no_family
from deebert.problem import Problem, problem_of

OffRampPooling = Literal["cls", "mean", "both", "attention"]
POOLINGS: tuple[OffRampPooling, ...] = get_args(OffRampPooling)
ACTIVATIONS = ("tanh", "relu", "gelu")


class DeeBertConfig(PreTrainedConfig):
    """Configuration of `DeeBertForSequenceClassification`.

    Args:
        backbone_config: configuration of an encoder of one of `deebert.backbones.FAMILIES`, or its dictionary.
        off_ramp_layers: 1-based layers that carry an off-ramp, 0 for the embeddings; all but the last and the
            embeddings by default.
        off_ramp_pooling: what off-ramps and the final classifier read: the layer's [CLS] state (``cls``, the
            paper's), the mean of its token states (``mean``), the two side by side (``both``), or a mean weighted
            by how well each token matches a query that the off-ramp learns (``attention``).
        off_ramp_activation: what follows the pooler's product: ``tanh`` (the paper's), or what the head of an
            already fine-tuned classifier has (``relu``, ``gelu``).
        exit_policy: JSON form of the operating point, e.g. ``{"type": "entropy", "thresholds": 0.2}``; None
            runs at full depth.
        max_seq_length: tokens that training truncated to, None where unknown.
        shares_off_ramp_pooler: whether all off-ramps have one pooler; each keeps a classifier of its own, and
            the final classifier keeps both.
        learns_to_exit: whether a head, shared by all off-ramps, tells how certain each of their answers is
            (learning to exit: Xin et al., BERxiT, EACL 2021).
        int8_agreement: share of labels at full depth that int8 leaves as float32 has them, where `deebert evaluate`
            has measured it.
        kwargs: those of every configuration; `problem_type` is Hugging Face's, single-label classification
            when None.
    """

    model_type = "deebert"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (the base class's own form)

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        off_ramp_layers: Sequence[int] | None = None,
        off_ramp_pooling: OffRampPooling = "mean",
        exit_policy: dict[str, Any] | None = None,
        max_seq_length: int | None = None,
        off_ramp_activation: str = "tanh",
        shares_off_ramp_pooler: bool = False,
        learns_to_exit: bool = False,
        int8_agreement: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _as_config(backbone_config)
        layers = self.backbone_config.num_hidden_layers
        self.off_ramp_layers = list(range(1, layers) if off_ramp_layers is None else off_ramp_layers)
        self.off_ramp_pooling = off_ramp_pooling
        self.off_ramp_activation = off_ramp_activation
        self.exit_policy = exit_policy
        self.max_seq_length = max_seq_length
        self.shares_off_ramp_pooler = shares_off_ramp_pooler
        self.learns_to_exit = learns_to_exit
        self.int8_agreement = int8_agreement
        if off_ramp_pooling not in POOLINGS:
            raise ValueError(f"off_ramp_pooling is {off_ramp_pooling!r}: choose one of {', '.join(POOLINGS)}")
        if off_ramp_activation not in ACTIVATIONS:
            raise ValueError(
                f"off_ramp_activation is {off_ramp_activation!r}: choose one of {', '.join(ACTIVATIONS)}"
            )
        if sorted(set(self.off_ramp_layers)) != self.off_ramp_layers or not all(
            0 <= i < layers for i in self.off_ramp_layers
        ):
            raise ValueError(
                f"off_ramp_layers is {self.off_ramp_layers}: give increasing layers between 0, the embeddings, and "
                f"{layers - 1}"
            )
        if kwargs.get("id2label") is not None:
            kwargs["id2label"] = names_by_id(kwargs["id2label"])
        super().__init__(**kwargs)
        if self.problem_type == "regression" and self.num_labels != 1:
            raise ValueError(f"a regression has one output, not {self.num_labels}: give it one label")

    @property
    def problem(self) -> Problem:
        """What the model is asked."""
        return problem_of(self.problem_type)

    @property
    def vocab_size(self) -> int:
        """Embeddings of the backbone."""
        return int(self.backbone_config.vocab_size)

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        # `resize_token_embeddings` notes the new size here, and the backbone is built from its own configuration.
        self.backbone_config.vocab_size = value

    @property
    def num_hidden_layers(self) -> int:
        """Transformer layers of the backbone."""
        return int(self.backbone_config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's token states."""
        return int(self.backbone_config.hidden_size)

    @property
    def pooled_size(self) -> int:
        """Width of what off-ramps read."""
        return self.hidden_size * (2 if self.off_ramp_pooling == "both" else 1)

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward blocks."""
        return int(getattr(self.backbone_config, family_of(self.backbone_config).intermediate_size))

    @property
    def has_token_types(self) -> bool:
        """Whether the backbone tells the segments of a pair apart."""
        return int(getattr(self.backbone_config, "type_vocab_size", 1)) > 1

    @property
    def initializer_range(self) -> float:
        """Standard deviation of fresh weights: the backbone's."""
        return float(getattr(self.backbone_config, "initializer_range", 0.02))


def names_by_id(id2label: Any) -> dict[int, str]:
    """Label names by their ids, which a JSON file has as texts, in the order of the ids.

    Raises:
        ValueError: it is something else, or the ids are not 0, 1, 2, …
    """
    try:
        names = {int(i): str(name) for i, name in dict(id2label).items()}
    except (TypeError, ValueError):
        names = {}
    if not names or sorted(names) != list(range(len(names))):
        raise ValueError(f"id2label is {id2label!s:.80}: give the name of each label by its id, from 0 on")
    return dict(sorted(names.items()))


def _as_config(value: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {"model_type": "bert"})
    kind = fields.pop("model_type", "bert")
    try:
        return AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise no_family(kind) from error


# What makes transformers' Auto classes know our folders' configuration: idempotent, and the one thing that importing
# this module does.
AutoConfig.register("deebert", DeeBertConfig, exist_ok=True)
