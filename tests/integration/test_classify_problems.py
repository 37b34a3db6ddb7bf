"""`classify` with multi-label models, regressions and learned exits, on real Ray, to the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pytest

from deebert.checkpoint import load_checkpoint
from deebert.errors import PolicyError
from deebert.reference import classify_one
from pipeline import ClassifyConfig, classify, write_report
from pipeline.config import Replicas
from pipeline.errors import UsageError
from tests.conftest import make_model, make_tokenizer
from tests.integration.conftest import sentences, write_parquet

pytestmark = pytest.mark.usefixtures("ray_session")

TIE = 1e-5


def make_config(tmp_path: Path, problem: str, **flags: Any) -> ClassifyConfig:
    model = make_model(
        num_labels=1 if problem == "regression" else 3, problem_type=problem, learns_to_exit=True
    )
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    write_parquet(tmp_path / "in" / "a.parquet", sentences(120, seed=1))
    return ClassifyConfig(
        model=str(tmp_path / "model"),
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        precision="float32",
        shard_rows=50,
        micro_batch_tokens=256,
        replicas=Replicas(1, 1),
        threads=1,
        control=0.3,
        **flags,
    )


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_every_row_is_the_references_and_the_report_recounts_it(tmp_path: Path, problem: str) -> None:
    config = make_config(tmp_path, problem, certainty_threshold=0.7)

    record = classify(config).record

    checkpoint, ties = load_checkpoint(config.model), 0
    rows = pyarrow.dataset.dataset(config.output).to_table().sort_by("source_row").to_pylist()
    for text, row in zip(sentences(120, seed=1), rows, strict=True):
        expected = classify_one(
            checkpoint.model, checkpoint.tokenizer(text)["input_ids"], [0.7] * 4, by_certainty=True
        )
        if expected.margin < TIE or min(map(abs, expected.logits)) < TIE:
            ties += 1
            continue
        assert row["exit_layer"] == expected.exit_layer
        assert row["certainty"] == pytest.approx(expected.certainty, abs=1e-4)
        if problem == "regression":
            assert row["prediction"] == pytest.approx(expected.label, abs=1e-4)
            assert row["entropy"] is None
        else:
            assert tuple(row["prediction"]) == expected.label
            assert row["label"] == [checkpoint.labels[i] for i in row["prediction"]]
            assert row["entropy"] == pytest.approx(expected.entropy, abs=1e-4)
    assert ties <= 2
    assert len({row["exit_layer"] for row in rows}) >= 2
    assert record.identity.exit_policy == {"type": "learning-to-exit", "thresholds": 0.7}
    assert record.model.problem_type == problem

    report = write_report(config.output, price_per_hour=None)
    page = Path(report.path).read_text()
    assert "Every count agrees" in page
    assert ("Difference from full depth" in page) == (problem == "regression")

    with pytest.raises(UsageError, match="holds another run: its exit policy is"):
        classify(replace(config, certainty_threshold=0.8))


def test_what_cannot_be_meant_is_refused_before_an_actor_starts(tmp_path: Path) -> None:
    config = make_config(tmp_path, "regression")

    with pytest.raises(PolicyError, match="means nothing to a regression"):
        classify(replace(config, entropy_threshold=0.2))
    with pytest.raises(UsageError, match="are numbers without probabilities: leave --probabilities out"):
        classify(replace(config, probabilities=True))
    with pytest.raises(UsageError, match="are two ways to decide who leaves"):
        classify(replace(config, entropy_threshold=0.2, certainty_threshold=0.5))
