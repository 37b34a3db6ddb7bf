"""Texts in windows: cut as Hugging Face does, answered by the mean, however and wherever the windows leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deebert.encoder import PackedEncoder
from deebert.exit_policy import EntropyThreshold
from deebert.packing import PackedTokens
from deebert.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Problem
from deebert.reference import classify_one, classify_windows, windows_of
from deebert.windows import text_means, text_sums
from pipeline.config import ClassifyConfig
from pipeline.engine import Engine, EngineConfig, Exits
from pipeline.errors import UsageError
from pipeline.lanes import Lanes, Submission
from pipeline.planning import make_plan
from pipeline.tokenization import TextTokenizer, TokenizedBatch
from pipeline.windows import SLOT_BITS, Answered, TextsInFlight, WindowedTexts, by_slot
from tests.conftest import ModelFactory, make_model, make_tokenizer
from tests.unit.test_lanes import wait

THRESHOLD = 0.7
TIE = 1e-5
"""Entropies this close to the threshold may fall on either side: float32 products are not associative."""
WORDS = ("the", "film", "is", "was", "not", "very", "good", "bad", "great", "dull", "and", "but")


def text(tokens: int, seed: int = 0) -> str:
    """A text of so many tokens, all of them words of the tiny vocabulary."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, tokens))


def texts_of(lengths: Sequence[int]) -> list[str]:
    return [text(length, seed) for seed, length in enumerate(lengths)]


def by_text(batch: TokenizedBatch) -> list[list[list[int]]]:
    """Token ids of each window of each text."""
    ends = np.cumsum(batch.windows).tolist()
    sequences = [batch.tokens.sequence(i).input_ids.tolist() for i in range(len(batch.tokens))]
    return [sequences[end - n : end] for end, n in zip(ends, batch.windows.tolist(), strict=True)]


@pytest.fixture(scope="module")
def encoder(tiny_model: ModelFactory) -> PackedEncoder:
    return PackedEncoder.of(tiny_model())


class TestCutting:
    @given(
        lengths=st.lists(st.integers(0, 90), max_size=6),
        max_length=st.integers(4, 20),
        share=st.floats(0, 1),
    )
    def test_is_the_specifications(self, lengths: list[int], max_length: int, share: float) -> None:
        room = max_length - 2
        stride = int(share * (room // 2))
        tokenizer = make_tokenizer()

        batch = TextTokenizer(tokenizer, max_length=max_length, window_stride=stride)(texts_of(lengths))

        expected = [
            windows_of(ids, room=room, stride=stride)
            for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts_of(lengths))
        ]
        cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        assert by_text(batch) == [[[cls, *w, sep] for w in windows] for windows in expected]
        assert not batch.truncated.any()

    @given(length=st.integers(0, 200), room=st.integers(2, 20), share=st.floats(0, 1))
    def test_leaves_out_no_token_and_has_none_in_more_than_two_windows(
        self, length: int, room: int, share: float
    ) -> None:
        windows = windows_of(range(length), room=room, stride=int(share * (room // 2)))

        times = np.bincount([token for window in windows for token in window], minlength=length)
        assert set(times.tolist()) <= {1, 2}
        assert all(len(window) == room for window in windows[:-1])

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_is_hugging_faces(self, tokenizer: PreTrainedTokenizerFast, side: str) -> None:
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, truncation_side=side, pad_token="[PAD]"
        )
        texts = texts_of([0, 14, 15, 40, 200])

        batch = TextTokenizer(theirs, max_length=16, window_stride=5)(texts)

        expected = theirs(texts, truncation=True, max_length=16, stride=5, return_overflowing_tokens=True)
        assert list(chain.from_iterable(by_text(batch))) == expected["input_ids"]
        samples = np.repeat(np.arange(len(texts)), batch.windows)
        assert samples.tolist() == expected["overflow_to_sample_mapping"]

    def test_texts_that_fit_are_tokenized_as_ever(self, tokenizer: PreTrainedTokenizerFast) -> None:
        texts = texts_of(range(15))

        plain = TextTokenizer(tokenizer, max_length=16)(texts)
        windowed = TextTokenizer(tokenizer, max_length=16, window_stride=4)(texts)

        assert windowed.tokens.input_ids.tolist() == plain.tokens.input_ids.tolist()
        assert windowed.windows.tolist() == plain.windows.tolist() == [1] * 15

    @pytest.mark.parametrize("stride", [-1, 8])
    def test_refuses_a_stride_of_more_than_half_a_window(
        self, tokenizer: PreTrainedTokenizerFast, stride: int
    ) -> None:
        with pytest.raises(UsageError, match=rf"--window-stride {stride} is not between 0 and 7, half of"):
            TextTokenizer(tokenizer, max_length=16, window_stride=stride)

    def test_refuses_windows_without_room(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UsageError, match="--max-length 3 leaves windows no room for text"):
            TextTokenizer(tokenizer, max_length=3, window_stride=0)

    def test_refuses_pairs(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UsageError, match=r"--window-stride .* not defined for pairs"):
            TextTokenizer(tokenizer, max_length=16, window_stride=0)(["a"], ["b"])


class TestMeans:
    def test_of_known_numbers(self) -> None:
        values = np.array([[1, 0], [0, 1], [0.5, 0.5], [0.25, 0.75]], np.float32)

        means = text_means(values, np.array([1, 2, 1]))

        assert means.tolist() == [[1, 0], [0.25, 0.75], [0.25, 0.75]]
        assert text_sums(np.array([4, 5, 6, 7]), np.array([1, 2, 1])).tolist() == [4, 11, 7]

    def test_are_summed_in_float64(self) -> None:
        tiny = 2.0**-30  # beside 1 nothing in float32

        means = text_means(np.array([[1], [tiny]], np.float32), np.array([2]))

        assert means.tolist() == [[(1 + tiny) / 2]]
        assert text_sums(np.array([2**31, 1]), np.array([2])).tolist() == [2**31 + 1]

    def test_of_no_texts(self) -> None:
        assert text_means(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)).shape == (0, 3)
        assert text_sums(np.zeros(0, np.int64), np.zeros(0, np.int64)).shape == (0,)

    def test_a_certain_distribution_has_no_entropy_and_an_even_one_the_most(self) -> None:
        surprise = SINGLE_LABEL.entropy_of_scores(torch.tensor([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))

        assert surprise.tolist() == [0.0, pytest.approx(np.log(3))]
        assert not np.signbit(surprise[0])

    @pytest.mark.parametrize(
        ("problem", "windows", "prediction", "entropy"),
        [
            (SINGLE_LABEL, [[0.9, 0.1], [0.3, 0.7]], 0, -0.6 * np.log(0.6) - 0.4 * np.log(0.4)),
            (MULTI_LABEL, [[0.9, 0.1], [0.3, 0.7]], [True, False], -0.6 * np.log(0.6) - 0.4 * np.log(0.4)),
            (REGRESSION, [[4.0], [1.5]], 2.75, np.nan),
        ],
        ids=lambda value: value.name if isinstance(value, Problem) else "",
    )
    def test_what_a_mean_says_is_the_problems_business(
        self, problem: Problem, windows: list[list[float]], prediction: Any, entropy: float
    ) -> None:
        width = len(windows[0])
        of_windows = replace(Answered.blank(2, problem, width), probabilities=np.array(windows, np.float32))

        _, found = WindowedTexts(np.array([2]), problem, width).leave(np.arange(2), of_windows)

        assert found.prediction.tolist() == [prediction]
        assert found.entropy[0] == pytest.approx(entropy, nan_ok=True, rel=1e-6)

    def test_a_text_is_as_certain_as_its_windows_in_the_mean_and_left_with_the_deepest(self) -> None:
        of_windows = replace(
            Answered.blank(5, SINGLE_LABEL, 2),
            certainty=np.array([0.125, 0.25, 0.75, 0.5, 1.0], np.float32),
            exit_layer=np.array([9, 2, 4, 3, 1], np.int16),
        )

        _, found = WindowedTexts(np.array([1, 3, 1]), SINGLE_LABEL, 2).leave(np.arange(5), of_windows)

        assert found.certainty.tolist() == [0.125, 0.5, 1.0]
        assert found.exit_layer.tolist() == [9, 4, 1]


def random_answers(count: int, seed: int) -> Answered:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([0.5] * 3, count).astype(np.float32)
    return Answered(
        prediction=rng.integers(3, size=count).astype(np.int32),
        exit_layer=rng.integers(1, 13, size=count).astype(np.int16),
        entropy=rng.random(count).astype(np.float32),
        certainty=rng.random(count).astype(np.float32),
        probabilities=probabilities,
    )


class TestGathering:
    @given(
        windows=st.lists(st.integers(1, 7), min_size=1, max_size=12),
        seed=st.integers(0, 99),
        data=st.data(),
    )
    def test_answers_each_text_once_and_alike_in_any_order_of_exit(
        self, windows: list[int], seed: int, data: st.DataObject
    ) -> None:
        counts, total = np.array(windows), sum(windows)
        answers = random_answers(total, seed)
        order = np.array(data.draw(st.permutations(range(total))))
        cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=5)))

        texts, found = WindowedTexts(counts, SINGLE_LABEL, 3), Answered.blank(len(counts), SINGLE_LABEL, 3)
        seen: list[int] = []
        for leaving in np.split(order, cuts):
            complete, complete_answers = texts.leave(leaving, answers.take(leaving))
            seen += complete.tolist()
            found.put(complete, complete_answers)
        _, at_once = WindowedTexts(counts, SINGLE_LABEL, 3).leave(np.arange(total), answers)

        assert sorted(seen) == list(range(len(windows)))
        assert texts.is_done
        for name, column in vars(found).items():
            assert column.tobytes() == getattr(at_once, name).tobytes(), name

    def test_a_text_of_one_window_is_answered_as_that_window(self) -> None:
        answers = random_answers(5, seed=1)

        _, found = WindowedTexts(np.array([1, 3, 1]), SINGLE_LABEL, 3).leave(np.arange(5), answers)

        for name, column in vars(found).items():
            assert column[[0, 2]].tobytes() == getattr(answers, name)[[0, 4]].tobytes(), name
        assert found.exit_layer[1] == answers.exit_layer[1:4].max()

    def test_texts_wait_for_their_last_window_and_nothing_is_kept_of_them_after(self) -> None:
        in_flight = TextsInFlight(SINGLE_LABEL, num_labels=3)
        first = in_flight.admit(np.array([70, 71]), np.array([2, 1]))
        second = in_flight.admit(np.array([80]), np.array([3]))

        def leave(*samples: int) -> list[int]:
            count = len(samples)
            exits = Exits(
                sample_ids=np.array(samples),
                exit_layer=1,
                logits=np.zeros((count, 3), np.float32),
                entropy=np.zeros(count, np.float32),
                certainty=None,
                problem=SINGLE_LABEL,
            )
            return [name for names, _ in in_flight.leave(exits) for name in names.tolist()]

        assert len({*first.tolist(), *second.tolist()}) == 6
        assert leave(first[0], second[2]) == []
        assert leave(second[0], first[2], first[1]) == [70, 71]
        assert leave(second[1]) == [80]
        assert vars(in_flight)["_batches"] == {}


@given(slots=st.lists(st.integers(0, 5), max_size=40), seed=st.integers(0, 99), certain=st.booleans())
def test_who_left_is_parted_by_who_brought_them(slots: list[int], seed: int, certain: bool) -> None:
    rng, count = np.random.default_rng(seed), len(slots)
    of = np.array(slots, dtype=np.int64)
    places = rng.permutation(1 << 20)[:count]
    exits = Exits(
        sample_ids=(of << SLOT_BITS) | places,
        exit_layer=3,
        logits=rng.standard_normal((count, 3)).astype(np.float32),
        entropy=rng.random(count).astype(np.float32),
        certainty=rng.random(count).astype(np.float32) if certain else None,
        problem=SINGLE_LABEL,
    )

    parts = list(by_slot(exits))

    assert [slot for slot, _, _ in parts] == sorted(set(slots))
    for slot, found, answers in parts:
        chosen = np.flatnonzero(of == slot)
        assert found.tolist() == places[chosen].tolist()
        for name, column in vars(Answered.of(exits).take(chosen)).items():
            assert column.tobytes() == getattr(answers, name).tobytes(), name


def lanes_for(encoder: PackedEncoder, micro_batch_tokens: int) -> Lanes:
    return Lanes(encoder, EntropyThreshold(THRESHOLD), EngineConfig(micro_batch_tokens=micro_batch_tokens))


def classify(lanes: Lanes, batch: TokenizedBatch, audited: np.ndarray | None = None) -> Submission:
    rows = len(batch.windows)
    submission = lanes.submit(
        batch.tokens, np.zeros(rows, np.bool_) if audited is None else audited, batch.windows
    )
    wait(submission)
    return submission


class TestLanes:
    @settings(max_examples=25)
    @given(
        lengths=st.lists(st.integers(0, 120), min_size=1, max_size=8),
        stride=st.integers(0, 7),
        micro_batch_tokens=st.integers(16, 200),
    )
    def test_give_each_row_the_references_answer(
        self, lengths: list[int], stride: int, micro_batch_tokens: int
    ) -> None:
        model = make_model()
        batch = TextTokenizer(make_tokenizer(), max_length=16, window_stride=stride)(texts_of(lengths))

        found = classify(lanes_for(PackedEncoder.of(model), micro_batch_tokens), batch)

        assert sum(found.samples_left.values()) == len(batch.tokens)
        for i, windows in enumerate(by_text(batch)):
            expected = classify_windows(model, windows, [THRESHOLD] * 4)
            if min(window.margin for window in expected.windows) < TIE:
                continue
            assert found.exit_layer[i] == expected.exit_layer
            np.testing.assert_allclose(found.probabilities[i], expected.probabilities, atol=1e-5)
            assert found.entropy[i] == pytest.approx(expected.entropy, abs=1e-4)
            first, second = sorted(expected.probabilities, reverse=True)[:2]
            assert found.prediction[i] == expected.label or first - second < TIE

    def test_rows_of_one_window_are_answered_as_without_windows(
        self, encoder: PackedEncoder, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        texts = texts_of(range(15))
        plain = TextTokenizer(tokenizer, max_length=16)(texts)
        without = lanes_for(encoder, 64).submit(plain.tokens, np.zeros(15, np.bool_))
        wait(without)

        found = classify(
            lanes_for(encoder, 64), TextTokenizer(tokenizer, max_length=16, window_stride=3)(texts)
        )

        for name in ("prediction", "exit_layer", "entropy", "probabilities"):
            assert getattr(found, name).tobytes() == getattr(without, name).tobytes(), name

    def test_the_control_sample_is_rows_with_all_their_windows(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model, batch = (
            tiny_model(),
            TextTokenizer(tokenizer, max_length=16, window_stride=4)(texts_of([3, 60, 30, 100, 14, 45])),
        )
        lanes, audited = lanes_for(PackedEncoder.of(model), 64), np.array([1, 1, 0, 1, 0, 0], np.bool_)

        found = classify(lanes, batch, audited)

        full_depth = [classify_windows(model, windows, [None] * 4).label for windows in by_text(batch)]
        assert found.audit_prediction[audited].tolist() == np.array(full_depth)[audited].tolist()
        assert found.audited.tolist() == audited.tolist()
        exit_stats, audit_stats = lanes.take_stats()
        assert audit_stats.samples == (int(batch.windows[audited].sum()),) * 5
        assert exit_stats.samples[0] == len(batch.tokens)
        assert sum(layer * n for layer, n in found.samples_left.items()) == sum(exit_stats.samples)

    def test_progress_counts_rows_when_their_last_window_has_left(
        self, encoder: PackedEncoder, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        reported: list[tuple[int, int]] = []
        lanes = Lanes(
            encoder,
            EntropyThreshold(THRESHOLD),
            EngineConfig(micro_batch_tokens=64),
            on_progress=lambda rows, layers: reported.append((rows, layers)),
        )

        found = classify(
            lanes, TextTokenizer(tokenizer, max_length=16, window_stride=4)(texts_of([90, 3, 200]))
        )

        assert sum(rows for rows, _ in reported) == 3
        assert sum(layers for _, layers in reported) == int(found.exit_layer.sum())

    def test_keep_nothing_of_windows_that_have_all_left(
        self, encoder: PackedEncoder, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        batch = TextTokenizer(tokenizer, max_length=16, window_stride=4)(texts_of([60, 3]))

        found = classify(lanes_for(encoder, 64), batch, np.array([True, False]))

        assert not [name for name, value in vars(found).items() if isinstance(value, WindowedTexts)]


def test_a_very_long_text_stays_within_the_engines_buffers(
    encoder: PackedEncoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Thousands of windows of one text wait for layer 1 as token ids; behind it, no more than ever."""
    batch = TextTokenizer(tokenizer, max_length=16, window_stride=7)([text(20_000)])
    engine = Engine(encoder, EntropyThreshold(THRESHOLD), EngineConfig(micro_batch_tokens=256))
    in_flight = TextsInFlight(SINGLE_LABEL, num_labels=3)

    engine.submit(in_flight.admit(np.array([5]), batch.windows), batch.tokens)
    answered = [name for exits in engine.drain() for names, _ in in_flight.leave(exits) for name in names]

    assert len(batch.tokens) > 2800
    assert answered == [5]
    assert max(tokens for layer, tokens in engine.peak_buffer_tokens.items() if layer > 1) < 2 * 256


def test_a_run_without_windows_has_the_digest_that_it_always_had(saved_model: Path, tmp_path: Path) -> None:
    """So that outputs begun before there were windows are gone on with."""
    pq.write_table(pa.table({"text": ["a good film"]}), tmp_path / "texts.parquet")
    config = ClassifyConfig(
        model=str(saved_model), input=(str(tmp_path / "texts.parquet"),), output=str(tmp_path / "out")
    )

    identity = make_plan(config, has_gpu=False).identity

    named = {k: v for k, v in vars(identity).items() if k not in ("digest", "window_stride")}
    assert identity.digest == hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    digests = {make_plan(replace(config, window_stride=n), has_gpu=False).identity.digest for n in (0, 1, 8)}
    assert len({identity.digest, *digests}) == 4


def test_the_reference_of_one_window_is_the_windows(tiny_model: ModelFactory) -> None:
    model, ids = tiny_model(), [2, 60, 70, 61, 3]

    alone, found = classify_one(model, ids, [THRESHOLD] * 4), classify_windows(model, [ids], [THRESHOLD] * 4)

    assert (found.label, found.exit_layer) == (alone.label, alone.exit_layer)
    assert found.entropy == pytest.approx(alone.entropy, abs=1e-6)
    assert torch.tensor(alone.logits).softmax(-1).tolist() == pytest.approx(found.probabilities)
    assert len(PackedTokens.pack([ids])) == len(found.windows) == 1
