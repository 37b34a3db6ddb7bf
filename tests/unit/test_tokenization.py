"""Packed token ids are the Hugging Face tokenizer's, and truncation is told exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

from deebert.errors import CheckpointError
from deebert.packing import PackedTokens
from pipeline.tokenization import TextTokenizer

TEXTS = [
    "the film was good",
    "",
    "A very dull story, and it is not great.",
    "   ",
    "Ünïcode, emoji 🙂 and 漢字!",
    "the [SEP] in a text",
    "line\nbreak\tand\ttabs",
]


def rows(packed: PackedTokens) -> list[list[int]]:
    return [packed.sequence(i).input_ids.tolist() for i in range(len(packed))]


def type_rows(packed: PackedTokens) -> list[list[int]]:
    assert packed.token_type_ids is not None
    return [packed.sequence(i).token_type_ids.tolist() for i in range(len(packed))]  # type: ignore[union-attr]


def words(count: int) -> str:
    return " ".join(["film"] * count)


@pytest.mark.parametrize("max_length", [64, 8, 3])
def test_ids_of_single_texts_are_the_hugging_face_tokenizers(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    batch = TextTokenizer(tokenizer, max_length=max_length)(TEXTS)

    assert rows(batch.tokens) == tokenizer(TEXTS, truncation=True, max_length=max_length).input_ids
    assert batch.tokens.token_type_ids is None


@pytest.mark.parametrize("max_length", [64, 8, 5])
def test_ids_and_types_of_pairs_are_the_hugging_face_tokenizers(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    seconds = TEXTS[::-1]

    batch = TextTokenizer(tokenizer, max_length=max_length)(TEXTS, seconds)

    expected = tokenizer(
        TEXTS, seconds, truncation="longest_first", max_length=max_length, return_token_type_ids=True
    )
    assert rows(batch.tokens) == expected.input_ids
    assert type_rows(batch.tokens) == expected.token_type_ids
    assert 1 in type_rows(batch.tokens)[0]


def test_a_model_without_segments_gets_no_token_types(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = TextTokenizer(tokenizer, max_length=64, has_token_types=False)(["a film"], ["a story"])

    assert batch.tokens.token_type_ids is None


def test_truncation_is_flagged_from_one_token_too_many_on(tokenizer: PreTrainedTokenizerFast) -> None:
    # Two special tokens: 8 words are 10 tokens.
    batch = TextTokenizer(tokenizer, max_length=10)([words(7), words(8), words(9), words(100)])

    assert batch.tokens.layout.lengths.tolist() == [9, 10, 10, 10]
    assert batch.truncated.tolist() == [False, False, True, True]


def test_truncation_of_pairs_counts_both_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    # Three special tokens: 3 + 4 words are 10 tokens.
    batch = TextTokenizer(tokenizer, max_length=10)(
        [words(3), words(4), words(1)], [words(4), words(4), words(9)]
    )

    assert batch.tokens.layout.lengths.tolist() == [10, 10, 10]
    assert batch.truncated.tolist() == [False, True, True]


def test_an_empty_text_is_its_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = TextTokenizer(tokenizer, max_length=64)([""])

    assert rows(batch.tokens) == [[tokenizer.cls_token_id, tokenizer.sep_token_id]]
    assert batch.truncated.tolist() == [False]


@pytest.mark.parametrize("window_stride", [None, 2])
def test_a_tokenizer_that_gives_an_empty_text_no_tokens_is_refused(
    tokenizer: PreTrainedTokenizerFast, window_stride: int | None
) -> None:
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    without = Tokenizer.from_str(json.dumps(saved | {"post_processor": None}))

    with pytest.raises(CheckpointError, match=r"adds no special tokens, .*: save one with a post-processor"):
        TextTokenizer(
            PreTrainedTokenizerFast(tokenizer_object=without), max_length=16, window_stride=window_stride
        )


def test_no_texts_give_no_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = TextTokenizer(tokenizer, max_length=64)([])

    assert len(batch.tokens) == 0
    assert batch.truncated.tolist() == []


def test_texts_and_pairs_must_be_as_many(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="shorter"):
        TextTokenizer(tokenizer, max_length=64)(["a", "b"], ["a"])


def test_the_original_keeps_its_own_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    text = words(30)
    before = tokenizer(text).input_ids

    TextTokenizer(tokenizer, max_length=5)([text])

    assert tokenizer(text).input_ids == before
    assert len(before) == 32


def test_padding_that_the_original_was_saved_with_is_not_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer(["a", "a film"], padding="max_length", max_length=20)  # leaves its padding in the backend

    batch = TextTokenizer(tokenizer, max_length=64)(["a", "a film"])

    assert batch.tokens.layout.lengths.tolist() == [3, 4]


def test_a_tokenizer_that_truncates_on_the_left_still_does(tokenizer: PreTrainedTokenizerFast) -> None:
    left = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, truncation_side="left", pad_token="[PAD]"
    )

    batch = TextTokenizer(left, max_length=4)(["the film was good"])

    assert rows(batch.tokens) == left(["the film was good"], truncation=True, max_length=4).input_ids


def test_the_digest_ignores_truncation_and_sees_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    other.add_tokens(["cinema"])

    digest = TextTokenizer(tokenizer, max_length=64).digest()

    assert TextTokenizer(tokenizer, max_length=8).digest() == digest
    assert TextTokenizer(other, max_length=64).digest() != digest


def test_who_was_asked_for_the_digest_cuts_as_before(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = TextTokenizer(tokenizer, max_length=8)
    asked.digest()

    batch = asked([words(30)])

    assert batch.tokens.layout.lengths.tolist() == [8]
    assert batch.truncated.tolist() == [True]


def test_the_digest_sees_the_side_that_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    left, right = (
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, truncation_side=side)
        for side in ("left", "right")
    )

    assert TextTokenizer(left, max_length=8).digest() != TextTokenizer(right, max_length=8).digest()


def test_threads_share_one_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = TextTokenizer(tokenizer, max_length=16)
    batches: list[Sequence[str]] = [[words(i % 20), TEXTS[i % len(TEXTS)]] for i in range(200)]

    with ThreadPoolExecutor(4) as threads:
        answers = [rows(batch.tokens) for batch in threads.map(shared, batches)]

    assert answers == [tokenizer(list(b), truncation=True, max_length=16).input_ids for b in batches]


def test_a_tokenizer_without_a_rust_backend_is_refused() -> None:
    class Slow(PythonBackend):
        @property
        def vocab_size(self) -> int:
            return 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(
        CheckpointError, match=r"the tokenizer Slow has no fast form: save one as tokenizer\.json"
    ):
        TextTokenizer(Slow(), max_length=8)
