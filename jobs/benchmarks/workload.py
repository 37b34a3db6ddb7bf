"""What a benchmark runs on: a model (trained, or random weights of a known shape) and texts.

Random texts are words of the random model's own tokenizer, with the length distribution of a well-known
corpus; so the pipeline can read and tokenize them like any text. Knows nothing of contenders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, set_seed

from deebert.checkpoint import Checkpoint, load_checkpoint
from deebert.config import DeeBertConfig
from deebert.cost import ModelShape
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import IntArray, PackedTokens
from pipeline.errors import UsageError
from pipeline.input_schema import check_columns
from pipeline.inputs import discover
from pipeline.shards import plan
from pipeline.source import read_shard
from pipeline.tokenization import TextTokenizer

# Layers, width, heads, feed-forward width, vocabulary, positions.
SHAPES = {
    "bert-base": (12, 768, 12, 3072, 30_522, 512),
    "bert-large": (24, 1024, 16, 4096, 30_522, 512),
    "e5-small": (12, 384, 12, 1536, 30_522, 512),
    "tiny": (4, 32, 2, 64, 1_000, 128),
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LABELS = ("negative", "positive")


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """A model, texts, and the texts' tokens."""

    name: str
    """The model's: a shape, or the folder's name."""
    checkpoint: Checkpoint
    texts: tuple[str, ...]
    tokens: PackedTokens
    max_length: int
    """Tokens a text is cut to."""
    has_real_weights: bool
    """Whether labels mean anything."""

    @property
    def shape(self) -> ModelShape:
        """What decides the model's FLOPs."""
        return ModelShape.of(self.checkpoint.config)

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        lengths = self.tokens.layout.lengths
        return {
            "model": self.name,
            "weights": "trained" if self.has_real_weights else "random",
            "layers": self.shape.num_layers,
            "hidden_size": self.shape.hidden_size,
            "intermediate_size": self.shape.intermediate_size,
            "samples": len(self.tokens),
            "tokens": int(lengths.sum()),
            "mean_length": round(float(lengths.mean()), 2),
            "longest": int(lengths.max()),
            "max_length": self.max_length,
        }


def prepare(
    model: str, *, texts: Sequence[str] | None, lengths: str, samples: int, max_length: int | None, seed: int
) -> Workload:
    """Load or make a model and texts.

    Args:
        model: a DeeBERT folder or hub id, or one of `SHAPES`.
        texts: real texts, the first `samples` of which are taken; None for random ones.
        lengths: of random texts: ``short``, ``long`` or a number of tokens.
        samples: how many texts.
        max_length: tokens a text is cut to; None for what the model was trained with.
        seed: of weights and texts.

    Raises:
        CheckpointError: the folder holds no model.
        UsageError: real weights without texts.
    """
    is_shape = model in SHAPES
    if texts is None and not is_shape:
        raise UsageError(f"the model {model!r} has a tokenizer of its own: give it texts with --texts FILE")
    checkpoint = random_checkpoint(model, seed=seed) if is_shape else load_checkpoint(model)
    limit = min(max_length or checkpoint.default_max_length, checkpoint.longest_input)
    chosen = tuple(texts[:samples]) if texts is not None else ()
    if texts is None:
        drawn = draw_lengths(lengths, samples, longest=limit, seed=seed)
        chosen = random_texts(drawn, vocabulary=SHAPES[model][4], seed=seed)
    return Workload(
        name=model if is_shape else Path(model).name,
        checkpoint=checkpoint,
        texts=chosen,
        tokens=TextTokenizer(checkpoint.tokenizer, max_length=limit)(chosen).tokens,
        max_length=limit,
        has_real_weights=not is_shape,
    )


def read_texts(path: str, column: str) -> list[str]:
    """The column's good rows, of a file in any format that `classify` reads."""
    files = discover((path,))
    schema = check_columns(files, (column,), ())
    shards = plan(files, shard_rows=1 << 20)
    return [
        text
        for shard in shards
        for batch in read_shard(
            shard, text_columns=(column,), other_columns=(), schema=schema, batch_rows=65_536
        )
        for text in batch.texts[0].to_pylist()
    ]


def random_checkpoint(name: str, *, seed: int, num_layers: int | None = None) -> Checkpoint:
    """Random weights of a known shape, with a tokenizer whose words are ``w0``, ``w1``, …

    Args:
        name: one of `SHAPES`.
        seed: of the weights.
        num_layers: instead of the shape's own.
    """
    layers, hidden, heads, inner, vocabulary, positions = SHAPES[name]
    set_seed(seed)
    model = DeeBertForSequenceClassification(
        DeeBertConfig(
            backbone_config=BertConfig(
                vocab_size=vocabulary,
                hidden_size=hidden,
                num_hidden_layers=num_layers or layers,
                num_attention_heads=heads,
                intermediate_size=inner,
                max_position_embeddings=positions,
            ),
            id2label=dict(enumerate(_LABELS)),
            label2id={label: i for i, label in enumerate(_LABELS)},
        )
    )
    return Checkpoint.of(name, model.train(False), _word_tokenizer(vocabulary, positions))


def draw_lengths(kind: str, count: int, *, longest: int, seed: int) -> IntArray:
    """Lengths in tokens, special tokens included.

    Args:
        kind: ``short`` (like SST-2's sentences: mean 25), ``long`` (like IMDB's reviews: mean 230, cut at
            512), or a number that all share.
        count: how many.
        longest: where they are cut.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    match kind:
        case "short":
            drawn = rng.gamma(4.6, 25 / 4.6, count)
        case "long":
            drawn = np.minimum(rng.lognormal(np.log(200), 0.6, count), 512)
        case _:
            drawn = np.full(count, int(kind), np.float64)
    return np.clip(np.rint(drawn), 3, longest).astype(np.int64)


def random_texts(lengths: IntArray, *, vocabulary: int, seed: int) -> tuple[str, ...]:
    """Texts that the random model's tokenizer turns into sequences of these lengths."""
    rng = np.random.default_rng(seed + 1)
    words = np.char.add("w", np.arange(vocabulary - len(_SPECIAL)).astype(str))
    drawn = words[rng.integers(0, len(words), int(lengths.sum()) - 2 * len(lengths))]
    ends = np.cumsum(lengths - 2)
    return tuple(" ".join(drawn[end - n : end]) for end, n in zip(ends, lengths - 2, strict=True))


def _word_tokenizer(vocabulary: int, positions: int) -> PreTrainedTokenizerFast:
    ids = {token: i for i, token in enumerate(_SPECIAL)}
    ids |= {f"w{i}": i + len(_SPECIAL) for i in range(vocabulary - len(_SPECIAL))}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=positions,
    )
