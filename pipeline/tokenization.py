"""Text to packed token ids.

Wraps the Rust backend of a Hugging Face fast tokenizer: a batch of texts in, one `PackedTokens` out, no
padding in between. Knows nothing of files, shards or models beyond whether segments matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerBase

from deebert.errors import CheckpointError
from deebert.packing import PackedTokens, SequenceLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedBatch:
    """Packed tokens of a batch of texts, in input order."""

    tokens: PackedTokens
    truncated: npt.NDArray[np.bool_]
    """(N,) whether the text was cut to the maximal length."""


class TextTokenizer:
    """A tokenizer with its truncation settled; safe to call from several threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, has_token_types: bool = True
    ) -> None:
        """Copy the backend of `tokenizer`; the original keeps its own settings.

        Args:
            tokenizer: a fast tokenizer.
            max_length: tokens a sequence is cut to, special tokens included.
            has_token_types: whether the model tells the segments of a pair apart.

        Raises:
            CheckpointError: the tokenizer has no Rust backend.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise CheckpointError(
                f"the tokenizer {type(tokenizer).__name__} has no fast form: save one as tokenizer.json"
            )
        self._backend = RustTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._truncation_side = tokenizer.truncation_side
        self._backend.enable_truncation(max_length, strategy="longest_first", direction=self._truncation_side)
        self._has_token_types = has_token_types
        self.max_length = max_length

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
        """
        batch = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = self._backend.encode_batch_fast(batch)
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
            truncated=np.fromiter((bool(e.overflowing) for e in encodings), np.bool_, len(encodings)),
        )


def _flat(lists: Iterable[list[int]], total: int) -> torch.Tensor:
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int32, total))
