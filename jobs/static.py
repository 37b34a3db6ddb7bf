"""Static baselines, trained: the backbone cut to fewer layers and fine-tuned like stage 1.

Same data, same budget, no off-ramps. Knows nothing of traces or tables.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, set_seed

from deebert.baselines import cut, kept_layers
from deebert.checkpoint import Checkpoint
from deebert.evaluation import LabelledSequences
from deebert.fused import FusedModel
from deebert.fusing import fuse
from deebert.modeling import DeeBertForSequenceClassification
from deebert.training import Recipe, check_labels, train
from deebert.weights import reason
from jobs.traces import StaticRecord
from pipeline.errors import UsageError

_SAME_KIND = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticBaseline:
    """A trained static baseline."""

    record: StaticRecord
    model: DeeBertForSequenceClassification

    @property
    def fused(self) -> FusedModel:
        """The weights of its inference form."""
        return fuse(self.model.config, self.model.state_dict())


def train_static(
    record: StaticRecord, *, like: Checkpoint, data: LabelledSequences, recipe: Recipe
) -> StaticBaseline:
    """Cut and fine-tune.

    Args:
        record: depth, style, and the backbone that `like` was trained from.
        like: gives labels, pooling and length.
        data: training samples.
        recipe: its stage 1 is the budget; without off-ramps there is no other.

    Raises:
        UsageError: the backbone cannot be loaded, or is not that of `like`.
        BackboneError: it does not have so many layers.
        DataError: labels that the model does not have.
    """
    backbone = str(record.recipe["backbone"])
    config = like.config
    check_labels(data, len(like.labels), config.problem)
    set_seed(recipe.seed)
    try:
        whole = DeeBertForSequenceClassification.from_backbone(
            backbone,
            labels=list(like.labels),
            off_ramp_pooling=config.off_ramp_pooling,
            max_seq_length=config.max_seq_length,
            problem_type=config.problem.name,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the backbone {backbone!r}: {reason(error)}") from error
    _check_same_kind(backbone, whole.config.backbone_config, like)
    model = cut(whole, kept_layers(whole.config.num_hidden_layers, record.depth, record.style))
    # The Trainer prints its summary on stdout, which belongs to the tables.
    with tempfile.TemporaryDirectory() as work, redirect_stdout(sys.stderr):
        train(model, like.tokenizer, data, recipe, Path(work))
    return StaticBaseline(record=record, model=model)


def _check_same_kind(backbone: str, theirs: PreTrainedConfig, like: Checkpoint) -> None:
    """Another backbone would read token ids that mean nothing to it, and be charged with the model's cost."""
    ours = like.config.backbone_config
    for field in _SAME_KIND:
        its, the_models = getattr(theirs, field), getattr(ours, field)
        if its != the_models:
            raise UsageError(
                f"the backbone {backbone!r} is not the one of {like.path!r}: its {field} is {its!r}, the model's is "
                f"{the_models!r}; give the --backbone that the model was trained from"
            )
