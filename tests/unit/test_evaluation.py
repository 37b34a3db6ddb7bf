"""What follows from a trace: exits, accuracies and savings on literal logits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from deebert.cost import ModelShape
from deebert.encoder import PackedEncoder
from deebert.evaluation import (
    LabelledSequences,
    Trace,
    exits,
    flop_saving,
    length_sorted_batches,
    off_ramp_scores,
    predictions,
    score,
    sweep,
    trace,
)
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.packing import PackedTokens
from deebert.problem import MULTI_LABEL
from tests.conftest import ModelFactory

NINE, MANY = math.log(9), math.log(99)
# Entropies: even odds 0.693, nine to one 0.325, ninety-nine to one 0.056.
LITERAL = Trace(
    layers=(1, 2, 3),
    logits=torch.tensor(
        [
            [[MANY, 0.0], [NINE, 0.0], [0.0, 0.0], [0.0, NINE]],
            [[0.0, MANY], [0.0, MANY], [0.0, NINE], [0.0, NINE]],
            [[0.0, 0.0], [NINE, 0.0], [NINE, 0.0], [MANY, 0.0]],
        ]
    ),
    lengths=np.array([4, 4, 4, 4]),
)
LABELS = torch.tensor([0, 0, 1, 1])
# The same four samples as the windows of two texts: three and one.
IN_WINDOWS = dataclasses.replace(LITERAL, windows=np.array([3, 1]))


def test_texts_in_windows_are_scored_as_texts_and_counted_as_windows() -> None:
    # At the first off-ramp, first class: 0.99, 0.9 and 0.5, 0.797 on average; then 0.1 alone.
    # At the second: 0.01, 0.01 and 0.1. At the last: 0.5, 0.9 and 0.9; then 0.99 alone.
    labels = torch.tensor([0, 1])

    assert off_ramp_scores(IN_WINDOWS, labels) == (1.0, 0.5, 0.5)
    assert predictions(IN_WINDOWS, FULL_DEPTH).tolist() == [0, 0]
    found = score(IN_WINDOWS, labels, EntropyThreshold(0.1))
    # They leave after layers 1, 2, 3 and 3: 0.99, 0.01 and 0.9, 0.633 on average; then 0.99.
    assert predictions(IN_WINDOWS, EntropyThreshold(0.1)).tolist() == [0, 0]
    assert (found.accuracy, found.mean_exit_layer, found.exit_histogram) == (0.5, 2.25, (0, 1, 1, 2))
    assert exits(IN_WINDOWS, EntropyThreshold(0.1))[0].tolist() == [1, 2, 3, 3]


def test_a_text_of_one_window_says_what_the_window_says() -> None:
    logits = torch.tensor([[[1e-9, -1.0], [3.0, 1.0], [3.0, 1.0]]])
    assert torch.tensor(1e-9).sigmoid() == 0.5  # as a mean of scores it would not hold

    in_windows = Trace(
        layers=(1,),
        logits=logits,
        lengths=np.array([3, 3, 3]),
        windows=np.array([1, 2]),
        problem=MULTI_LABEL,
    )

    assert predictions(in_windows, FULL_DEPTH).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("threshold", "layers", "predictions"),
    [
        (None, [3, 3, 3, 3], [0, 0, 0, 0]),
        (0.0, [3, 3, 3, 3], [0, 0, 0, 0]),
        (0.1, [1, 2, 3, 3], [0, 1, 0, 0]),
        (0.4, [1, 1, 2, 1], [0, 0, 1, 1]),
        (0.694, [1, 1, 1, 1], [0, 0, 0, 1]),
        ((None, 0.4), [2, 2, 2, 2], [1, 1, 1, 1]),
        ((0.1, None), [1, 3, 3, 3], [0, 0, 0, 0]),
    ],
)
def test_samples_leave_at_the_first_off_ramp_that_is_sure(
    threshold: float | tuple[float | None, ...] | None, layers: list[int], predictions: list[int]
) -> None:
    exit_layer, prediction = exits(LITERAL, EntropyThreshold(threshold))

    assert exit_layer.tolist() == layers
    assert prediction.tolist() == predictions


def test_layers_without_an_off_ramp_are_passed_by() -> None:
    sparse = Trace(layers=(2, 5), logits=LITERAL.logits[:2], lengths=LITERAL.lengths)

    exit_layer, _ = exits(sparse, EntropyThreshold((0.6, 0.1, 0.6, 0.6)))

    assert exit_layer.tolist() == [2, 5, 5, 5]
    assert score(sparse, LABELS, EntropyThreshold(0.1)).exit_histogram == (0, 0, 1, 0, 0, 3)


def test_score_is_accuracy_and_equation_2() -> None:
    point = score(LITERAL, LABELS, EntropyThreshold(0.4))

    assert point.exit_histogram == (0, 3, 1, 0)
    assert point.accuracy == 1.0
    assert point.mean_exit_layer == 1.25
    assert point.saving == pytest.approx(1 - 5 / 12)  # Σ i·Nᵢ = 3 + 2, n·Σ Nᵢ = 3·4
    assert point.speed_up == pytest.approx(2.4)


ON_EMBEDDINGS = Trace(layers=(0, 2, 4), logits=LITERAL.logits, lengths=LITERAL.lengths)


@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        (EntropyThreshold(0.1), [0, 2, 4, 4]),
        (EntropyThreshold((0.1, 0.1, 0.1)), [2, 2, 4, 4]),
        (EntropyThreshold((0.1, 0.1, 0.1), layer_0=0.4), [0, 0, 4, 0]),
        (EntropyThreshold(None, layer_0=0.1), [0, 4, 4, 4]),
    ],
)
def test_samples_leave_after_the_embeddings(policy: EntropyThreshold, layers: list[int]) -> None:
    assert exits(ON_EMBEDDINGS, policy)[0].tolist() == layers


def test_layer_0_counts_as_no_layer_in_equation_2() -> None:
    point = score(ON_EMBEDDINGS, LABELS, EntropyThreshold(0.1))

    assert point.exit_histogram == (1, 0, 1, 0, 2)
    assert point.mean_exit_layer == 2.5
    assert point.saving == pytest.approx(1 - 10 / 16)
    assert point.speed_up == pytest.approx(1.6)


def test_where_everybody_leaves_after_the_embeddings_all_layer_work_is_saved() -> None:
    point = score(ON_EMBEDDINGS, LABELS, EntropyThreshold(0.694))

    assert point.exit_histogram == (4, 0, 0, 0, 0)
    assert (point.mean_exit_layer, point.saving, point.speed_up) == (0.0, 1.0, math.inf)


def test_flops_of_layer_0_are_those_of_its_off_ramp() -> None:
    shape = ModelShape(num_layers=4, hidden_size=8, intermediate_size=16, num_labels=2)
    full = 4 * shape.layer_flops(16, 64) + shape.off_ramp_flops(4)

    assert flop_saving(ON_EMBEDDINGS, EntropyThreshold(0.694), shape) == pytest.approx(
        1 - shape.off_ramp_flops(4) / full
    )


def test_full_depth_saves_nothing() -> None:
    point = score(LITERAL, LABELS, FULL_DEPTH)

    assert (point.accuracy, point.saving, point.speed_up) == (0.5, 0.0, 1.0)


def test_sweep_scores_each_threshold() -> None:
    points = sweep(LITERAL, LABELS, [None, 0.1, 0.4])

    assert [p.exit_histogram for p in points] == [(0, 0, 0, 4), (0, 1, 1, 2), (0, 3, 1, 0)]
    assert [p.accuracy for p in points] == [0.5, 0.25, 1.0]
    assert [p.policy for p in points] == [EntropyThreshold(t) for t in (None, 0.1, 0.4)]


def test_each_off_ramp_has_its_accuracy() -> None:
    assert off_ramp_scores(LITERAL, LABELS) == (0.75, 0.5, 0.5)


def wrong_share(labels: torch.Tensor, predictions: torch.Tensor) -> float:
    return float((labels != predictions).double().mean())


def test_a_task_may_bring_its_own_metric() -> None:
    assert off_ramp_scores(LITERAL, LABELS) == (0.75, 0.5, 0.5)
    assert off_ramp_scores(LITERAL, LABELS, wrong_share) == (0.25, 0.5, 0.5)

    points = sweep(LITERAL, LABELS, [None, 0.1, 0.4], wrong_share)

    assert [p.score for p in points] == [0.5, 0.75, 0.0]
    assert [p.accuracy for p in points] == [0.5, 0.25, 1.0]
    assert score(LITERAL, LABELS, FULL_DEPTH).score == 0.5


def test_batches_partition_the_rows_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200)
    tokens = PackedTokens.pack([[i] * n for i, n in enumerate(lengths)])
    seen: list[int] = []
    for rows, batch in length_sorted_batches(tokens, 64):
        seen += rows.tolist()
        assert batch.layout.total_tokens <= 64
        assert batch.layout.lengths.tolist() == lengths[rows.numpy()].tolist()
        assert batch.input_ids.tolist() == np.repeat(rows.numpy(), batch.layout.lengths).tolist()

    assert sorted(seen) == list(range(200))
    assert lengths[seen].tolist() == sorted(lengths)


def test_batches_are_as_full_as_they_can_be() -> None:
    tokens = PackedTokens.pack([[0] * n for n in (2, 2, 2, 3, 3)])

    assert [rows.tolist() for rows, _ in length_sorted_batches(tokens, 6)] == [[0, 1, 2], [3, 4]]


def test_a_sequence_over_the_budget_goes_alone() -> None:
    tokens = PackedTokens.pack([[0] * 9, [0], [0] * 8])

    assert [rows.tolist() for rows, _ in length_sorted_batches(tokens, 4)] == [[1], [2], [0]]


def test_no_rows_have_no_batches() -> None:
    assert list(length_sorted_batches(PackedTokens.pack([]), 16)) == []


def test_taking_rows_keeps_texts_and_labels_together() -> None:
    data = LabelledSequences(tokens=PackedTokens.pack([[1], [2, 2], [3]]), labels=torch.tensor([10, 20, 30]))

    taken = data.take([2, 1])

    assert len(taken) == 2
    assert taken.tokens.input_ids.tolist() == [3, 2, 2]
    assert taken.labels.tolist() == [30, 20]


def test_a_trace_keeps_input_order_whatever_the_micro_batch(tiny_model: ModelFactory) -> None:
    encoder = PackedEncoder.of(tiny_model(off_ramp_layers=[2, 4]))
    tokens = PackedTokens.pack([[2, 10 + i, *range(45, 45 + i % 7), 3] for i in range(20)])

    whole = trace(encoder, tokens)
    alone = torch.cat([trace(encoder, tokens.sequence(i)).logits for i in range(20)], dim=1)

    assert whole.layers == (2, 4, 5)
    assert whole.lengths.tolist() == tokens.layout.lengths.tolist()
    torch.testing.assert_close(whole.logits, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(trace(encoder, tokens, micro_batch_tokens=16).logits, alone, atol=1e-5, rtol=0)
