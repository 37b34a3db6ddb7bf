"""One truth: the engine's label and exit layer are the reference's, for every sample, however it runs.

Excepted are ties: samples that met an entropy within `TIE` of the threshold on their way, which float32
cannot decide. They are counted, and there must be hardly any.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from deebert.backbones import FAMILIES as BACKBONES
from deebert.config import POOLINGS
from deebert.encoder import PackedEncoder
from deebert.evaluation import trace
from deebert.exit_policy import EntropyThreshold, entropy
from deebert.modeling import DeeBertForSequenceClassification
from deebert.packing import PackedTokens
from deebert.reference import ReferenceResult, classify_one
from pipeline.engine import Engine, EngineConfig
from pipeline.tokenization import TextTokenizer
from tests.conftest import LONGEST, make_model

TIE = 1e-5
LOGITS_TOLERANCE = 1e-4
MOST_TIES = 0.005
DEPTH = 5

Thresholds = float | None | tuple[float | None, ...]
POLICIES: dict[str, Thresholds] = {
    "one": 0.45,
    "tight": 0.15,
    "per layer": (0.3, None, 0.5, 0.7),
    "last off-ramp only": (None, -1.0, 0.0, 0.8),
    "never": None,
    "all at once": 1.0986,
}
FAMILIES = [(family, pooling) for family in ("bert", "roberta") for pooling in ("cls", "mean")]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine said of one sample."""

    label: int
    exit_layer: int
    logits: tuple[float, ...]


def random_texts(seed: int = 0, each: int = 2) -> PackedTokens:
    """`each` texts of every length, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(1, LONGEST + 1).repeat(each)[torch.randperm(LONGEST * each, generator=generator)]
    return PackedTokens.pack(
        [torch.randint(5, 97, (n,), generator=generator).tolist() for n in lengths.tolist()]
    )


TEXTS = random_texts()


def per_layer(thresholds: Thresholds, num_layers: int) -> Sequence[float | None]:
    return thresholds if isinstance(thresholds, tuple) else (thresholds,) * (num_layers - 1)


def reference(
    model: DeeBertForSequenceClassification, tokens: PackedTokens, thresholds: Thresholds
) -> list[ReferenceResult]:
    values = per_layer(thresholds, model.config.num_hidden_layers)
    layer_0 = None if isinstance(thresholds, tuple) else thresholds
    singles = [tokens.sequence(i) for i in range(len(tokens))]
    return [
        classify_one(
            model,
            one.input_ids.tolist(),
            values,
            None if one.token_type_ids is None else one.token_type_ids.tolist(),
            layer_0=layer_0,
        )
        for one in singles
    ]


@functools.cache
def tiny(family: str, pooling: str) -> DeeBertForSequenceClassification:
    return make_model(family, pooling)


@functools.cache
def tiny_reference(family: str, pooling: str, policy: str) -> list[ReferenceResult]:
    return reference(tiny(family, pooling), TEXTS, POLICIES[policy])


def pieces(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def run_engine(
    model: DeeBertForSequenceClassification,
    tokens: PackedTokens,
    thresholds: Thresholds,
    *,
    micro_batch_tokens: int = 256,
    order: np.ndarray | None = None,
    piece: int = 10**6,
    steps_between: int = 0,
    drain_between: bool = False,
) -> list[Answer]:
    """Answers in the order of `tokens`, whatever the order in which they arrive and leave."""
    config = EngineConfig(micro_batch_tokens=micro_batch_tokens)
    engine = Engine(PackedEncoder.of(model), EntropyThreshold(thresholds), config)
    answers: dict[int, Answer] = {}
    for chosen in pieces(np.arange(len(tokens)) if order is None else order, piece):
        engine.submit(chosen, tokens.take(chosen))
        for _ in range(steps_between):
            _note(engine.step(drain=drain_between), answers)
    for exits in engine.drain():
        _note(exits, answers)
    assert sorted(answers) == list(range(len(tokens)))
    return [answers[i] for i in range(len(tokens))]


def _note(exits: object, answers: dict[int, Answer]) -> None:
    if exits is None:
        return
    for sample, logits in zip(exits.sample_ids.tolist(), exits.logits, strict=True):  # type: ignore[attr-defined]
        assert sample not in answers
        answers[sample] = Answer(
            label=int(logits.argmax()),
            exit_layer=exits.exit_layer,  # type: ignore[attr-defined]
            logits=tuple(logits.tolist()),
        )


def assert_one_truth(answers: list[Answer], expected: list[ReferenceResult]) -> None:
    sure = [i for i, e in enumerate(expected) if e.margin >= TIE]
    assert len(expected) - len(sure) <= MOST_TIES * len(expected)
    ours = [(answers[i].label, answers[i].exit_layer) for i in sure]
    assert ours == [(expected[i].label, expected[i].exit_layer) for i in sure]
    np.testing.assert_allclose(
        [answers[i].logits for i in sure], [expected[i].logits for i in sure], atol=LOGITS_TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("family", "pooling"), FAMILIES)
class TestTinyModels:
    def test_whatever_the_micro_batch(self, family: str, pooling: str, policy: str) -> None:
        expected = tiny_reference(family, pooling, policy)

        for budget in (LONGEST, 100, 333, 10**5):
            answers = run_engine(tiny(family, pooling), TEXTS, POLICIES[policy], micro_batch_tokens=budget)
            assert_one_truth(answers, expected)

    def test_whatever_the_order_of_arrival(self, family: str, pooling: str, policy: str) -> None:
        expected = tiny_reference(family, pooling, policy)
        lengths = TEXTS.layout.lengths

        for order in (
            np.argsort(lengths),
            np.argsort(-lengths),
            np.random.default_rng(1).permutation(len(TEXTS)),
        ):
            assert_one_truth(
                run_engine(tiny(family, pooling), TEXTS, POLICIES[policy], order=order), expected
            )

    @pytest.mark.parametrize(
        ("piece", "steps", "drain"), [(1, 1, False), (5, 1, True), (7, 2, False), (30, 3, True)]
    )
    def test_whatever_runs_between_submissions(
        self, family: str, pooling: str, policy: str, piece: int, steps: int, drain: bool
    ) -> None:
        answers = run_engine(
            tiny(family, pooling),
            TEXTS,
            POLICIES[policy],
            piece=piece,
            steps_between=steps,
            drain_between=drain,
        )

        assert_one_truth(answers, tiny_reference(family, pooling, policy))


class TestThatTheCasesSayAnything:
    @pytest.mark.parametrize(("family", "pooling"), FAMILIES)
    def test_policies_spread_samples_over_layers(self, family: str, pooling: str) -> None:
        layers = {p: {r.exit_layer for r in tiny_reference(family, pooling, p)} for p in POLICIES}

        assert len(layers["one"]) >= 3
        assert len(layers["per layer"]) >= 3
        assert 2 not in layers["per layer"]
        assert layers["last off-ramp only"] == {4, DEPTH}
        assert layers["never"] == {DEPTH}
        assert layers["all at once"] == {1}

    def test_together_they_use_every_layer_and_label(self) -> None:
        results = [r for f in FAMILIES for p in POLICIES for r in tiny_reference(*f, p)]

        assert {r.exit_layer for r in results} == {1, 2, 3, 4, 5}
        assert {r.label for r in results} == {0, 1, 2}


@pytest.mark.parametrize("layers", [[1], [4], [2, 3], [1, 4], [], [0], [0, 1], [0, 2, 3]])
@pytest.mark.parametrize(("family", "pooling"), FAMILIES)
def test_models_with_off_ramps_at_some_layers(family: str, pooling: str, layers: list[int]) -> None:
    model = make_model(family, pooling, off_ramp_layers=layers)
    expected = reference(model, TEXTS, 0.5)

    answers = run_engine(model, TEXTS, 0.5, micro_batch_tokens=150, piece=9, steps_between=1)

    assert {a.exit_layer for a in answers} <= {*layers, DEPTH}
    assert_one_truth(answers, expected)


@pytest.mark.parametrize("shares", [False, True], ids=["own poolers", "shared pooler"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_every_kind_of_off_ramp(family: str, pooling: str, shares: bool) -> None:
    layers = [0, 1, 2, 3, 4]
    model = make_model(family, pooling, off_ramp_layers=layers, shares_off_ramp_pooler=shares)
    expected = reference(model, TEXTS, 0.45)

    answers = run_engine(model, TEXTS, 0.45, micro_batch_tokens=150, piece=9, steps_between=1)

    found = {e.exit_layer for e in expected}
    assert 0 in found
    assert len(found) >= 4
    assert_one_truth(answers, expected)


@pytest.mark.parametrize("layer_0", [None, 0.2, 0.6])
def test_the_embeddings_have_a_threshold_of_their_own(layer_0: float | None) -> None:
    model = make_model("bert", "mean", off_ramp_layers=[0, 1, 3])
    values = (0.3, 0.3, 0.5, 0.5)
    policy = EntropyThreshold(values, layer_0)
    engine = Engine(PackedEncoder.of(model), policy, EngineConfig(micro_batch_tokens=150))
    engine.submit(np.arange(len(TEXTS)), TEXTS)
    answers: dict[int, Answer] = {}

    for exits in engine.drain():
        _note(exits, answers)

    expected = [
        classify_one(model, TEXTS.sequence(i).input_ids.tolist(), values, layer_0=layer_0)
        for i in range(len(TEXTS))
    ]
    assert (0 in {e.exit_layer for e in expected}) == (layer_0 is not None)
    assert_one_truth([answers[i] for i in range(len(TEXTS))], expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", sorted(set(BACKBONES) - {family for family, _ in FAMILIES}))
def test_the_other_families(family: str, pooling: str) -> None:
    expected = reference(tiny(family, pooling), TEXTS, 0.45)

    answers = run_engine(tiny(family, pooling), TEXTS, 0.45, micro_batch_tokens=150, piece=9, steps_between=1)

    assert len({e.exit_layer for e in expected}) >= 3
    assert_one_truth(answers, expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pairs_with_token_types(pooling: str) -> None:
    generator = torch.Generator().manual_seed(5)
    singles = [TEXTS.sequence(i).input_ids.tolist() for i in range(len(TEXTS))]
    split = [int(torch.randint(0, len(ids) + 1, (1,), generator=generator)) for ids in singles]
    types = [[0] * at + [1] * (len(ids) - at) for ids, at in zip(singles, split, strict=True)]
    pairs = PackedTokens.pack(singles, types)
    model = tiny("bert", pooling)

    answers = run_engine(model, pairs, 0.45, micro_batch_tokens=150, piece=9, steps_between=1)

    assert_one_truth(answers, reference(model, pairs, 0.45))
    apart = [a.logits != b.logits for a, b in zip(answers, run_engine(model, TEXTS, 0.45), strict=True)]
    assert sum(apart) > len(pairs) / 2  # the segments matter


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_robertas_literal_pad_tokens(pooling: str) -> None:
    model = tiny("roberta", pooling)
    generator = torch.Generator().manual_seed(6)
    ids = torch.where(torch.rand(TEXTS.input_ids.shape, generator=generator) < 0.1, 1, TEXTS.input_ids)
    tokens = PackedTokens(input_ids=ids.int(), token_type_ids=None, layout=TEXTS.layout)

    answers = run_engine(model, tokens, 0.45, micro_batch_tokens=150)

    assert int((ids == model.config.backbone_config.pad_token_id).sum()) > 100
    assert_one_truth(answers, reference(model, tokens, 0.45))


def give_random_off_ramps(model: DeeBertForSequenceClassification, tokens: PackedTokens, seed: int) -> None:
    """Random off-ramps whose logits have mean 0 over `tokens` and a spread of 2, where a gain of 8 allows.

    The [CLS] states of shallow layers hardly differ; more gain would only amplify rounding.
    """
    ramps = (*model.off_ramps, model.final_classifier)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for ramp in ramps:
            for weight in (ramp.dense.weight, ramp.classifier.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        for ramp, logits in zip(ramps, trace(PackedEncoder.of(model), tokens).logits, strict=True):
            gain = (2 / logits.std(dim=0)).clamp(max=8)
            ramp.classifier.weight.mul_(gain[:, None])
            ramp.classifier.bias.sub_(logits.mean(dim=0)).mul_(gain)


@pytest.mark.assets
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_real_bert_on_real_sentences(assets: Path, pooling: str) -> None:
    folder = str(assets / "e5-small")
    with (assets / "glue" / "SST-2" / "dev.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:100]
    tokenizer = TextTokenizer(AutoTokenizer.from_pretrained(folder), max_length=128)
    tokens = tokenizer([row["sentence"] for row in rows]).tokens
    model = DeeBertForSequenceClassification.from_backbone(
        folder, labels=["negative", "positive"], off_ramp_pooling=pooling
    ).eval()
    give_random_off_ramps(model, tokens, seed=7)
    surest = entropy(trace(PackedEncoder.of(model), tokens).logits).quantile(0.15, dim=1)
    thresholds = tuple(surest.tolist()[:-1])  # at each off-ramp about 15 of the 100 are sure enough

    answers = run_engine(model, tokens, thresholds, micro_batch_tokens=512, piece=17, steps_between=1)

    assert len({a.exit_layer for a in answers}) >= 8
    assert_one_truth(answers, reference(model, tokens, thresholds))
