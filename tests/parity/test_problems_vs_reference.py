"""One truth for every problem type and both kinds of exits: the engine's answers are the reference's.

As in `test_engine_vs_reference`: samples within `TIE` of a threshold are excepted, and counted.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from deebert.encoder import PackedEncoder
from deebert.evaluation import exits, trace
from deebert.exit_policy import EntropyThreshold, LearningToExit, StoredPolicy
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.problem import PROBLEM_TYPES
from deebert.reference import ReferenceResult, classify_one
from pipeline.engine import Engine, EngineConfig
from tests.conftest import make_model
from tests.parity.test_encoder_vs_transformers import padded
from tests.parity.test_engine_vs_reference import MOST_TIES, TIE, per_layer, random_texts

TEXTS = random_texts(seed=5, each=2)
POLICIES: dict[str, StoredPolicy] = {
    "entropy": EntropyThreshold(0.35),
    "certainty": LearningToExit(0.8),
    "certainty, per layer": LearningToExit((0.9, None, 0.6, 1.0)),
    "certainty, never": LearningToExit(None),
}
CASES = [
    (problem, name)
    for problem in PROBLEM_TYPES
    for name in POLICIES
    if (problem, name) != ("regression", "entropy")
]
FAMILIES = [("bert", "mean"), ("roberta", "cls"), ("distilbert", "mean")]


@functools.cache
def tiny(family: str, pooling: str, problem: str) -> DeeBertForSequenceClassification:
    labels = 1 if problem == "regression" else 3
    return make_model(family, pooling, num_labels=labels, problem_type=problem, learns_to_exit=True)


@functools.cache
def tiny_reference(family: str, pooling: str, problem: str, policy: str) -> list[ReferenceResult]:
    chosen = POLICIES[policy]
    return [
        classify_one(
            tiny(family, pooling, problem),
            TEXTS.sequence(i).input_ids.tolist(),
            [None if t is not None and t >= 1 else t for t in per_layer(chosen.thresholds, 5)],
            by_certainty=chosen.reads_certainty,
        )
        for i in range(len(TEXTS))
    ]


def label(prediction: np.ndarray) -> object:
    """A prediction of the engine as the reference writes it."""
    if prediction.dtype == np.bool_:
        return tuple(np.flatnonzero(prediction).tolist())
    return pytest.approx(float(prediction), abs=1e-4) if prediction.dtype == np.float32 else int(prediction)


@pytest.mark.parametrize(("problem", "policy"), CASES)
@pytest.mark.parametrize(("family", "pooling"), FAMILIES)
def test_the_engine_answers_as_the_reference(family: str, pooling: str, problem: str, policy: str) -> None:
    expected = tiny_reference(family, pooling, problem, policy)
    sure = {i for i, e in enumerate(expected) if e.margin >= TIE and _decided(e, problem)}
    assert len(expected) - len(sure) <= max(1, MOST_TIES * len(expected))

    for budget, piece in ((64, 7), (333, 1000)):
        encoder = PackedEncoder.of(tiny(family, pooling, problem))
        engine = Engine(encoder, POLICIES[policy], EngineConfig(micro_batch_tokens=budget))
        answered = set()
        for start in range(0, len(TEXTS), piece):
            rows = np.arange(start, min(start + piece, len(TEXTS)))
            engine.submit(rows, TEXTS.take(rows))
        for left in engine.drain():
            for place, sample in enumerate(left.sample_ids.tolist()):
                answered.add(sample)
                if sample not in sure:
                    continue
                theirs = expected[sample]
                assert left.exit_layer == theirs.exit_layer
                assert theirs.label == label(left.predictions[place])
                assert left.entropy[place] == pytest.approx(theirs.entropy, abs=1e-4, nan_ok=True)
                if left.certainty is not None:
                    assert left.certainty[place] == pytest.approx(theirs.certainty, abs=1e-4)
        assert len(answered) == len(TEXTS)
        assert (left.certainty is not None) == POLICIES[policy].reads_certainty


def _decided(result: ReferenceResult, problem: str) -> bool:
    """Whether float32 can say which labels hold."""
    return problem != "multi_label_classification" or min(map(abs, result.logits)) >= TIE


@pytest.mark.parametrize(("problem", "policy"), CASES)
def test_so_does_a_trace(problem: str, policy: str) -> None:
    expected = tiny_reference("bert", "mean", problem, policy)

    exit_layer, prediction = exits(
        trace(PackedEncoder.of(tiny("bert", "mean", problem)), TEXTS), POLICIES[policy]
    )

    for i, theirs in enumerate(expected):
        if theirs.margin >= TIE and _decided(theirs, problem):
            assert exit_layer[i] == theirs.exit_layer
            assert theirs.label == label(prediction[i].numpy())


@pytest.mark.parametrize(("family", "pooling"), FAMILIES)
def test_the_cases_say_something(family: str, pooling: str) -> None:
    layers = {case: {r.exit_layer for r in tiny_reference(family, pooling, *case)} for case in CASES}

    for problem in PROBLEM_TYPES:
        assert len(layers[problem, "certainty"]) >= 2
        assert layers[problem, "certainty, per layer"] <= {1, 3, 5}
        assert layers[problem, "certainty, never"] == {5}
    assert len(layers["multi_label_classification", "entropy"]) >= 3
    sets = {r.label for r in tiny_reference(family, pooling, "multi_label_classification", "certainty")}
    assert len(sets) >= 4


def test_together_certainties_let_samples_leave_after_every_layer() -> None:
    results = [r for f in FAMILIES for c in CASES if c[1] == "certainty" for r in tiny_reference(*f, *c)]

    assert {r.exit_layer for r in results} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(("family", "pooling"), FAMILIES)
def test_the_packed_form_is_as_certain_as_the_training_form(family: str, pooling: str) -> None:
    model = tiny(family, pooling, "single_label_classification")
    rows = [TEXTS.sequence(i).input_ids.tolist() for i in range(20)]

    with torch.no_grad():
        theirs = model(*padded(rows, model.config.backbone_config.pad_token_id)).certainties
    ours = trace(PackedEncoder.of(model), PackedTokens.pack(rows)).certainties

    assert ours is not None
    assert ours.shape == (5, 20)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not math.isclose(float(ours.min()), float(ours.max()), abs_tol=0.3)
