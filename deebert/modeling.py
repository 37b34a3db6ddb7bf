"""DeeBERT as a Hugging Face model: the training form.

A backbone of one of `deebert.backbones.FAMILIES`, an off-ramp after chosen layers (0: on the embeddings), and
a final classifier of the same shape after the last one. Padded, differentiable, and saved or loaded like any
`PreTrainedModel`. Nothing leaves early here: inference runs on the packed form, `deebert.encoder`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils.generic import ModelOutput

from deebert.backbones import FAMILIES, family_of, no_family
from deebert.config import DeeBertConfig, OffRampPooling
from deebert.errors import BackboneError, CheckpointError
from deebert.weights import announce_hub, load_pretrained

log = logging.getLogger(__name__)


class OffRamp(nn.Module):
    """Pooler (dense + activation) and classifier on a layer's pooled state; the final classifier is one too.

    Args:
        config: the model's.
        has_pooler: False where the pooler's product is the one that all off-ramps share, which `forward` is given.
    """

    def __init__(self, config: DeeBertConfig, *, has_pooler: bool = True) -> None:
        super().__init__()
        backbone, family = config.backbone_config, family_of(config.backbone_config)
        dropout = getattr(backbone, family.classifier_dropout, None)
        self.dense = nn.Linear(config.pooled_size, config.hidden_size) if has_pooler else None
        self.activation = ACT2FN[config.off_ramp_activation]
        self.dropout = nn.Dropout(getattr(backbone, family.dropout) if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        # Zeros weigh all tokens alike: attention starts as the mean.
        attends = config.off_ramp_pooling == "attention"
        self.query = nn.Parameter(torch.zeros(config.hidden_size)) if attends else None

    def forward(self, pooled: Tensor, shared_dense: nn.Linear | None = None) -> Tensor:
        """(N, W) pooled states -> (N, C) logits; W is `DeeBertConfig.pooled_size`."""
        dense = shared_dense if self.dense is None else self.dense
        assert dense is not None
        logits: Tensor = self.classifier(self.dropout(self.activation(dense(pooled))))
        return logits


class ExitHead(nn.Module):
    """Tells, from what an off-ramp reads, how certain its answer is; one for all off-ramps (BERxiT, section 4).

    There it trains with the rest of the model. Here it reads states without moving them: no answer, early or at
    full depth, pays for it.
    """

    def __init__(self, config: DeeBertConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.pooled_size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """(..., W) pooled states -> (...) certainties between 0 and 1, float32."""
        logits: Tensor = self.linear(pooled.detach())
        return logits.float().sigmoid().squeeze(-1)


def pool(
    hidden: Tensor, attention_mask: Tensor, pooling: OffRampPooling, query: Tensor | None = None
) -> Tensor:
    """What an off-ramp reads.

    Args:
        hidden: (N, L, H) token states.
        attention_mask: (N, L), 1 for real tokens.
        pooling: see `DeeBertConfig`.
        query: (H,), the off-ramp's own, for ``attention``.

    Returns:
        (N, H), or (N, 2H) of ``both``: the [CLS] state first.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "attention":
        assert query is not None
        scores = (hidden @ query).float().masked_fill(attention_mask == 0, float("-inf"))
        return (scores.softmax(-1).to(hidden.dtype).unsqueeze(1) @ hidden).squeeze(1)
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return mean if pooling == "mean" else torch.cat([hidden[:, 0], mean], dim=-1)


@dataclass
class DeeBertOutput(ModelOutput):
    """What the training form returns."""

    loss: Tensor | None = None
    """Mean loss of the final classifier, the paper's stage 1: cross-entropy, or what the problem has instead."""
    logits: Tensor | None = None
    """(N, C), of the final classifier."""
    off_ramp_logits: Tensor | None = None
    """(R, N, C), one row per off-ramp layer, shallowest first."""
    certainties: Tensor | None = None
    """(R + 1, N), of the learning-to-exit head where there is one; the final classifier's row is the last."""
    hidden_states: tuple[Tensor, ...] | None = None
    """On request: embeddings and each layer's output, n + 1 tensors (N, L, H)."""


class DeeBertForSequenceClassification(PreTrainedModel):
    """A transformer encoder with off-ramps (Xin et al., ACL 2020), in its training form."""

    config_class = DeeBertConfig
    config: DeeBertConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: DeeBertConfig) -> None:
        super().__init__(config)
        self.backbone: Any = family_of(config.backbone_config).build(config.backbone_config)
        shares = config.shares_off_ramp_pooler and bool(config.off_ramp_layers)
        self.off_ramps = nn.ModuleList(OffRamp(config, has_pooler=not shares) for _ in config.off_ramp_layers)
        self.off_ramp_pooler = nn.Linear(config.pooled_size, config.hidden_size) if shares else None
        self.final_classifier = OffRamp(config)
        self.exit_head = ExitHead(config) if config.learns_to_exit else None
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        *,
        labels: list[str],
        off_ramp_pooling: OffRampPooling = "mean",
        allow_pickle: bool = False,
        **config: Any,
    ) -> DeeBertForSequenceClassification:
        """A new model on a pretrained backbone; every pooler starts as the pretrained one (as in the paper).

        Where there is no pretrained pooler, the poolers start from random weights, and the log says so.

        Args:
            name_or_path: folder or hub id of an encoder of one of `deebert.backbones.FAMILIES`.
            labels: label names, in the order of their ids.
            off_ramp_pooling: see `DeeBertConfig`. ``both`` starts as ``cls``, with weight 0 on the mean;
                ``attention`` starts as ``mean``.
            allow_pickle: whether weights may be read from `pytorch_model.bin` (tensors only).
            config: further arguments of `DeeBertConfig`.

        Raises:
            BackboneError: another family of models, or a decoder.
            CheckpointError: the backbone's weights are incomplete, or pickled.
        """
        backbone_config = _backbone_config(name_or_path)
        family = family_of(backbone_config)
        pretrained, missing = load_pretrained(family.model, name_or_path, allow_pickle=allow_pickle)
        pooler = None if any(name.startswith("pooler.") for name in missing) else _pooler(pretrained)
        _refuse_incomplete(name_or_path, [name for name in missing if not name.startswith("pooler.")])
        model = cls(
            DeeBertConfig(
                backbone_config=backbone_config,
                off_ramp_pooling=off_ramp_pooling,
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                **config,
            )
        )
        model._take_backbone(pretrained)
        if pooler is None:
            log.warning("%s has no pretrained pooler: the off-ramps' start from random weights", name_or_path)
        else:
            model._start_poolers_from(pooler)
        return model

    @classmethod
    def from_classifier(
        cls, name_or_path: str, *, allow_pickle: bool = False, **config: Any
    ) -> DeeBertForSequenceClassification:
        """An already fine-tuned Hugging Face sequence classifier, with off-ramps that are yet to be trained.

        Its backbone and head stay bit for bit, so that the final logits are its own: stage 2 alone
        (`deebert.training`, a recipe without stage 1) makes a DeeBERT model of it. All such heads read [CLS], and so do
        the off-ramps, whose poolers start as the head's. Labels and problem type are those of its configuration; as in
        Hugging Face, one output without a problem type is a regression.

        Args:
            name_or_path: folder or hub id of a sequence classifier of one of `deebert.backbones.FAMILIES`.
            allow_pickle: whether weights may be read from `pytorch_model.bin` (tensors only).
            config: further arguments of `DeeBertConfig`: `off_ramp_layers`, `max_seq_length`, `learns_to_exit`.

        Raises:
            BackboneError: another family of models, a decoder, a regression of several outputs, or one that does
                not learn to exit.
            CheckpointError: its weights are incomplete (a bare encoder, or another task's head), or pickled.
        """
        theirs = _backbone_config(name_or_path)
        family = family_of(theirs)
        problem_type = _problem_type(name_or_path, theirs, learns_to_exit=bool(config.get("learns_to_exit")))
        pretrained, missing = load_pretrained(family.classifier, name_or_path, allow_pickle=allow_pickle)
        _refuse_incomplete(name_or_path, missing)
        model = cls(
            DeeBertConfig(
                backbone_config=theirs,
                off_ramp_pooling="cls",
                off_ramp_activation=family.head.activation,
                problem_type=problem_type,
                id2label=theirs.id2label,
                label2id=theirs.label2id,
                **config,
            )
        )
        dense = pretrained.get_submodule(family.head.dense)
        final = model.final_classifier
        final.classifier.load_state_dict(pretrained.get_submodule(family.head.out).state_dict())
        model._start_poolers_from(dense)
        model._take_backbone(pretrained.base_model)
        return model

    @classmethod
    def of_weights(
        cls, config: DeeBertConfig, weights: Mapping[str, Tensor]
    ) -> DeeBertForSequenceClassification:
        """A model of this configuration with copies of `weights`, in eval mode.

        Args:
            config: the model's.
            weights: all that `deebert.inventory.weight_shapes` names.
        """
        copies = {name: weight.clone() for name, weight in weights.items()}
        model: Any = cls.from_pretrained(None, config=config, state_dict=copies, dtype=torch.float32)
        assert isinstance(model, cls)
        model.config = config  # not the copy that was made of it: what is noted there is noted once
        model.train(False)
        return model

    def learn_to_exit(self) -> None:
        """Give the model a learning-to-exit head that is yet to be trained, unless it has one."""
        if self.exit_head is None:
            self.exit_head = ExitHead(self.config).to(self.device)
            self._init_weights(self.exit_head.linear)  # type: ignore[no-untyped-call]
            self.config.learns_to_exit = True

    def _take_backbone(self, pretrained: Any) -> None:
        """Copy a pretrained encoder's weights, its pooler aside."""
        weights = pretrained.state_dict()
        self.backbone.load_state_dict({k: v for k, v in weights.items() if not k.startswith("pooler.")})

    @property
    def exit_modules(self) -> tuple[nn.Module, ...]:
        """All that serves early exits alone: off-ramps, their shared pooler, the learning-to-exit head."""
        modules: tuple[nn.Module | None, ...] = (self.off_ramps, self.off_ramp_pooler, self.exit_head)
        return tuple(module for module in modules if module is not None)

    @torch.no_grad()
    def _start_poolers_from(self, dense: Any) -> None:
        """Every pooler takes over the pretrained one's weights; what it reads beside that has weight 0."""
        ramps: list[Any] = [*self.off_ramps, self.final_classifier]
        for pooler in (*(ramp.dense for ramp in ramps), self.off_ramp_pooler):
            if pooler is not None:
                pooler.weight.zero_()
                pooler.weight[:, : dense.in_features].copy_(dense.weight)
                pooler.bias.copy_(dense.bias)

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
            labels: (N,) int64, (N, C) 0 or 1 for multi-label data, (N,) numbers for a regression, or None.
            output_hidden_states: whether the output holds them.
            kwargs: whatever collators add; ignored, as the backbones do.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.hidden_states(input_ids, mask, token_type_ids)
        pooling = self.config.off_ramp_pooling
        ramps: list[Any] = list(self.off_ramps)
        read = [
            pool(states[layer], mask, pooling, ramp.query)
            for layer, ramp in zip(self.config.off_ramp_layers, ramps, strict=True)
        ]
        last = pool(states[-1], mask, pooling, self.final_classifier.query)
        logits = self.final_classifier(last)
        off_ramp_logits = [
            ramp(pooled, self.off_ramp_pooler) for ramp, pooled in zip(ramps, read, strict=True)
        ]
        head = self.exit_head
        return DeeBertOutput(
            loss=None if labels is None else self.config.problem.losses(logits, labels).mean(),
            logits=logits,
            off_ramp_logits=torch.stack(off_ramp_logits) if off_ramp_logits else None,
            certainties=None if head is None else head(torch.stack([*read, last])),
            hidden_states=states if output_hidden_states else None,
        )

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Embeddings and each layer's output: n + 1 tensors (N, L, H)."""
        types = {"token_type_ids": token_type_ids} if self.config.has_token_types else {}
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **types
        )
        states: tuple[Tensor, ...] = output.hidden_states
        return states


def _backbone_config(name_or_path: str) -> PreTrainedConfig:
    announce_hub(name_or_path)
    kind = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    # Asked before the Auto class is, which for a kind that it does not know recommends to run the model's code.
    if kind is not None and kind not in FAMILIES:
        raise no_family(kind)
    config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    return config


def _pooler(pretrained: Any) -> nn.Module | None:
    pooler = getattr(pretrained, "pooler", None)
    return None if pooler is None else pooler.dense


def _refuse_incomplete(name: str, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{name!r} lacks {len(missing)} of the weights that it should have, first {missing[0]!r}: give a "
            "complete model of that kind"
        )


def _problem_type(name: str, config: PreTrainedConfig, *, learns_to_exit: bool) -> str:
    """What a Hugging Face classifier is asked; refuses what off-ramps could not answer early."""
    outputs = int(config.num_labels or 0)
    problem: str = config.problem_type or ("regression" if outputs == 1 else "single_label_classification")
    if problem == "regression" and outputs != 1:
        raise BackboneError(f"{name!r} is a regression of {outputs} outputs: give one of a single output")
    if problem == "regression" and not learns_to_exit:
        raise BackboneError(
            f"{name!r} is a regression, whose answers have no entropy to exit by: let it learn to exit "
            "(learns_to_exit, --learn-to-exit)"
        )
    return problem


# What makes `AutoModelForSequenceClassification.from_pretrained` know our folders: idempotent, and the one
# thing that importing this module does.
AutoModelForSequenceClassification.register(DeeBertConfig, DeeBertForSequenceClassification, exist_ok=True)
