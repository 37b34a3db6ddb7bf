"""What rows of a part, and lines of a stream, say of each problem type: literal columns, and the lanes' arrays."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastparquet import ParquetFile
from transformers import PreTrainedTokenizerFast

from deebert.checkpoint import Checkpoint
from deebert.encoder import PackedEncoder
from deebert.evaluation import exits, trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, LearningToExit
from deebert.problem import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, Problem
from pipeline.engine import EngineConfig
from pipeline.errors import NotFiniteError
from pipeline.lanes import Lanes
from pipeline.report.said import said_by
from pipeline.schema import Answers, part_table
from pipeline.stream import StreamConfig, stream
from tests.conftest import ModelFactory
from tests.unit.test_lanes import every, random_texts, wait

LABELS = ("a", "b", "c")


def answers(problem: Problem, **said: Any) -> Answers:
    """Three rows; the last two were audited."""
    rows = len(said["prediction"])
    given = {
        "source_rows": np.arange(rows),
        "num_tokens": np.full(rows, 4, np.int32),
        "num_windows": np.ones(rows, np.int32),
        "truncated": np.zeros(rows, np.bool_),
        "exit_layer": np.ones(rows, np.int16),
        "entropy": np.full(rows, 0.25, np.float32),
        "certainty": np.full(rows, 0.5, np.float32),
        "probabilities": np.full((rows, 3), 0.25, np.float32),
        "audited": np.array([False, True, True]),
        **said,
    }
    return Answers(**given)


def table(made: Answers, **options: bool) -> pa.Table:
    return part_table(
        made,
        source_file="f",
        kept=pa.table({}),
        id_column=None,
        keep_columns=(),
        labels=LABELS,
        with_probabilities=False,
        **options,
    )


ONE = answers(
    SINGLE_LABEL,
    prediction=np.array([2, 0, 1], np.int32),
    audit_prediction=np.array([0, 0, 2], np.int32),
)
SEVERAL = answers(
    MULTI_LABEL,
    prediction=np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.bool_),
    probabilities=np.array([[0.9, 0.1, 0.75], [0.25, 0.0, 0.0], [0.0, 1.0, 0.0]], np.float32),
    audit_prediction=np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], np.bool_),
)
NUMBER = answers(
    REGRESSION,
    prediction=np.array([1.5, -2.0, 0.25], np.float32),
    entropy=np.full(3, np.nan, np.float32),
    audit_prediction=np.array([0.0, -2.0, 0.75], np.float32),
)


class TestColumns:
    def test_one_label(self) -> None:
        found = table(ONE)

        assert found["prediction"].to_pylist() == [2, 0, 1]
        assert found["label"].to_pylist() == ["c", "a", "b"]
        assert found["score"].to_pylist() == [0.25] * 3
        assert found["audit_prediction"].to_pylist() == [None, 0, 2]

    def test_several_labels(self) -> None:
        found = table(SEVERAL)

        assert found.schema.field("prediction").type == pa.list_(pa.int32())
        assert found.schema.field("label").type == pa.list_(pa.string())
        assert found.schema.field("score").type == pa.list_(pa.float32())
        assert found["prediction"].to_pylist() == [[0, 2], [], [1]]
        assert found["label"].to_pylist() == [["a", "c"], [], ["b"]]
        assert found["score"].to_pylist() == [[pytest.approx(0.9), 0.75], [], [1.0]]
        assert found["audit_prediction"].to_pylist() == [None, [], [1, 2]]

    def test_a_number(self) -> None:
        found = table(NUMBER, with_certainty=True)

        assert found.schema.field("prediction").type == pa.float32()
        assert found["prediction"].to_pylist() == [1.5, -2.0, 0.25]
        assert found["entropy"].to_pylist() == [None] * 3
        assert found["certainty"].to_pylist() == [0.5] * 3
        assert found["audit_prediction"].to_pylist() == [None, -2.0, 0.75]
        assert not {"label", "score"} & set(found.column_names)

    @pytest.mark.parametrize("made", [ONE, SEVERAL, NUMBER])
    def test_a_table_without_rows_has_the_same_columns(self, made: Answers) -> None:
        problem = {2: MULTI_LABEL}.get(made.prediction.ndim) or (
            REGRESSION if made.prediction.dtype == np.float32 else SINGLE_LABEL
        )

        nothing = Answers.empty(problem, 3)
        assert table(nothing).schema == table(made).schema
        assert nothing.agreeing().tolist() == []

    def test_certainty_is_there_where_the_policy_reads_it(self) -> None:
        assert "certainty" not in table(ONE).column_names

    def test_agreement_with_full_depth(self) -> None:
        assert ONE.agreeing().tolist() == [False, True, False]
        assert SEVERAL.agreeing().tolist() == [False, True, False]
        assert (ONE.audit_distance(), SEVERAL.audit_distance(), NUMBER.audit_distance()) == (0.0, 0.0, 0.5)


class TestRecount:
    @pytest.mark.parametrize(
        ("made", "name", "label_rows", "agreeing"),
        [
            (ONE, "single_label_classification", [1, 1, 1], [False, True, False]),
            (SEVERAL, "multi_label_classification", [1, 1, 1], [False, True, False]),
            (NUMBER, "regression", [0, 0, 0], [False, True, False]),
        ],
    )
    def test_by_the_other_library(
        self, tmp_path: Path, made: Answers, name: str, label_rows: list[int], agreeing: list[bool]
    ) -> None:
        pq.write_table(table(made), tmp_path / "part.parquet")
        said = said_by(name, LABELS)

        frames = ParquetFile(tmp_path / "part.parquet").iter_row_groups()
        found = [said.add(frame)[0].tolist() for frame in frames]

        assert found == [agreeing]
        assert said.label_rows.tolist() == label_rows
        assert (said.unknown_label_rows, said.mislabelled_rows) == (0, 0)

    def test_sets_that_are_not_what_they_are_called(self) -> None:
        said = said_by("multi_label_classification", LABELS)

        said.add(
            pd.DataFrame({"prediction": [[0], [1]], "label": [["b"], ["x"]], "audit_prediction": [None, [1]]})
        )

        assert (said.unknown_label_rows, said.mislabelled_rows) == (1, 2)

    def test_sets_of_a_model_with_two_classes_of_one_name(self) -> None:
        said = said_by("multi_label_classification", ("a", "a", "b"))

        agreeing, _ = said.add(
            pd.DataFrame(
                {
                    "prediction": [[0, 1], [1, 2], [2]],
                    "label": [["a", "a"], ["a", "b"], ["a"]],
                    "audit_prediction": [[0], [1, 2], None],
                }
            )
        )

        assert said.label_rows.tolist() == [2, 0, 2]
        assert (said.unknown_label_rows, said.mislabelled_rows) == (0, 1)
        assert agreeing.tolist() == [False, True, False]


CASES = [
    (name, policy)
    for name in PROBLEM_TYPES
    for policy in (EntropyThreshold(0.45), LearningToExit(0.7))
    if name != "regression" or policy.reads_certainty
]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_the_lanes_answer_as_a_trace_does(tiny_model: ModelFactory, name: str, policy: Any) -> None:
    labels = 1 if name == "regression" else 3
    encoder = PackedEncoder.of(tiny_model(num_labels=labels, problem_type=name, learns_to_exit=True))
    tokens, audited = random_texts(60, seed=2), every(3, 60)
    traced = trace(encoder, tokens)

    submission = Lanes(encoder, policy, EngineConfig(micro_batch_tokens=128)).submit(tokens, audited)
    wait(submission)

    exit_layer, prediction = exits(traced, policy)
    _, full_depth = exits(traced, FULL_DEPTH)
    assert submission.exit_layer.tolist() == exit_layer.tolist()
    np.testing.assert_allclose(submission.prediction, prediction.numpy(), atol=1e-4)
    np.testing.assert_allclose(submission.audit_prediction[audited], full_depth.numpy()[audited], atol=1e-4)
    assert np.isnan(submission.entropy).all() == (name == "regression")
    if policy.reads_certainty:
        assert traced.certainties is not None
        expected = traced.certainties.numpy()[exit_layer.numpy() - 1, np.arange(60)]
        np.testing.assert_allclose(submission.certainty, expected, atol=1e-5)
    else:
        assert np.isnan(submission.certainty).all()


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_stream_says_the_same_in_json(
    tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, name: str, policy: Any
) -> None:
    labels = 1 if name == "regression" else 3
    model = tiny_model(num_labels=labels, problem_type=name, learns_to_exit=True)
    checkpoint = Checkpoint.of("m", model, tokenizer)
    out = io.StringIO()

    stream(checkpoint, policy, [b"the film is good", b"very dull"], out, StreamConfig())

    for line in map(json.loads, out.getvalue().splitlines()):
        assert ("certainty" in line) == policy.reads_certainty
        if name == "regression":
            assert isinstance(line["prediction"], float)
            assert line["entropy"] is None
            assert "label" not in line
        elif name == "multi_label_classification":
            assert line["label"] == [checkpoint.labels[i] for i in line["prediction"]]
            assert all(score > 0.5 for score in line["score"])
            assert 0 <= line["entropy"] <= math.log(2)
        else:
            assert line["label"] == checkpoint.labels[line["prediction"]]


def test_a_stream_ends_where_answers_are_no_numbers(
    tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, out = tiny_model(), io.StringIO()
    with torch.no_grad():  # too large for float16 from layer 2 on
        model.backbone.encoder.layer[1].output.dense.weight.mul_(3e5)
    checkpoint = Checkpoint.of("m", model, tokenizer)

    with pytest.raises(
        NotFiniteError, match="not finite numbers in float16: classify in float32 or bfloat16"
    ):
        stream(checkpoint, FULL_DEPTH, [b"a film"], out, StreamConfig(precision="float16"))
    assert not out.getvalue()
