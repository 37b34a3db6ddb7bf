"""Static baselines, trained: the backbone cut to fewer layers and fine-tuned like stage 1.

Same data, same budget, no off-ramps. Knows nothing of traces or tables.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, set_seed

from deebert.baselines import cut, kept_layers
from deebert.checkpoint import Checkpoint
from deebert.evaluation import LabelledSequences
from deebert.modeling import DeeBertForSequenceClassification
from deebert.training import Recipe, check_labels, train
from jobs.traces import StaticRecord
from pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticBaseline:
    """A trained static baseline."""

    record: StaticRecord
    model: DeeBertForSequenceClassification


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
        UsageError: the backbone cannot be loaded.
        BackboneError: it does not have so many layers.
        DataError: labels that the model does not have.
    """
    backbone = str(record.recipe["backbone"])
    config = like.model.config
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
        tokenizer = AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load the backbone {backbone!r}: {reason}") from error
    model = cut(whole, kept_layers(whole.config.num_hidden_layers, record.depth, record.style))
    # The Trainer prints its summary on stdout, which belongs to the tables.
    with tempfile.TemporaryDirectory() as work, redirect_stdout(sys.stderr):
        train(model, tokenizer, data, recipe, Path(work))
    return StaticBaseline(record=record, model=model)
