"""Measured contenders leave where the reference says, and every contender is measured on the same samples."""

from __future__ import annotations

import pytest

from deebert.cost import mean_exit_layer
from deebert.encoder import PackedEncoder
from deebert.evaluation import exits, trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold
from deebert.packing import PackedTokens
from jobs.timing import Contender, _alone, _through_engine, choose_samples, measure
from tests.conftest import ModelFactory

TOKENS = PackedTokens.pack([[2, 10 + i, *range(45, 45 + i % 9), 3] for i in range(60)])


@pytest.mark.parametrize("layers", [[1, 2, 4], [0, 1, 2, 4]])
@pytest.mark.parametrize("threshold", [None, 0.4, 0.9, (None, 0.5, None, 0.9)])
def test_both_ways_leave_where_the_trace_says(
    tiny_model: ModelFactory, threshold: float | tuple[float | None, ...] | None, layers: list[int]
) -> None:
    encoder, policy = PackedEncoder.of(tiny_model(off_ramp_layers=layers)), EntropyThreshold(threshold)
    contender = Contender(name="x", encoder=encoder, policy=policy)
    expected = exits(trace(encoder, TOKENS), policy)[0].tolist()

    assert len(set(expected)) > 1 or threshold is None
    assert _alone((contender,), TOKENS)["x"].exit_layers.tolist() == expected
    assert _through_engine(contender, TOKENS).exit_layers.tolist() == expected


def test_every_contender_is_timed_on_the_same_samples(tiny_model: ModelFactory) -> None:
    encoder = PackedEncoder.of(tiny_model())
    sure = EntropyThreshold(0.9)
    contenders = (
        Contender(name="full", encoder=encoder, policy=FULL_DEPTH),
        Contender(name="0.9", encoder=encoder, policy=sure),
    )

    full, early = measure(contenders, TOKENS.slice(0, 20), TOKENS, rounds=3)

    assert (full.name, full.rounds) == ("full", 3)
    assert [(m.samples, m.mean_exit_layer) for m in (full.alone, full.engine)] == [(20, 5.0), (60, 5.0)]
    layers = exits(trace(encoder, TOKENS), sure)[0]
    histograms = [part.bincount(minlength=6).tolist() for part in (layers[:20], layers)]
    assert [early.alone.mean_exit_layer, early.engine.mean_exit_layer] == list(
        map(mean_exit_layer, histograms)
    )
    assert min(t.seconds for t in (full.alone, full.engine, early.alone, early.engine)) > 0


def test_timed_samples_are_spread_over_all() -> None:
    tokens = PackedTokens.pack([[i] for i in range(10)])

    assert choose_samples(tokens, 4).input_ids.tolist() == [0, 3, 6, 9]
    assert choose_samples(tokens, 1).input_ids.tolist() == [0]
    assert choose_samples(tokens, 99) is tokens
