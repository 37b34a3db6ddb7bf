"""FLOPs and savings, computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from deebert.config import POOLINGS
from deebert.cost import ModelShape, expected_saving, mean_exit_layer

TINY = ModelShape(num_layers=2, hidden_size=2, intermediate_size=3, num_labels=5)
BERT_BASE = ModelShape(num_layers=12, hidden_size=768, intermediate_size=3072, num_labels=2)


def test_a_layer_costs_its_projections_feed_forward_and_attention() -> None:
    # One sequence of 3 tokens: 2·3·(4·2² + 2·2·3) = 168 for products, 4·9·2 = 72 for attention.
    assert TINY.layer_flops(tokens=3, squared_tokens=9) == 168 + 72


def test_the_same_tokens_in_shorter_sequences_cost_less_attention() -> None:
    assert TINY.layer_flops(tokens=4, squared_tokens=16) - TINY.layer_flops(tokens=4, squared_tokens=8) == 64


def test_bert_base_needs_about_22_gflops_for_128_tokens() -> None:
    flops = 12 * BERT_BASE.layer_flops(tokens=128, squared_tokens=128**2)

    # 12 · (2·128·7,077,888 + 4·16,384·768)
    assert flops == 22_347_251_712


def test_an_off_ramp_costs_a_pooler_and_a_classifier() -> None:
    assert TINY.off_ramp_flops(samples=1) == 2 * 2 * (2 + 5)
    assert TINY.off_ramp_flops(samples=10) == 280


def test_a_pooler_that_reads_two_states_is_twice_as_wide() -> None:
    costs = {p: replace(TINY, off_ramp_pooling=p).off_ramp_flops(samples=1) for p in POOLINGS}

    assert costs == {"cls": 28, "mean": 28, "attention": 28, "both": 2 * 2 * (4 + 5)}


@pytest.mark.parametrize(
    ("histogram", "mean", "saving"),
    [
        ((0, 10, 0, 0, 0), 1.0, 0.75),
        ((0, 0, 0, 0, 10), 4.0, 0.0),
        ((0, 5, 0, 0, 5), 2.5, 0.375),
        ((0, 1, 2, 3, 4), 3.0, 0.25),
        ((0, 7), 1.0, 0.0),
        ((5, 0, 0, 0, 5), 2.0, 0.5),  # half left after the embeddings
        ((3, 0), 0.0, 1.0),
    ],
)
def test_saving_is_equation_2_of_the_paper(histogram: tuple[int, ...], mean: float, saving: float) -> None:
    assert mean_exit_layer(histogram) == pytest.approx(mean)
    assert expected_saving(histogram) == pytest.approx(saving)


def test_no_samples_have_no_mean() -> None:
    assert math.isnan(mean_exit_layer((0, 0, 0)))
    assert math.isnan(expected_saving((0, 0, 0)))
