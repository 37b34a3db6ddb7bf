"""DeeBERT as a Hugging Face model: the training form.

A backbone of the BERT or RoBERTa family, an off-ramp after chosen layers, and a final classifier of the
same shape after the last one. Padded, differentiable, and saved or loaded like any `PreTrainedModel`.
Nothing leaves early here: inference runs on the packed form, `deebert.encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaModel,
)
from transformers.utils.generic import ModelOutput

from deebert.config import DeeBertConfig, OffRampPooling
from deebert.errors import BackboneError

BACKBONES: Mapping[str, type[BertModel] | type[RobertaModel]] = {"bert": BertModel, "roberta": RobertaModel}
"""Backbone families by `model_type`; both have ``embeddings`` and ``encoder.layer`` of the same shape."""


class OffRamp(nn.Module):
    """Pooler (dense + tanh) and classifier on a layer's pooled state; the final classifier is one too."""

    def __init__(self, config: DeeBertConfig) -> None:
        super().__init__()
        backbone = config.backbone_config
        dropout = getattr(backbone, "classifier_dropout", None)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(backbone.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, H) pooled states -> (N, C) logits."""
        logits: Tensor = self.classifier(self.dropout(torch.tanh(self.dense(pooled))))
        return logits


def pool(hidden: Tensor, attention_mask: Tensor, pooling: OffRampPooling) -> Tensor:
    """What an off-ramp reads: (N, L, H) token states, (N, L) mask of real tokens -> (N, H)."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


@dataclass
class DeeBertOutput(ModelOutput):
    """What the training form returns."""

    loss: Tensor | None = None
    """Mean cross-entropy of the final classifier: the paper's stage 1."""
    logits: Tensor | None = None
    """(N, C), of the final classifier."""
    off_ramp_logits: Tensor | None = None
    """(R, N, C), one row per off-ramp layer, shallowest first."""
    hidden_states: tuple[Tensor, ...] | None = None
    """On request: embeddings and each layer's output, n + 1 tensors (N, L, H)."""


class DeeBertForSequenceClassification(PreTrainedModel):
    """A BERT or RoBERTa encoder with off-ramps (Xin et al., ACL 2020), in its training form."""

    config_class = DeeBertConfig
    config: DeeBertConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: DeeBertConfig) -> None:
        super().__init__(config)
        family = backbone_class(config.backbone_config)
        self.backbone: Any = family(config.backbone_config, add_pooling_layer=False)  # type: ignore[arg-type]
        self.off_ramps = nn.ModuleList(OffRamp(config) for _ in config.off_ramp_layers)
        self.final_classifier = OffRamp(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_backbone(
        cls, name_or_path: str, *, labels: list[str], off_ramp_pooling: OffRampPooling = "mean", **config: Any
    ) -> DeeBertForSequenceClassification:
        """A new model on a pretrained backbone; every pooler starts as the pretrained one (as in the paper).

        Args:
            name_or_path: folder or hub id of a BERT or RoBERTa encoder.
            labels: label names, in the order of their ids.
            off_ramp_pooling: ``cls`` or ``mean``.
            config: further arguments of `DeeBertConfig`.

        Raises:
            BackboneError: another family of models, or a decoder.
        """
        backbone_config = AutoConfig.from_pretrained(name_or_path)
        family = backbone_class(backbone_config)
        # float32 whatever the checkpoint's storage: optimizers need it, and float16 weights convert exactly.
        pretrained: Any = family.from_pretrained(name_or_path, add_pooling_layer=True, dtype=torch.float32)
        model = cls(
            DeeBertConfig(
                backbone_config=backbone_config,
                off_ramp_pooling=off_ramp_pooling,
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                **config,
            )
        )
        pooler = pretrained.pooler
        pretrained.pooler = None
        model.backbone.load_state_dict(pretrained.state_dict())
        for ramp in (*model.off_ramps, model.final_classifier):
            ramp.dense.load_state_dict(pooler.dense.state_dict())
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> DeeBertOutput:
        """Run every layer and every off-ramp.

        Args:
            input_ids: (N, L) int64, padded.
            attention_mask: (N, L), 1 for real tokens; all real when None.
            token_type_ids: (N, L) int64 or None.
            labels: (N,) int64 or None.
            output_hidden_states: whether the output holds them.
            kwargs: whatever collators add; ignored, as the backbones do.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.hidden_states(input_ids, mask, token_type_ids)
        pooling = self.config.off_ramp_pooling
        logits = self.final_classifier(pool(states[-1], mask, pooling))
        off_ramp_logits = [
            ramp(pool(states[layer], mask, pooling))
            for layer, ramp in zip(self.config.off_ramp_layers, self.off_ramps, strict=True)
        ]
        return DeeBertOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels),
            logits=logits,
            off_ramp_logits=torch.stack(off_ramp_logits) if off_ramp_logits else None,
            hidden_states=states if output_hidden_states else None,
        )

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Embeddings and each layer's output: n + 1 tensors (N, L, H)."""
        output = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            output_hidden_states=True,
        )
        states: tuple[Tensor, ...] = output.hidden_states
        return states


def backbone_class(config: PreTrainedConfig) -> type[BertModel] | type[RobertaModel]:
    """The encoder class of a backbone configuration.

    Raises:
        BackboneError: no off-ramps are implemented for it.
    """
    family = BACKBONES.get(config.model_type)
    if family is None or getattr(config, "is_decoder", False):
        kind = f"{config.model_type} decoder" if family else config.model_type
        raise BackboneError(f"a {kind!r} backbone cannot have off-ramps: use one of {', '.join(BACKBONES)}")
    return family


# What makes `AutoModelForSequenceClassification.from_pretrained` know our folders: idempotent, and the one
# thing that importing this module does.
AutoConfig.register("deebert", DeeBertConfig, exist_ok=True)
AutoModelForSequenceClassification.register(DeeBertConfig, DeeBertForSequenceClassification, exist_ok=True)
