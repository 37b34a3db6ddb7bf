"""Text to packed token ids.

Wraps the Rust backend of a Hugging Face fast tokenizer: a batch of texts in, one `PackedTokens` out, no
padding in between. A text that is too long is cut, or becomes several sequences: its windows. Knows nothing
of files, shards or models beyond whether segments matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer as RustTokenizer

from deebert.errors import CheckpointError
from deebert.packing import IntArray, PackedTokens, SequenceLayout
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOT_OF_PAIRS = (
    "--window-stride cuts one long text into windows, which is not defined for pairs: "
    "leave it out, or classify one text column"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedBatch:
    """Packed tokens of a batch of N texts, in input order."""

    tokens: PackedTokens
    """One sequence per window, text by text."""
    windows: IntArray
    """(N,) windows of each text: all 1 where texts are cut instead."""
    truncated: npt.NDArray[np.bool_]
    """(N,) whether the text was cut to the maximal length."""


class TextTokenizer:
    """A tokenizer with its truncation settled; safe to call from several threads, and to send to other processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        has_token_types: bool = True,
        window_stride: int | None = None,
    ) -> None:
        """Copy the backend of `tokenizer`; the original keeps its own settings.

        Args:
            tokenizer: a fast tokenizer.
            max_length: tokens a sequence is cut to, special tokens included.
            has_token_types: whether the model tells the segments of a pair apart.
            window_stride: a longer text becomes windows of at most `max_length` tokens, special tokens in
                each, and neighbours share so many tokens of the text; None cuts it.

        Raises:
            CheckpointError: the tokenizer has no Rust backend, or turns an empty text into no tokens.
            UsageError: no room beside the special tokens, or windows that would share more than half of their tokens.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(
                f"the tokenizer {type(tokenizer).__name__} has no fast form: save one as tokenizer.json"
            )
        self._backend = RustTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        if not len(self._backend.encode("")):
            raise CheckpointError(
                f"the tokenizer {type(tokenizer).__name__} adds no special tokens, so that an empty text has no token "
                "to read an answer from: save one with a post-processor ([CLS] … [SEP])"
            )
        self._truncation_side = tokenizer.truncation_side
        check_windows(tokenizer, max_length=max_length, window_stride=window_stride, of_pairs=False)
        # The backend cuts nothing where the special tokens alone are too many.
        least = tokenizer.num_special_tokens_to_add(pair=True)
        if max_length < least:
            raise UsageError(
                f"--max-length {max_length} is less than the {least} special tokens of a pair of texts: give more"
            )
        self._backend.enable_truncation(
            max_length,
            stride=window_stride or 0,
            strategy="longest_first",
            direction=self._truncation_side,
        )
        self._has_token_types = has_token_types
        self.max_length = max_length
        self.window_stride = window_stride

    def digest(self) -> str:
        """SHA-256 of everything that decides the token ids, the maximal length aside."""
        backend = RustTokenizer.from_str(self._backend.to_str())
        backend.no_truncation()
        return hashlib.sha256(f"{self._truncation_side}\n{backend.to_str()}".encode()).hexdigest()

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenizedBatch:
        """Tokenize texts, or pairs of texts.

        Args:
            texts: N strings.
            pairs: N second segments, or None.

        Raises:
            UsageError: pairs, to be cut into windows.
        """
        if pairs is not None and self.window_stride is not None:
            raise UsageError(_NOT_OF_PAIRS)
        batch = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self._backend.encode_batch_fast(batch)
        windows, truncated = np.ones(len(batch), np.int64), np.zeros(len(batch), np.bool_)
        if self.window_stride is None:
            truncated = np.fromiter((bool(e.overflowing) for e in encodings), np.bool_, len(batch))
        else:
            texts_windows = [(e, *e.overflowing) for e in encodings]
            windows = np.fromiter(map(len, texts_windows), np.int64, len(batch))
            encodings = list(chain.from_iterable(texts_windows))
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        # A single segment is all zeros, which the encoder knows without being told.
        types = None
        if pairs is not None and self._has_token_types:
            types = _flat((e.type_ids for e in encodings), total)
        return TokenizedBatch(
            tokens=PackedTokens(
                input_ids=_flat((e.ids for e in encodings), total),
                token_type_ids=types,
                layout=SequenceLayout.of(lengths),
            ),
            windows=windows,
            truncated=truncated,
        )


def check_windows(
    tokenizer: PreTrainedTokenizerBase, *, max_length: int, window_stride: int | None, of_pairs: bool
) -> None:
    """Refuse windows that cannot be meant; None is always fine.

    Raises:
        UsageError: windows of pairs, without room for text, or that share more than half of it.
    """
    if window_stride is None:
        return
    if of_pairs:
        raise UsageError(_NOT_OF_PAIRS)
    special_tokens = tokenizer.num_special_tokens_to_add(pair=False)
    # At most half: each token of a text is in at most two windows, so that windows take at most twice the
    # memory and the time of the text, however long it is.
    most = (max_length - special_tokens) // 2
    if most < 1:
        raise UsageError(
            f"--max-length {max_length} leaves windows no room for text beside {special_tokens} special tokens: "
            "give more"
        )
    if not 0 <= window_stride <= most:
        raise UsageError(
            f"--window-stride {window_stride} is not between 0 and {most}, half of what a window of --max-length "
            f"{max_length} holds: give at most that"
        )


def _flat(lists: Iterable[list[int]], total: int) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int32, total))
