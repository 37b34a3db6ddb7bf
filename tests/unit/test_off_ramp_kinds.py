"""Kinds of off-ramps: what they read, whether they share a pooler, and one on the embeddings."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from deebert.backbones import FAMILIES
from deebert.checkpoint import Checkpoint, load_checkpoint, weights_digest
from deebert.config import POOLINGS, DeeBertConfig
from deebert.encoder import PackedEncoder
from deebert.errors import PolicyError, RecipeError
from deebert.evaluation import LabelledSequences
from deebert.exit_policy import EntropyThreshold
from deebert.modeling import DeeBertForSequenceClassification, pool
from deebert.pooling import mean_of_tokens
from deebert.reference import classify_one
from deebert.training import (
    BEST,
    LOG_NAME,
    EarlyStopping,
    Joint,
    OffRampStage,
    Recipe,
    read_log,
    train,
)
from deebert.training.data import hold_out
from deebert.training.frozen import collect_answers
from deebert.training.losses import off_ramp_weights
from pipeline.planning import resolve_policy
from pipeline.stream import StreamConfig, stream
from tests.conftest import LONGEST, ModelFactory, make_backbone_config, randomize
from tests.training_toy import QUICK_1, QUICK_2, accuracies, changed, padded, toy, weights, without_dropout

IDS = torch.tensor([[2, 40, 50, 60, 3], [2, 41, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
KINDS = [(pooling, shares) for pooling in POOLINGS for shares in (False, True)]
FAST = Recipe(stage_1=None, stage_2=QUICK_2, micro_batch_tokens=512)
EXACT = replace(FAST, stage_2=replace(QUICK_2, mode="exact"))
LAYERS = [0, 1, 2]


def off_ramp_weights_of(model: DeeBertForSequenceClassification) -> set[str]:
    return {name for name in model.state_dict() if name.startswith(("off_ramps.", "off_ramp_pooler."))}


class TestConfig:
    def test_layer_0_is_the_embeddings_and_not_among_the_defaults(self) -> None:
        backbone = make_backbone_config("bert", num_layers=3)

        assert DeeBertConfig(backbone_config=backbone).off_ramp_layers == [1, 2]
        assert DeeBertConfig(backbone_config=backbone, off_ramp_layers=[0, 2]).off_ramp_layers == [0, 2]

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_json_round_trip_keeps_the_kind(self, pooling: Any) -> None:
        config = DeeBertConfig(
            backbone_config=make_backbone_config("bert", num_layers=3),
            off_ramp_layers=[0],
            off_ramp_pooling=pooling,
            shares_off_ramp_pooler=True,
        )

        again = DeeBertConfig(**config.to_dict())

        assert (again.off_ramp_layers, again.off_ramp_pooling, again.shares_off_ramp_pooler) == (
            [0],
            pooling,
            True,
        )
        assert again.pooled_size == (64 if pooling == "both" else 32)


class TestPooling:
    HIDDEN = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [500.0, 500.0]], [[4.0, 4.0], [5.0, 5.0], [6.0, 6.0]]])
    REAL = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def test_both_is_the_first_token_and_the_mean(self) -> None:
        assert pool(self.HIDDEN, self.REAL, "both").tolist() == [
            [1.0, 10.0, 2.0, 20.0],
            [4.0, 4.0, 5.0, 5.0],
        ]

    def test_attention_weighs_real_tokens_by_their_scores(self) -> None:
        query = torch.tensor(
            [torch.tensor(3.0).log() / 2, 0.0]
        )  # the first two differ by 2: ln 3, weights 1:3

        pooled = pool(self.HIDDEN, self.REAL, "attention", query)

        torch.testing.assert_close(pooled[0], torch.tensor([2.5, 25.0]))

    def test_attention_of_a_query_of_zeros_is_the_mean(self) -> None:
        pooled = pool(self.HIDDEN, self.REAL, "attention", torch.zeros(2))

        torch.testing.assert_close(pooled, pool(self.HIDDEN, self.REAL, "mean"))


@pytest.mark.parametrize(("pooling", "shares"), KINDS)
class TestModel:
    def test_loads_with_equal_weights_and_answers(
        self, tmp_path: Path, tiny_model: ModelFactory, tokenizer: Any, pooling: str, shares: bool
    ) -> None:
        model = tiny_model("bert", pooling, off_ramp_layers=[0, 2], shares_off_ramp_pooler=shares)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)

        again = load_checkpoint(str(tmp_path)).model

        assert not changed(weights(model), again)
        assert torch.equal(model(IDS, MASK).off_ramp_logits, again(IDS, MASK).off_ramp_logits)
        assert weights_digest(model) == weights_digest(again)
        stored = load_file(tmp_path / "model.safetensors")
        poolers = {name for name in stored if "off_ramp" in name and "classifier" not in name}
        queries = {"off_ramps.0.query", "off_ramps.1.query"} if pooling == "attention" else set()
        own = {f"off_ramps.{i}.dense.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
        assert poolers == queries | ({"off_ramp_pooler.weight", "off_ramp_pooler.bias"} if shares else own)

    def test_padding_changes_no_answer(self, tiny_model: ModelFactory, pooling: str, shares: bool) -> None:
        model = tiny_model("bert", pooling, off_ramp_layers=[0, 2], shares_off_ramp_pooler=shares)

        together, alone = model(IDS, MASK), model(IDS[1:, :3])

        torch.testing.assert_close(
            together.off_ramp_logits[:, 1], alone.off_ramp_logits[:, 0], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(together.logits[1], alone.logits[0], atol=1e-5, rtol=0)

    def test_every_weight_of_an_off_ramp_feels_its_loss(
        self, tiny_model: ModelFactory, pooling: str, shares: bool
    ) -> None:
        model = tiny_model("bert", pooling, off_ramp_layers=[0, 2], shares_off_ramp_pooler=shares)

        model(IDS, MASK).off_ramp_logits.square().sum().backward()

        felt = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert felt >= off_ramp_weights_of(model)
        assert not any(name.startswith("final_classifier") for name in felt)

    def test_starts_from_the_pretrained_pooler(self, tmp_path: Path, pooling: Any, shares: bool) -> None:
        backbone: Any = FAMILIES["bert"].model(make_backbone_config("bert", num_layers=3))
        randomize(backbone, seed=3)
        backbone.save_pretrained(tmp_path)
        like: Any = {"both": "cls", "attention": "mean"}.get(pooling, pooling)
        model, plain = (
            DeeBertForSequenceClassification.from_backbone(
                str(tmp_path), labels=["no", "yes"], off_ramp_pooling=p, off_ramp_layers=LAYERS, **options
            ).eval()
            for p, options in ((pooling, {"shares_off_ramp_pooler": shares}), (like, {}))
        )
        with torch.no_grad():
            for mine, theirs in zip(
                (*model.off_ramps, model.final_classifier),
                (*plain.off_ramps, plain.final_classifier),
                strict=True,
            ):
                mine.classifier.load_state_dict(theirs.classifier.state_dict())
            said, expected = (m(IDS, MASK) for m in (model, plain))

        torch.testing.assert_close(said.off_ramp_logits, expected.off_ramp_logits, atol=1e-6, rtol=0)
        torch.testing.assert_close(said.logits, expected.logits, atol=1e-6, rtol=0)


def test_a_shared_pooler_is_another_model(tiny_model: ModelFactory) -> None:
    digests = {weights_digest(tiny_model(shares_off_ramp_pooler=shares)) for shares in (False, True)}

    assert len(digests) == 2


def test_without_off_ramps_there_is_no_pooler_to_share(tiny_model: ModelFactory) -> None:
    assert tiny_model(off_ramp_layers=[], shares_off_ramp_pooler=True).off_ramp_pooler is None


def run(
    model: DeeBertForSequenceClassification,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    work_dir: Path,
    data: LabelledSequences | None = None,
) -> None:
    train(model, tokenizer, toy(48, seed=0) if data is None else data, recipe, work_dir, show_progress=False)


class TestStage2:
    @pytest.mark.parametrize(
        ("recipe", "pooling", "shares"),
        [
            *((FAST, pooling, shares) for pooling, shares in KINDS if pooling != "attention"),
            *((EXACT, pooling, shares) for pooling, shares in KINDS),
        ],
    )
    def test_changes_all_of_the_off_ramps_and_nothing_else(
        self,
        recipe: Recipe,
        pooling: str,
        shares: bool,
        tiny_model: ModelFactory,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        model = tiny_model(
            "bert", pooling, num_layers=3, off_ramp_layers=LAYERS, shares_off_ramp_pooler=shares
        )
        before = weights(model)

        run(model, recipe, tokenizer, tmp_path)

        assert changed(before, model) == off_ramp_weights_of(model)

    @pytest.mark.parametrize(
        ("recipe", "pooling", "shares"),
        [(FAST, "both", False), (FAST, "mean", True), (FAST, "both", True), (EXACT, "attention", True)],
    )
    def test_learns_at_every_layer(
        self,
        recipe: Recipe,
        pooling: str,
        shares: bool,
        tiny_model: ModelFactory,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        model = tiny_model(
            "bert", pooling, num_layers=3, off_ramp_layers=LAYERS, shares_off_ramp_pooler=shares
        )

        run(model, recipe, tokenizer, tmp_path, toy(300, seed=1))

        after = accuracies(model, toy(200, seed=2))
        assert after[0] > 0.95  # which token a text holds can be read off its embeddings
        assert min(after[:-1]) > 0.7  # layers of random weights blur it

    @pytest.mark.parametrize(("pooling", "shares"), [kind for kind in KINDS if kind[0] != "attention"])
    def test_fast_is_exact_where_there_is_no_dropout(
        self,
        pooling: str,
        shares: bool,
        tiny_model: ModelFactory,
        tokenizer: PreTrainedTokenizerFast,
        tmp_path: Path,
    ) -> None:
        # All rows in one batch: six steps of the whole gradient, whatever the order of the rows.
        stage = OffRampStage(epochs=6, batch_size=48, learning_rate=1e-3)
        models = [
            without_dropout(
                tiny_model(
                    "bert", pooling, num_layers=3, off_ramp_layers=LAYERS, shares_off_ramp_pooler=shares
                )
            )
            for _ in range(2)
        ]

        for mode, model in zip(("fast", "exact"), models, strict=True):
            recipe = replace(FAST, stage_2=replace(stage, mode=mode))
            run(model, recipe, tokenizer, tmp_path / mode)

        for (name, fast), exact in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(fast, exact, atol=2e-5, rtol=0, msg=name)

    @pytest.mark.parametrize("recipe", [FAST, replace(FAST, stage_1=QUICK_1)], ids=["alone", "second"])
    def test_attention_that_no_later_stage_trains_is_refused_before_anything_is_trained(
        self, recipe: Recipe, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model("bert", "attention", num_layers=2)
        before = weights(model)

        with pytest.raises(RecipeError) as refused:
            run(model, recipe, tokenizer, tmp_path)

        assert str(refused.value) == (
            "a fast stage 2 trains on cached vectors, so that the queries of attention pooling stay as they are, and "
            "no later stage trains them: train stage 2 exact, or a third stage after it"
        )
        assert not changed(before, model)
        assert not any(tmp_path.iterdir())

    def test_a_fast_stage_2_before_a_third_reads_with_the_queries_that_there_are(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        stage = OffRampStage(epochs=1, batch_size=8, learning_rate=5e-4)
        models = [tiny_model("bert", "attention", num_layers=2).train(False) for _ in range(2)]
        for model in models:
            with torch.no_grad():
                model.off_ramps[0].query.copy_(torch.linspace(-1, 1, 32))

        train_third = Recipe(
            stage_1=None, stage_2=stage, stage_3=replace(BEST.stage_3, epochs=0.5, batch_size=8)
        )
        run(models[0], train_third, tokenizer, tmp_path / "both")
        assert models[0].off_ramps[0].query.ne(torch.linspace(-1, 1, 32)).any()

        alone = collect_answers(
            models[1], toy(8, seed=0), torch.float32, 512, layers=[1], final=False, show_progress=False
        )
        encoder, tokens = PackedEncoder.of(models[1]), toy(8, seed=0).tokens
        after = encoder.layer(0, encoder.embed(tokens), tokens.layout)
        torch.testing.assert_close(
            alone.states[0], encoder.pooled(0, after, tokens.layout), atol=1e-5, rtol=0
        )
        assert not torch.allclose(alone.states[0], mean_of_tokens(after, tokens.layout), atol=1e-3)

    def test_attention_without_off_ramps_has_nothing_to_cache(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        """A static baseline of such a model."""
        model = tiny_model("bert", "attention", num_layers=2, off_ramp_layers=[])
        before = weights(model)

        run(model, Recipe(stage_1=replace(QUICK_1, epochs=1)), tokenizer, tmp_path)

        assert "final_classifier.query" in changed(before, model)

    def test_with_a_shared_pooler_the_best_weights_are_those_of_one_moment(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=3, off_ramp_layers=LAYERS, shares_off_ramp_pooler=True)
        noise = replace(
            toy(80, seed=1), labels=toy(80, seed=2).labels
        )  # losses fall, then rise, each in its time
        recipe = replace(
            FAST,
            stage_2=replace(QUICK_2, epochs=20),
            early_stopping=EarlyStopping(held_out=0.3, patience=4),
        )

        run(model, recipe, tokenizer, tmp_path, noise)

        judged = [r["held_out_losses"] for r in read_log(tmp_path / LOG_NAME) if "held_out_losses" in r]
        each = [list(map(float, losses.values())) for losses in judged]
        lowest = min(each, key=sum)
        assert len(each) < 20
        assert [min(column) for column in zip(*each, strict=True)] != lowest  # or this would say little
        _, held_out = hold_out(noise, 0.3, recipe.seed)
        with torch.no_grad():
            logits = model(*padded(held_out.tokens)).off_ramp_logits
        assert model.config.problem.losses(logits, held_out.labels).mean(1).tolist() == pytest.approx(
            lowest, abs=1e-4
        )


class TestStage1:
    def test_of_two_stages_leaves_a_shared_pooler_bit_for_bit(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model(num_layers=2, off_ramp_layers=[0, 1], shares_off_ramp_pooler=True)
        before = weights(model)
        recipe = Recipe(stage_1=replace(QUICK_1, epochs=1), stage_2=replace(QUICK_2, learning_rate=1e-30))

        run(model, recipe, tokenizer, tmp_path)

        assert not changed(before, model) & off_ramp_weights_of(model)
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("pooling", ["both", "attention"])
    def test_joint_trains_every_off_ramp_and_their_learning_rate_is_the_shared_poolers_too(
        self, pooling: str, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
    ) -> None:
        model = tiny_model("bert", pooling, num_layers=2, off_ramp_layers=[0, 1], shares_off_ramp_pooler=True)
        before = weights(model)
        objective = Joint(off_ramp_learning_rate=1e-3)
        stage = replace(QUICK_1, objective=objective, epochs=1, learning_rate=1e-5)

        run(model, Recipe(stage_1=stage, stage_2=None), tokenizer, tmp_path, toy(16, seed=0))  # one step

        # Adam's first step is the learning rate, whatever the gradient.
        steps = {n: (v - before[n]).abs().max().item() for n, v in model.state_dict().items()}
        for name in off_ramp_weights_of(model):
            assert steps[name] == pytest.approx(1e-3, rel=2e-2), name
        assert steps["final_classifier.dense.weight"] == pytest.approx(1e-5, rel=0.1)

    def test_the_embeddings_weigh_as_layer_1_in_the_joint_loss(self) -> None:
        assert off_ramp_weights(Joint(), [0, 1, 2], 4) == (0.25, 0.25, 0.5)
        assert off_ramp_weights(Joint(weighting="uniform"), [0, 2], 4) == (1.0, 1.0)


def test_states_of_the_embeddings_are_cached_without_running_a_layer(tiny_model: ModelFactory) -> None:
    model, data = tiny_model("electra", off_ramp_layers=[0]), toy(20, seed=3)

    answers = collect_answers(model, data, torch.float32, 64, layers=[0], final=False, show_progress=False)

    ids, mask = padded(data.tokens)
    with torch.no_grad():
        expected = pool(model.hidden_states(ids, mask, None)[0], mask, "mean")
    torch.testing.assert_close(answers.states[0], expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def on_embeddings(tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast) -> Checkpoint:
    model = tiny_model("bert", "both", off_ramp_layers=[0, 1, 3], shares_off_ramp_pooler=True)
    return Checkpoint.of("m", model, tokenizer)


class TestPolicyOfARun:
    def test_one_threshold_more_in_front_is_for_the_embeddings(self, on_embeddings: Checkpoint) -> None:
        found = resolve_policy((0.05, 0.1, None, 0.3, 0.4), None, on_embeddings)

        assert found == EntropyThreshold((0.1, None, 0.3, 0.4), layer_0=0.05)

    def test_as_many_as_layers_before_the_last_leave_the_embeddings_out(
        self, on_embeddings: Checkpoint
    ) -> None:
        found = resolve_policy((0.1, 0.2, 0.3, 0.4), None, on_embeddings)

        assert found == EntropyThreshold((0.1, 0.2, 0.3, 0.4))
        assert not found.can_fire(0)

    def test_without_an_off_ramp_there_it_is_one_too_many(
        self, tiny_model: ModelFactory, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        plain = Checkpoint.of("m", tiny_model(), tokenizer)

        with pytest.raises(PolicyError, match="5 entropy thresholds for 5 layers"):
            resolve_policy((0.05, 0.1, None, 0.3, 0.4), None, plain)


def test_a_stream_answers_after_the_embeddings(on_embeddings: Checkpoint) -> None:
    texts = [
        f"the {a} {b} is {c}" for a in ("good", "bad", "dull") for b in ("film", "it") for c in "abcdefg"
    ]
    out, policy = io.StringIO(), EntropyThreshold(0.15)

    stream(
        on_embeddings,
        policy,
        [text.encode() for text in texts],
        out,
        StreamConfig(max_length=LONGEST, micro_batch_tokens=128),
    )

    answers = {a["index"]: a for a in map(json.loads, out.getvalue().splitlines())}
    expected = [
        classify_one(
            on_embeddings.model, on_embeddings.tokenizer(text)["input_ids"], [0.15] * 4, layer_0=0.15
        )
        for text in texts
    ]
    sure = [i for i, e in enumerate(expected) if e.margin > 1e-5]
    assert [answers[i]["exit_layer"] for i in sure] == [expected[i].exit_layer for i in sure]
    assert [answers[i]["prediction"] for i in sure] == [expected[i].label for i in sure]
    assert {0, 3, 5} == {e.exit_layer for e in expected}
