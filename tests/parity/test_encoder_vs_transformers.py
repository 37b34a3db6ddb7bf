"""The packed inference form computes what the padded Hugging Face form computes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel

from deebert.backbones import FAMILIES
from deebert.config import POOLINGS, DeeBertConfig
from deebert.encoder import PackedEncoder
from deebert.evaluation import trace
from deebert.fused import Linear
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from pipeline.tokenization import TextTokenizer
from tests.conftest import LONGEST, ModelFactory, randomize

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
ROBERTA_PAD, ROBERTA_MASK = 1, 4


def random_ids(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 97, (n,), generator=generator).tolist() for n in lengths]


def padded(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """(N, L) ids and mask."""
    tensors = [torch.tensor(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True)
    return ids, mask


@torch.no_grad()
def training_form(
    model: DeeBertForSequenceClassification, rows: list[list[int]], types: list[list[int]] | None = None
) -> Tensor:
    """(R, N, C): off-ramps, then the final classifier."""
    ids, mask = padded(rows, model.config.backbone_config.pad_token_id)
    output = model(ids, mask, None if types is None else padded(types, 0)[0])
    ramps = [] if output.off_ramp_logits is None else [output.off_ramp_logits]
    return torch.cat([*ramps, output.logits[None]])


ALL_LENGTHS = list(range(1, LONGEST + 1))


@torch.no_grad()
def assert_states_are_transformers_own(model: DeeBertForSequenceClassification) -> None:
    """Embeddings and every layer, token by token."""
    rows = random_ids([*ALL_LENGTHS, 7, 7])
    tokens = PackedTokens.pack(rows)
    ids, mask = padded(rows, model.config.backbone_config.pad_token_id)
    theirs = model.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    encoder = PackedEncoder.of(model)

    assert len(theirs) == encoder.num_layers + 1
    states = encoder.embed(tokens)
    for layer, expected in enumerate(theirs):
        torch.testing.assert_close(states, expected[mask.bool()], **TOLERANCE)
        if layer < encoder.num_layers:
            states = encoder.layer(layer, states, tokens.layout)


def test_every_layers_states_are_transformers_own(tiny_model: ModelFactory, family: str) -> None:
    assert type(tiny_model(family).backbone) is FAMILIES[family].model
    assert_states_are_transformers_own(tiny_model(family))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("electra", {"embedding_size": 32}),  # as wide as the layers: no projection
        ("bert", {"hidden_act": "relu", "layer_norm_eps": 1e-2}),
        ("distilbert", {"activation": "relu"}),
        ("xlm-roberta", {"pad_token_id": 5, "max_position_embeddings": LONGEST + 6}),
    ],
)
def test_what_a_configuration_may_change(
    tiny_model: ModelFactory, family: str, fields: dict[str, object]
) -> None:
    usual = tiny_model(family).config.backbone_config.to_dict()
    config = AutoConfig.for_model(**{**usual, **fields})
    model = DeeBertForSequenceClassification(DeeBertConfig(backbone_config=config))
    randomize(model, seed=3)

    assert_states_are_transformers_own(model.eval())


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_every_activation_of_the_off_ramps(tiny_model: ModelFactory, activation: str) -> None:
    model = tiny_model(off_ramp_activation=activation)
    rows = random_ids([3, 9, 9, 20])

    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows)).logits

    torch.testing.assert_close(packed, training_form(model, rows), **TOLERANCE)
    others = {"tanh", "relu", "gelu"} - {activation}
    for other in others:
        assert (packed - training_form(tiny_model(off_ramp_activation=other), rows)).abs().max() > 0.01


@pytest.mark.parametrize("layers", [None, [2], [1, 4], []])
def test_every_off_ramp_equals_the_training_forms(
    tiny_model: ModelFactory, family: str, pooling: str, layers: list[int] | None
) -> None:
    model = tiny_model(family, pooling, off_ramp_layers=layers)
    rows = random_ids([*ALL_LENGTHS, 7, 7, 7])

    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows), micro_batch_tokens=512)

    assert packed.layers == (*model.config.off_ramp_layers, 5)
    torch.testing.assert_close(packed.logits, training_form(model, rows), **TOLERANCE)


@pytest.mark.parametrize("shares", [False, True], ids=["own poolers", "shared pooler"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_kind_of_off_ramp_equals_the_training_forms(
    tiny_model: ModelFactory, family: str, pooling: str, shares: bool
) -> None:
    model = tiny_model(family, pooling, off_ramp_layers=[0, 1, 3], shares_off_ramp_pooler=shares)
    rows = random_ids([*ALL_LENGTHS, 7, 7, 7])

    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows), micro_batch_tokens=512)

    assert packed.layers == (0, 1, 3, 5)
    torch.testing.assert_close(packed.logits, training_form(model, rows), **TOLERANCE)


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_pairs_with_token_types_equal_the_training_forms(
    tiny_model: ModelFactory, family: str, pooling: str
) -> None:
    model = tiny_model(family, pooling)
    rows = random_ids([3, 9, 9, 20, 41])
    types = [[0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2) for row in rows]

    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows, types))

    torch.testing.assert_close(packed.logits, training_form(model, rows, types), **TOLERANCE)
    assert (packed.logits - training_form(model, rows)).abs().max() > 0.01  # the segments matter


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "distilbert"])
def test_families_without_segments_take_no_notice_of_token_types(
    tiny_model: ModelFactory, family: str
) -> None:
    model = tiny_model(family)
    rows = random_ids([3, 9, 20])
    types = [[0] * 2 + [1] * (len(row) - 2) for row in rows]

    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows, types))

    assert torch.equal(packed.logits, trace(PackedEncoder.of(model), PackedTokens.pack(rows)).logits)
    torch.testing.assert_close(packed.logits, training_form(model, rows, types), **TOLERANCE)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
def test_robertas_positions_skip_a_literal_pad_token(
    tiny_model: ModelFactory, family: str, pooling: str
) -> None:
    model = tiny_model(family, pooling)
    rows = random_ids([6, 6, 12, 3])
    rows[1][2] = rows[1][3] = rows[2][0] = rows[3][2] = ROBERTA_PAD
    other = [[ROBERTA_MASK if token == ROBERTA_PAD else token for token in row] for row in rows]

    packed = trace(PackedEncoder.of(model), PackedTokens.pack(rows))

    torch.testing.assert_close(packed.logits, training_form(model, rows), **TOLERANCE)
    unlike = trace(PackedEncoder.of(model), PackedTokens.pack(other))
    assert (packed.logits[:, 1:] - unlike.logits[:, 1:]).abs().amax(dim=(0, 2)).min() > 0.01


def test_the_encoder_is_a_copy_that_the_model_cannot_change(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    encoder, tokens = PackedEncoder.of(model), PackedTokens.pack(random_ids([5, 8]))
    before = trace(encoder, tokens).logits

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(trace(encoder, tokens).logits, before)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bfloat16_stays_near_float32_and_answers_in_float32(
    tiny_model: ModelFactory, family: str, pooling: str
) -> None:
    model, tokens = tiny_model(family, pooling), PackedTokens.pack(random_ids(ALL_LENGTHS))

    exact = trace(PackedEncoder.of(model), tokens).logits
    reduced = trace(PackedEncoder.of(model, dtype=torch.bfloat16), tokens).logits

    assert reduced.dtype == torch.float32
    agreement = (exact.argmax(-1) == reduced.argmax(-1)).float().mean()
    assert agreement > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_one_go_are_the_layers_one_by_one(
    tiny_model: ModelFactory, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PackedEncoder.of(tiny_model("bert", "mean"), dtype=dtype)
    multiply, rows = Linear.__call__, set[int]()

    def count_rows(linear: Linear, x: Tensor) -> Tensor:
        rows.add(len(x))
        return multiply(linear, x)

    for count in (130, 131, 132):
        tokens = PackedTokens.pack(random_ids([60, 60, count - 120]))
        states = one_by_one = encoder.embed(tokens)
        for layer in range(1, 4):
            one_by_one = encoder.layer(layer, one_by_one, tokens.layout)
        with monkeypatch.context() as patch:
            patch.setattr(Linear, "__call__", count_rows)
            states = encoder.layers(1, 3, states, tokens.layout)

        assert torch.equal(states, one_by_one)
    # Where oneDNN builds a kernel for each number of rows, there are few.
    assert rows == ({132} if encoder._has_kernels_by_shape else {130, 131, 132})


def real_sentences(assets: Path, count: int) -> list[str]:
    with (assets / "glue" / "SST-2" / "dev.tsv").open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [row["sentence"] for row, _ in zip(rows, range(count), strict=False)]


@pytest.mark.assets
def test_hidden_states_of_a_real_bert_are_transformers_own(assets: Path) -> None:
    folder = str(assets / "e5-small")
    backbone: BertModel = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = PackedEncoder.of(DeeBertForSequenceClassification.from_backbone(folder, labels=["no", "yes"]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = real_sentences(assets, 32)

    tokens = TextTokenizer(tokenizer, max_length=128)(sentences).tokens
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        expected = backbone(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()

    assert tokens.input_ids.tolist() == batch["input_ids"][real].tolist()
    states = encoder.embed(tokens)
    torch.testing.assert_close(states, expected[0][real], **TOLERANCE)
    for layer in range(12):
        states = encoder.layer(layer, states, tokens.layout)
        torch.testing.assert_close(states, expected[layer + 1][real], **TOLERANCE)
