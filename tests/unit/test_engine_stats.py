"""What the engine counts, in literal numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.engine.stats import EngineStats, StatsCounter


def counted() -> EngineStats:
    counter = StatsCounter(3)
    counter.count_embedding(0.5)
    counter.count_layers(0, 1, samples=4, tokens=20, squared_tokens=110, seconds=2.0)
    counter.count_layers(2, 2, samples=1, tokens=5, squared_tokens=25, seconds=3.0)
    counter.count_layers(0, 1, samples=2, tokens=6, squared_tokens=20, seconds=1.0)
    return counter.snapshot()


def test_every_layer_of_a_segment_is_counted_and_only_its_last_off_ramp() -> None:
    stats = counted()

    assert stats.steps == (2, 2, 1)
    assert stats.samples == (6, 6, 1)
    assert stats.tokens == (26, 26, 5)
    assert stats.squared_tokens == (130, 130, 25)
    assert stats.off_ramp_samples == (0, 0, 6, 1)


def test_seconds_of_a_segment_are_shared_by_its_layers() -> None:
    stats = counted()

    assert stats.seconds == (1.5, 1.5, 3.0)
    assert stats.embedding_seconds == 0.5
    assert stats.total_seconds == 6.5


def test_the_off_ramp_on_the_embeddings_is_counted_apart_from_layers() -> None:
    counter = StatsCounter(2)
    counter.count_embedding(0.5)
    counter.count_layers(-1, -1, samples=4, tokens=20, squared_tokens=110, seconds=0.25)
    counter.count_layers(0, 1, samples=1, tokens=5, squared_tokens=25, seconds=2.0)

    stats = counter.snapshot()

    assert (stats.steps, stats.samples, stats.tokens, stats.squared_tokens) == (
        (1, 1),
        (1, 1),
        (5, 5),
        (25, 25),
    )
    assert stats.off_ramp_samples == (4, 0, 1)
    assert (stats.embedding_seconds, stats.seconds) == (0.75, (1.0, 1.0))


def test_seconds_in_the_embeddings_add_up() -> None:
    counter = StatsCounter(1)
    counter.count_embedding(0.5)
    counter.count_seconds(-1, -1, 0.25)
    counter.count_embedding(1.0)

    assert counter.snapshot().embedding_seconds == 1.75


def test_seconds_that_come_later_count_no_step() -> None:
    counter = StatsCounter(3)
    counter.count_seconds(1, 2, 3.0)

    assert counter.snapshot().seconds == (0.0, 1.5, 1.5)
    assert counter.snapshot().steps == counter.snapshot().samples == (0, 0, 0)


def test_statistics_written_before_embeddings_had_off_ramps_read_as_none_there() -> None:
    old = {**counted().to_dict(), "off_ramp_samples": [0, 6, 1]}

    assert EngineStats.from_dict(old) == counted()


def test_layer_tokens_sum_over_layers() -> None:
    assert counted().layer_tokens == 57


def test_a_snapshot_does_not_change_when_counting_goes_on() -> None:
    counter = StatsCounter(1)
    before = counter.snapshot()

    counter.count_layers(0, 0, samples=1, tokens=1, squared_tokens=1, seconds=1.0)

    assert before == EngineStats.zero(1)
    assert counter.snapshot().samples == (1,)


def test_statistics_add_and_subtract() -> None:
    stats = counted()

    assert (stats + stats).tokens == (52, 52, 10)
    assert (stats + stats).embedding_seconds == 1.0
    assert stats + stats - stats == stats
    assert stats - stats == EngineStats.zero(3)
    assert stats + EngineStats.zero(3) == stats


def test_statistics_of_different_depths_do_not_add() -> None:
    with pytest.raises(ValueError, match="shorter"):
        counted() + EngineStats.zero(2)


def test_json_round_trip() -> None:
    stats = counted()

    assert EngineStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


def test_counts_are_plain_numbers() -> None:
    stats = counted()

    assert all(type(n) is int for n in (*stats.steps, *stats.tokens, *stats.off_ramp_samples))
    assert all(type(s) is float for s in stats.seconds)
    assert not isinstance(stats.layer_tokens, np.integer)
