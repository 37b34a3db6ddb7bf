"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from deebert.evaluation import LabelledSequences
from deebert.modeling import DeeBertForSequenceClassification
from deebert.training import Recipe, TrainingReport, train
from tests.training_toy import Run, toy


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Run:
    """Trains a model on a toy problem; keyword arguments reach `train`."""

    def run_(
        model: DeeBertForSequenceClassification,
        recipe: Recipe,
        data: LabelledSequences | None = None,
        work_dir: Path | None = None,
        **options: Any,
    ) -> TrainingReport:
        rows = toy(48, seed=0) if data is None else data
        return train(model, tokenizer, rows, recipe, work_dir or tmp_path, show_progress=False, **options)

    return run_
