"""What the engine promises for every model, policy, budget and order of arrival.

The encoder here is a stand-in with the interface of `PackedEncoder` whose samples leave where their tokens
say: so thousands of examples run in seconds, each sample's right answer is known without running a model,
and every layer can check that it is given whole samples, in turn. That the engine's answers are right with
the real encoder is what `tests/parity` shows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deebert import native
from deebert.encoder import PackedEncoder
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, LearningToExit, OffRampAnswer, entropy
from deebert.packing import IntArray, PackedTokens, SequenceLayout
from deebert.problem import SINGLE_LABEL
from pipeline.engine import Engine, EngineConfig, Exits, warm_up
from pipeline.engine.batch import Chosen, SampleBatch
from pipeline.engine.layer_buffer import LayerBuffer
from pipeline.engine.runner import Runner, Step
from pipeline.engine.stats import StatsCounter
from pipeline.errors import InvariantError, NotFiniteError
from tests.conftest import LONGEST, make_model
from tests.examples import examples

NUM_LABELS = 3
SURE, UNSURE = 20.0, 0.1
"""The winner's lead in logits: an entropy of about 0, or of about ln 3."""

HALF_A_NAT = EntropyThreshold(0.5)

ON_A_CPU = RuntimeError(
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
)
"""What torch says when a CPU's memory ends: an error of no type of its own."""


def first_token(sample: int, leaves_from: int) -> int:
    """A sample's tokens all say who it is and from which layer on off-ramps are sure of it."""
    return sample * 16 + leaves_from


class ScriptedEncoder:
    """A `PackedEncoder` whose states hold each token's id and how many layers it has been through."""

    num_labels = NUM_LABELS
    problem = SINGLE_LABEL
    device = torch.device("cpu")

    def __init__(self, num_layers: int, off_ramp_layers: tuple[int, ...]) -> None:
        self.num_layers = num_layers
        self.off_ramp_layers = (*off_ramp_layers, num_layers)
        self.ran: list[tuple[int, frozenset[int], int]] = []
        """(layer, samples, tokens) of each call of `layer`, from 1, and of `embed`, 0."""
        self.off_ramps_computed: list[int] = []

    def embed(self, packed: PackedTokens) -> Tensor:
        states = torch.stack([packed.input_ids.float(), torch.zeros(len(packed.input_ids))], dim=1)
        self._note(0, states, packed.layout)
        return states

    def layers(self, first: int, last: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        for index in range(first, last + 1):
            states = self.layer(index, states, layout)
        return states

    def layer(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        assert states[:, 1].tolist() == [index] * layout.total_tokens  # each layer once, in turn
        self._note(index + 1, states, layout)
        return states + torch.tensor([0.0, 1.0])

    def answer(
        self, index: int, states: Tensor, layout: SequenceLayout, *, with_certainty: bool = False
    ) -> OffRampAnswer:
        logits = self._logits(index, states, layout)
        return OffRampAnswer(logits=logits, entropy=entropy(logits))

    def _logits(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        self.off_ramps_computed.append(index + 1)
        tokens = self._first_tokens(states, layout)
        lead = torch.where(tokens % 16 <= index + 1, SURE, UNSURE)
        return torch.nn.functional.one_hot(tokens // 16 % NUM_LABELS, NUM_LABELS) * lead[:, None]

    def _note(self, layer: int, states: Tensor, layout: SequenceLayout) -> None:
        samples = self._first_tokens(states, layout) // 16
        self.ran.append((layer, frozenset(samples.tolist()), layout.total_tokens))

    def _first_tokens(self, states: Tensor, layout: SequenceLayout) -> Tensor:
        tokens = states[:, 0].long()
        first = tokens[layout.cu_seqlens[:-1].long()]
        whole = first.repeat_interleave(torch.from_numpy(layout.lengths))
        assert torch.equal(tokens, whole)  # no sample has another one's tokens
        return first


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a policy, a budget, and samples that arrive in pieces between steps."""

    num_layers: int
    off_ramp_layers: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    layer_0: float | None
    """The threshold of the off-ramp on the embeddings, where there is one."""
    micro_batch_tokens: int
    under_way: int
    """Micro-batches started before the oldest is waited for."""
    lengths: tuple[int, ...]
    leaves_from: tuple[int, ...]
    pieces: tuple[int, ...]
    """Samples per submission; the rest comes last."""
    steps: tuple[tuple[int, bool], ...]
    """After each submission: how many steps, and whether they drain."""
    order: tuple[int, ...]
    """In which the samples arrive."""

    @property
    def firing_layers(self) -> tuple[int, ...]:
        able = [i for i in self.off_ramp_layers if (self.layer_0, *self.thresholds)[i] is not None]
        return (*able, self.num_layers)

    @property
    def policy(self) -> EntropyThreshold:
        return EntropyThreshold(self.thresholds, self.layer_0)

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(micro_batch_tokens=self.micro_batch_tokens, under_way=self.under_way)

    def exit_layer(self, sample: int) -> int:
        """The rule, in one line: the first off-ramp that may fire and is sure, else the last layer."""
        return next((i for i in self.firing_layers if i >= self.leaves_from[sample]), self.num_layers)

    def tokens_through(self, layer: int) -> list[int]:
        """Lengths of the samples that must run through `layer`."""
        return [n for sample, n in enumerate(self.lengths) if self.exit_layer(sample) >= layer]

    def tokens(self, samples: tuple[int, ...]) -> PackedTokens:
        return PackedTokens.pack([[first_token(s, self.leaves_from[s])] * self.lengths[s] for s in samples])

    def submissions(self) -> Iterator[tuple[tuple[int, ...], tuple[int, bool]]]:
        start = 0
        for size, steps in zip(self.pieces, self.steps, strict=True):
            yield self.order[start : start + size], steps
            start += size
        yield self.order[start:], (0, False)


@dataclass
class Run:
    """What happened."""

    engine: Engine
    encoder: ScriptedEncoder
    exits: list[Exits] = field(default_factory=list)
    ran: list[list[tuple[int, frozenset[int], int]]] = field(default_factory=list)
    """What the encoder's layers ran, for each entry of `exits`."""

    def step(self, *, drain: bool) -> bool:
        before = len(self.encoder.ran)
        exits = self.engine.step(drain=drain)
        if exits is not None:
            self.exits.append(exits)
            self.ran.append(self.encoder.ran[before:])
        return exits is not None

    @property
    def answers(self) -> dict[int, tuple[int, int, tuple[float, ...]]]:
        """(label, exit layer, logits) by sample."""
        return {
            sample: (int(logits.argmax()), exits.exit_layer, tuple(logits.tolist()))
            for exits in self.exits
            for sample, logits in zip(exits.sample_ids.tolist(), exits.logits, strict=True)
        }


def run(case: Case) -> Run:
    encoder = ScriptedEncoder(case.num_layers, case.off_ramp_layers)
    done = Run(engine=Engine(encoder, case.policy, case.config), encoder=encoder)  # type: ignore[arg-type]
    for samples, (count, drain) in case.submissions():
        done.engine.submit(np.array(samples, dtype=np.int64), case.tokens(samples))
        for _ in range(count):
            done.step(drain=drain)
    while done.step(drain=True):
        pass
    return done


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_layers = draw(st.integers(1, 6))
    inner = range(1, num_layers)
    budget = draw(st.integers(2, 24))
    count = draw(st.integers(0, 40))
    pieces = draw(st.lists(st.integers(0, 12), max_size=5))
    each = {"min_size": count, "max_size": count}
    return Case(
        num_layers=num_layers,
        off_ramp_layers=tuple(i for i in (0, *inner) if (i and i % 2 == 0) or draw(st.booleans())),
        thresholds=tuple(draw(st.sampled_from([0.5, 0.5, 0.5, None])) for _ in inner),
        layer_0=draw(st.sampled_from([0.5, 0.5, None])),
        micro_batch_tokens=budget,
        under_way=draw(st.sampled_from([1, 1, 2, 3])),
        lengths=tuple(draw(st.lists(st.integers(1, budget), **each))),
        leaves_from=tuple(draw(st.lists(st.integers(0, num_layers + 1), **each))),
        pieces=tuple(pieces),
        steps=tuple((draw(st.integers(0, 6)), draw(st.booleans())) for _ in pieces),
        order=tuple(draw(st.permutations(range(count)))),
    )


many = settings(max_examples=examples(200))


@many
@given(cases())
def test_each_sample_leaves_once_where_the_rule_says_with_its_own_answer(case: Case) -> None:
    done = run(case)

    left = [sample for exits in done.exits for sample in exits.sample_ids.tolist()]
    assert sorted(left) == list(range(len(case.lengths)))
    for sample, (label, exit_layer, _) in done.answers.items():
        assert (label, exit_layer) == (sample % NUM_LABELS, case.exit_layer(sample))
    assert done.engine.in_flight == 0
    assert done.engine.waiting_tokens == 0


@many
@given(cases())
def test_no_micro_batch_and_no_buffer_outgrows_its_bound(case: Case) -> None:
    done = run(case)

    assert all(tokens <= case.micro_batch_tokens for _, _, tokens in done.encoder.ran)
    peaks = done.engine.peak_buffer_tokens
    assert list(peaks) == [min(1, case.firing_layers[0]), *(layer + 1 for layer in case.firing_layers[:-1])]
    most = (1 + case.under_way) * case.micro_batch_tokens
    assert all(peak < most for peak in list(peaks.values())[1:])


@many
@given(cases(), st.randoms(use_true_random=False), st.integers(24, 60))
def test_answers_do_not_depend_on_order_budget_or_neighbours(case: Case, random: object, budget: int) -> None:
    shuffled = list(case.order)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    other = replace(
        case,
        order=tuple(shuffled),
        micro_batch_tokens=budget,
        under_way=3 - case.under_way % 3,
        pieces=(),
        steps=(),
    )
    half = replace(case, order=case.order[::2], pieces=(), steps=())

    answers = run(case).answers

    assert run(other).answers == answers
    assert run(half).answers == {sample: answers[sample] for sample in case.order[::2]}


@many
@given(cases())
def test_a_sample_is_emitted_in_the_step_in_which_its_layer_runs(case: Case) -> None:
    done = run(replace(case, under_way=1))

    for exits, ran in zip(done.exits, done.ran, strict=True):
        layers = [layer for layer, _, _ in ran]
        deepest, samples, _ = ran[-1]
        # One micro-batch through one segment: nothing deeper has run for anyone who came along.
        assert layers == list(range(layers[0], deepest + 1))
        assert all(together == samples for _, together, _ in ran)
        assert exits.exit_layer == deepest
        assert set(exits.sample_ids.tolist()) == {s for s in samples if case.exit_layer(s) == deepest}


@many
@given(cases())
def test_layers_run_the_tokens_of_those_who_have_not_left_and_no_others(case: Case) -> None:
    stats = run(case).engine.stats

    through = [case.tokens_through(layer) for layer in range(1, case.num_layers + 1)]
    assert stats.samples == tuple(map(len, through))
    assert stats.tokens == tuple(map(sum, through))
    assert stats.squared_tokens == tuple(sum(n * n for n in lengths) for lengths in through)
    assert stats.layer_tokens == sum(n * case.exit_layer(s) for s, n in enumerate(case.lengths))


@many
@given(cases())
def test_off_ramps_that_cannot_fire_are_not_computed(case: Case) -> None:
    done = run(case)

    assert set(done.encoder.off_ramps_computed) <= set(case.firing_layers)
    assert done.engine.stats.off_ramp_samples == tuple(
        len(case.tokens_through(layer)) if layer in case.firing_layers else 0
        for layer in range(case.num_layers + 1)
    )


def engine_of(
    *,
    policy: EntropyThreshold = HALF_A_NAT,
    micro_batch_tokens: int = 8,
    off_ramp_layers: tuple[int, ...] = (1, 2),
    under_way: int = 1,
) -> tuple[Engine, ScriptedEncoder]:
    encoder = ScriptedEncoder(3, off_ramp_layers)
    config = EngineConfig(micro_batch_tokens=micro_batch_tokens, under_way=under_way)
    return Engine(encoder, policy, config), encoder  # type: ignore[arg-type]


def submit(engine: Engine, *leaves_from: int, first: int = 0, length: int = 2) -> None:
    tokens = [[first_token(first + i, layer)] * length for i, layer in enumerate(leaves_from)]
    engine.submit(np.arange(first, first + len(leaves_from)), PackedTokens.pack(tokens))


class TestRegroupingInNumbers:
    """Micro-batches of 8 tokens: 4 samples of 2."""

    def test_survivors_of_two_micro_batches_run_deeper_as_one(self) -> None:
        engine, encoder = engine_of()
        submit(engine, 1, 3, 1, 3, 3, 1, 3, 1)

        steps = list(iter(engine.step, None))

        assert [(s.exit_layer, s.sample_ids.tolist()) for s in steps] == [
            (1, [0, 2]),
            (1, [5, 7]),
            (2, []),
            (3, [1, 3, 4, 6]),
        ]
        assert [tokens for layer, _, tokens in encoder.ran if layer] == [8, 8, 8, 8]
        assert engine.stats.steps == (2, 1, 1)

    def test_who_leaves_after_the_embeddings_runs_no_layer(self) -> None:
        engine, encoder = engine_of(off_ramp_layers=(0, 2))
        submit(engine, 0, 3, 0, 2, 3, 0, 0, 2)

        steps = list(iter(engine.step, None))

        assert [(s.exit_layer, s.sample_ids.tolist()) for s in steps] == [
            (0, [0, 2]),
            (0, [5, 6]),
            (2, [3, 7]),
        ]
        assert [(layer, sorted(samples)) for layer, samples, _ in encoder.ran] == [
            (0, [0, 1, 2, 3]),
            (0, [4, 5, 6, 7]),
            (1, [1, 3, 4, 7]),
            (2, [1, 3, 4, 7]),
        ]
        assert engine.stats.off_ramp_samples == (8, 0, 4, 0)
        assert [e.sample_ids.tolist() for e in engine.drain()] == [[1, 4]]

    def test_an_off_ramp_on_the_embeddings_that_cannot_fire_is_no_segment(self) -> None:
        engine, encoder = engine_of(off_ramp_layers=(0, 2), policy=EntropyThreshold((0.5, 0.5)))
        submit(engine, 0, 0, 0, 0)

        assert [(e.exit_layer, len(e)) for e in engine.drain()] == [(2, 4)]
        assert encoder.off_ramps_computed == [2]
        assert list(engine.peak_buffer_tokens) == [1, 3]

    def test_while_one_is_waited_for_the_next_is_under_way(self) -> None:
        engine, encoder = engine_of(under_way=2)
        submit(engine, 1, 3, 1, 3, 3, 1, 3, 1, 1, 1, 1, 1)

        first = engine.step()

        # The second micro-batch has run, though nobody knows yet who leaves it.
        assert first is not None
        assert (first.exit_layer, first.sample_ids.tolist()) == (1, [0, 2])
        assert [sorted(samples) for layer, samples, _ in encoder.ran if layer] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert engine.in_flight == 10
        # The third, admitted before the second's survivors were known; then those of the first two, together.
        assert [(e.exit_layer, e.sample_ids.tolist()) for e in engine.drain()] == [
            (1, [5, 7]),
            (1, [8, 9, 10, 11]),
            (2, []),
            (3, [1, 3, 4, 6]),
        ]

    def test_nothing_is_drained_that_survivors_under_way_may_join(self) -> None:
        engine, encoder = engine_of(under_way=2)
        submit(engine, 1, 3, 1, 3, 3, 1, 3)

        assert [(e.exit_layer, e.sample_ids.tolist()) for e in engine.drain()][-1] == (3, [1, 3, 4, 6])
        assert [tokens for layer, _, tokens in encoder.ran if layer == 2] == [8]

    def test_a_partly_filled_micro_batch_waits_for_input_until_drained(self) -> None:
        engine, _ = engine_of()
        submit(engine, 1, 1, 1)

        assert engine.step() is None
        assert engine.wants_input
        assert (engine.in_flight, engine.waiting_tokens) == (3, 6)

        submit(engine, 1, first=3)

        assert not engine.wants_input
        assert engine.step().sample_ids.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]

    def test_survivors_wait_until_they_fill_a_micro_batch(self) -> None:
        engine, _ = engine_of()
        submit(engine, 2, 2, 1, 1)

        assert engine.step().sample_ids.tolist() == [2, 3]  # type: ignore[union-attr]
        assert engine.step() is None
        assert engine.in_flight == 2
        assert [e.sample_ids.tolist() for e in engine.drain()] == [[0, 1]]

    def test_at_full_depth_a_micro_batch_runs_all_layers_in_one_step(self) -> None:
        engine, encoder = engine_of(policy=FULL_DEPTH)
        submit(engine, 1, 1, 1, 1)

        exits = engine.step()

        assert exits is not None
        assert (exits.exit_layer, exits.sample_ids.tolist()) == (3, [0, 1, 2, 3])
        assert encoder.off_ramps_computed == [3]
        assert engine.peak_buffer_tokens == {1: 8}

    def test_entropies_and_logits_are_those_of_the_off_ramp_that_answered(self) -> None:
        engine, _ = engine_of()
        submit(engine, 1, 9)

        first, nobody, last = engine.drain()

        assert (first.exit_layer, first.sample_ids.tolist()) == (1, [0])
        assert first.logits.tolist() == [[20.0, 0.0, 0.0]]
        assert first.entropy.tolist() == pytest.approx([0.0], abs=1e-6)
        assert (nobody.exit_layer, len(nobody)) == (2, 0)
        assert (last.exit_layer, last.sample_ids.tolist()) == (3, [1])
        np.testing.assert_allclose(last.logits, [[0.0, 0.1, 0.0]])
        assert last.entropy.tolist() == pytest.approx([1.097477], abs=1e-6)


class Clock:
    """Stands still but for what is said to have happened."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Let each call of `owner.name` take so long."""
        call = getattr(owner, name)

        def slowly(*given: Any, **named: Any) -> Any:
            self.now += seconds
            return call(*given, **named)

        monkeypatch.setattr(owner, name, slowly)


class TestSeconds:
    """On a clock that only what is named moves."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        clock = Clock()
        for module in ("span", "runner"):
            monkeypatch.setattr(f"pipeline.engine.{module}.time", clock)
        return clock

    def test_of_a_step_are_those_of_its_layers_its_off_ramp_and_its_regrouping(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock.slow(monkeypatch, ScriptedEncoder, "embed", 1)
        clock.slow(monkeypatch, ScriptedEncoder, "layer", 2)
        clock.slow(monkeypatch, ScriptedEncoder, "answer", 4)
        clock.slow(monkeypatch, LayerBuffer, "take", 8)
        clock.slow(monkeypatch, SampleBatch, "keep", 16)  # the survivors
        engine, _ = engine_of(off_ramp_layers=(1,))
        submit(engine, 1, 9, 1, 9)

        assert [len(exits) for exits in engine.drain()] == [2, 2]

        # Layer 1: to take, to run, to answer, to gather; layers 2 and 3 share 8 + 2 * 2 + 4.
        assert engine.stats.seconds == (8 + 2 + 4 + 16, 8, 8)
        assert engine.stats.embedding_seconds == 1
        assert engine.stats.total_seconds == clock.now == 47

    def test_of_an_off_ramp_on_the_embeddings_are_the_embeddings_own(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock.slow(monkeypatch, ScriptedEncoder, "embed", 1)
        clock.slow(monkeypatch, ScriptedEncoder, "layer", 2)
        clock.slow(monkeypatch, ScriptedEncoder, "answer", 4)
        engine, _ = engine_of(off_ramp_layers=(0,))
        submit(engine, 0, 9)

        assert [len(exits) for exits in engine.drain()] == [1, 1]

        assert engine.stats.embedding_seconds == 1 + 4
        assert sum(engine.stats.seconds) == pytest.approx(3 * 2 + 4)


def test_a_micro_batch_that_nobody_leaves_is_not_copied() -> None:
    runner = Runner(ScriptedEncoder(3, (1,)), HALF_A_NAT)  # type: ignore[arg-type]
    tokens = PackedTokens.pack([[first_token(i, 9)] * 2 for i in range(4)])
    step = runner.start(0, SampleBatch.from_tokens(np.arange(4), tokens))

    exits, survivors = runner.finish(step, StatsCounter(3))

    assert len(exits) == 0
    assert survivors is step.after


def test_on_a_cpu_nothing_is_kept_of_steps_that_are_over() -> None:
    engine, _ = engine_of()
    submit(engine, *[1, 3] * 20)

    assert sum(map(len, engine.drain())) == 40

    assert not engine._runner._gathers


def test_a_micro_batch_takes_the_longest_sample_of_the_model_whatever_suits_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.engine.engine.micro_batch_tokens", lambda *args, **shape: 8)
    engine = Engine(PackedEncoder.of(make_model()), HALF_A_NAT)

    engine.submit(np.arange(1), PackedTokens.pack([[7] * LONGEST]))

    assert engine.micro_batch_tokens == LONGEST
    assert sum(map(len, engine.drain())) == 1


class TestErrors:
    def test_a_sample_longer_than_a_micro_batch_is_refused(self) -> None:
        engine, _ = engine_of(micro_batch_tokens=8)

        submit(engine, 1, length=8)
        with pytest.raises(ValueError, match="a sample has 9 tokens but a micro-batch takes 8"):
            submit(engine, 1, length=9)
        assert engine.in_flight == 1

    def test_as_many_ids_as_sequences(self) -> None:
        engine, _ = engine_of()

        with pytest.raises(ValueError, match="3 ids for 1 sequences: give one id per sequence"):
            engine.submit(np.arange(3), PackedTokens.pack([[1]]))

    def test_a_sample_without_tokens_is_refused(self) -> None:
        engine, _ = engine_of()

        with pytest.raises(ValueError, match="a sample has no tokens: give each at least one"):
            engine.submit(np.arange(3), PackedTokens.pack([[1], [], [2]]))
        assert engine.in_flight == 0

    def test_samples_that_vanish_break_the_promise_loudly(self) -> None:
        engine, _ = engine_of()
        submit(engine, 1, 1, 1, 1, 1, 1, 1, 1)

        engine._buffers[0].take()  # behind the engine's back

        with pytest.raises(InvariantError, match="4 samples are in flight but 0 wait or are under way"):
            engine.step()


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.float16, "not finite numbers in float16: classify in float32 or bfloat16, or train it again"),
        (torch.float32, "not finite numbers in float32: train it again"),
        (torch.bfloat16, "not finite numbers in bfloat16: train it again"),
    ],
)
def test_answers_that_are_not_numbers_end_it_and_say_where(dtype: torch.dtype, says: str) -> None:
    model, nan = make_model(), torch.nan
    with torch.no_grad():
        # Too large for float16 from layer 2 on; for float32, what a training leaves behind that went astray.
        model.backbone.encoder.layer[1].output.dense.weight.mul_(3e5 if dtype == torch.float16 else nan)
    engine = Engine(PackedEncoder.of(model, dtype=dtype), FULL_DEPTH, EngineConfig(micro_batch_tokens=64))
    engine.submit(np.arange(2), PackedTokens.pack([[5, 6, 7], [8, 9]]))

    with pytest.raises(NotFiniteError, match=f"^the model's answers after layer 5 are {says}$"):
        engine.step(drain=True)


def test_an_off_ramp_whose_answer_is_no_number_is_named_where_it_answers() -> None:
    model = make_model(off_ramp_layers=[0, 2], learns_to_exit=True)
    ramp: Any = model.off_ramps[0]
    with torch.no_grad():
        ramp.classifier.bias[1] = torch.inf
    policy = LearningToExit(0.0)  # every off-ramp is certain enough
    engine = Engine(PackedEncoder.of(model), policy, EngineConfig(micro_batch_tokens=64))
    engine.submit(np.arange(1), PackedTokens.pack([[5, 6, 7]]))

    with pytest.raises(
        NotFiniteError, match="the model's answers after the embeddings are not finite numbers"
    ):
        engine.step(drain=True)


class AstrayEncoder(ScriptedEncoder):
    """An encoder one of whose off-ramps says `said` of sample 1."""

    dtype = torch.float32
    astray_layer: int
    said: float

    def _logits(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        logits = super()._logits(index, states, layout)
        if index + 1 == self.astray_layer:
            logits[self._first_tokens(states, layout) // 16 == 1, 2] = self.said
        return logits


NOT_FINITE = pytest.mark.parametrize("said", [torch.nan, torch.inf, -torch.inf])


def astray(layer: int, said: float) -> Engine:
    """Sample 1 goes to the end, past off-ramps after layers 1 and 2; samples 0 and 2 leave after layer 1."""
    encoder = AstrayEncoder(3, (1, 2))
    encoder.astray_layer, encoder.said = layer, said
    engine = Engine(encoder, HALF_A_NAT, EngineConfig(micro_batch_tokens=8))  # type: ignore[arg-type]
    submit(engine, 1, 9, 1)
    return engine


@NOT_FINITE
def test_one_answer_among_many_that_is_no_number_ends_it(said: float) -> None:
    encoder = AstrayEncoder(1, ())
    encoder.astray_layer, encoder.said = 1, said
    engine = Engine(encoder, FULL_DEPTH, EngineConfig(micro_batch_tokens=8))  # type: ignore[arg-type]
    submit(engine, 1, 1, 1)

    with pytest.raises(NotFiniteError, match=r"^the model's answers after layer 1 are not finite numbers"):
        engine.step(drain=True)


@NOT_FINITE
def test_an_off_ramp_that_says_no_number_of_who_stays_ends_nothing(said: float) -> None:
    """It is not sure: an entropy that is no number is below no threshold."""
    engine = astray(1, said)

    left = {int(i): exits.exit_layer for exits in engine.drain() for i in exits.sample_ids}

    assert left == {0: 1, 1: 3, 2: 1}


class SmallEncoder(ScriptedEncoder):
    """An encoder whose layers fit `capacity` tokens at a time, as a device with little memory."""

    capacity: int
    refused: int = 0
    error: Exception = torch.OutOfMemoryError()

    def layer(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        if layout.total_tokens > self.capacity:
            self.refused += 1
            raise self.error
        return super().layer(index, states, layout)


@many
@given(cases(), st.integers(1, 24))
def test_micro_batches_that_do_not_fit_are_halved_for_good(case: Case, capacity: int) -> None:
    encoder = SmallEncoder(case.num_layers, case.off_ramp_layers)
    encoder.capacity = max(capacity, *case.lengths, 1)
    engine = Engine(encoder, case.policy, case.config)  # type: ignore[arg-type]
    engine.submit(np.array(case.order, dtype=np.int64), case.tokens(case.order))
    done = Run(engine=engine, encoder=encoder)
    while done.step(drain=True):
        pass

    undisturbed = run(case).answers
    assert done.answers == undisturbed
    assert encoder.refused <= np.log2(case.micro_batch_tokens) + 1


@pytest.mark.parametrize("error", [ON_A_CPU, MemoryError()])
def test_the_memory_of_a_cpu_ends_like_a_gpu_s(error: Exception) -> None:
    encoder = SmallEncoder(2, (1,))
    encoder.capacity, encoder.error = 4, error
    engine = Engine(encoder, HALF_A_NAT, EngineConfig(micro_batch_tokens=16))  # type: ignore[arg-type]
    submit(engine, *[1] * 8)
    assert sorted(i for exits in engine.drain() for i in exits.sample_ids) == list(range(8))
    assert encoder.refused == 2  # with 16 tokens and with 8


def test_another_error_is_not_taken_for_too_little_memory() -> None:
    encoder = SmallEncoder(2, (1,))
    encoder.capacity, encoder.error = 4, RuntimeError("shapes do not fit")
    engine = Engine(encoder, HALF_A_NAT, EngineConfig(micro_batch_tokens=16))  # type: ignore[arg-type]
    submit(engine, *[1] * 8)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        engine.step(drain=True)
    assert encoder.refused == 1


def test_a_sample_that_does_not_fit_alone_is_an_error() -> None:
    encoder = SmallEncoder(2, (1,))
    encoder.capacity = 3
    engine = Engine(encoder, EntropyThreshold((None,)), EngineConfig(micro_batch_tokens=8))  # type: ignore[arg-type]
    engine.submit(np.array([0]), PackedTokens.pack([[first_token(0, 1)] * 4]))
    with pytest.raises(torch.OutOfMemoryError):
        engine.step(drain=True)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), ON_A_CPU])
def test_memory_that_fails_while_survivors_are_gathered_costs_no_sample(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine, _ = engine_of(under_way=2)
    submit(engine, 1, 3, 1, 3, 3, 1, 3, 1)
    gather = SampleBatch.keep

    def with_little_memory(batch: SampleBatch, samples: IntArray) -> SampleBatch:
        if batch.layout.total_tokens > 4:
            raise error
        return gather(batch, samples)

    monkeypatch.setattr(SampleBatch, "keep", with_little_memory)
    left = {int(i): exits.exit_layer for exits in engine.drain() for i in exits.sample_ids}
    assert left == {0: 1, 1: 3, 2: 1, 3: 3, 4: 3, 5: 1, 6: 3, 7: 1}


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are copied by torch, as on GPUs."""
    monkeypatch.setattr(native, "_library", lambda: None)


@pytest.mark.parametrize("under_way", [1, 2])
def test_memory_that_fails_while_a_micro_batch_is_formed_costs_no_sample(
    monkeypatch: pytest.MonkeyPatch, under_way: int
) -> None:
    engine, _ = engine_of(under_way=under_way)
    submit(engine, 1, 3, 1)
    submit(engine, 3, 3, 1, 3, 1, first=3)
    form, refused = SampleBatch.form, []

    def with_little_memory(parts: Any) -> SampleBatch:
        first = parts[0].of if isinstance(parts[0], Chosen) else parts[0]
        if first.token_rows[0].dim() > 1 and sum(map(len, parts)) > 1:
            refused.append(len(parts))
            raise torch.OutOfMemoryError
        return form(parts)

    monkeypatch.setattr(SampleBatch, "form", staticmethod(with_little_memory))
    left = {int(i): exits.exit_layer for exits in engine.drain() for i in exits.sample_ids}
    assert left == {0: 1, 1: 3, 2: 1, 3: 3, 4: 3, 5: 1, 6: 3, 7: 1}
    assert refused


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("under_way", [1, 2])
@pytest.mark.parametrize(("owner", "part"), [(SampleBatch, "concat"), (Chosen, "copy")])
def test_memory_that_fails_while_a_micro_batch_is_put_together_costs_no_sample(
    monkeypatch: pytest.MonkeyPatch, under_way: int, owner: type, part: str
) -> None:
    engine, _ = engine_of(under_way=under_way)
    submit(engine, 1, 3, 1)
    submit(engine, 3, 3, 1, 3, 1, first=3)
    whole, refused = getattr(owner, part), []

    def with_little_memory(given: Any) -> SampleBatch:
        first = given[0] if isinstance(given, list) else given.of
        is_states = first.token_rows[0].dim() > 1  # not token ids, which are the host's
        if is_states and len(given) > 1:  # batches to join, or samples to sort or to keep
            refused.append(len(given))
            raise torch.OutOfMemoryError
        made: SampleBatch = whole(given)
        return made

    patched = staticmethod(with_little_memory) if part == "concat" else with_little_memory
    monkeypatch.setattr(owner, part, patched)
    left = {int(i): exits.exit_layer for exits in engine.drain() for i in exits.sample_ids}
    assert left == {0: 1, 1: 3, 2: 1, 3: 3, 4: 3, 5: 1, 6: 3, 7: 1}
    assert refused


def test_what_ran_out_of_memory_is_halved_not_what_would_have_been_allowed() -> None:
    encoder = SmallEncoder(2, (1,))
    encoder.capacity = 8
    engine = Engine(encoder, HALF_A_NAT, EngineConfig(micro_batch_tokens=64))  # type: ignore[arg-type]
    submit(engine, *[1] * 8)  # 16 tokens

    assert [exits.sample_ids.tolist() for exits in engine.drain()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert encoder.refused == 1


@pytest.mark.usefixtures("no_kernels")
def test_who_could_not_be_gathered_runs_next_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_of()
    submit(engine, 1, 3, 1, 3, 1, 1, 1, 1)
    gather = SampleBatch.keep

    def with_little_memory(batch: SampleBatch, samples: IntArray) -> SampleBatch:
        if batch.layout.total_tokens > 4:
            raise torch.OutOfMemoryError
        return gather(batch, samples)

    monkeypatch.setattr(SampleBatch, "keep", with_little_memory)

    found = [(exits.exit_layer, exits.sample_ids.tolist()) for exits in engine.drain()]
    assert found == [(1, [0]), (1, [2]), (2, []), (3, [1, 3]), (1, [4, 5]), (1, [6, 7])]


def test_what_a_step_came_to_is_free_before_its_samples_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = engine_of()
    submit(engine, 1, 3, 1, 3)
    gather, shrink = SampleBatch.keep, Engine._shrink
    held: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def with_little_memory(batch: SampleBatch, samples: IntArray) -> SampleBatch:
        if batch.layout.total_tokens > 4:
            held.append(weakref.ref(batch.token_rows[0]))
            raise torch.OutOfMemoryError
        return gather(batch, samples)

    def looking(engine: Engine, tokens: int) -> None:
        alive.extend(states() is not None for states in held)
        shrink(engine, tokens)

    monkeypatch.setattr(SampleBatch, "keep", with_little_memory)
    monkeypatch.setattr(Engine, "_shrink", looking)
    assert sum(map(len, engine.drain())) == 4
    assert alive == [False]


def test_a_single_sample_for_whose_answer_there_is_no_memory_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = engine_of()
    submit(engine, 1)
    asked: list[Step] = []

    def without_memory(runner: Runner, step: Step, stats: StatsCounter) -> None:
        assert not asked, "asked again"
        asked.append(step)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Runner, "finish", without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step(drain=True)


def test_memory_that_fails_for_the_next_micro_batch_leaves_the_one_under_way_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = engine_of(under_way=2)
    submit(engine, *[1] * 8)
    form, calls = SampleBatch.form, list[int]()

    def with_little_memory(batches: list[SampleBatch | Chosen]) -> SampleBatch:
        calls.append(len(batches))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return form(batches)

    monkeypatch.setattr(SampleBatch, "form", staticmethod(with_little_memory))

    found = [exits.sample_ids.tolist() for exits in engine.drain()]
    assert found == [[0, 1, 2, 3], [4, 5], [6, 7]]


class ForgetfulEncoder(SmallEncoder):
    """A small encoder that remembers, weakly, what it held when it was refused."""

    held: weakref.ref[Tensor]

    def layer(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        inner = states * 2
        if layout.total_tokens > self.capacity:
            self.held = weakref.ref(inner)
            raise torch.OutOfMemoryError
        return super().layer(index, states, layout)


def test_what_a_failed_micro_batch_held_is_free_before_memory_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = ForgetfulEncoder(2, (1,))
    encoder.capacity = 4
    engine = Engine(encoder, HALF_A_NAT, EngineConfig(micro_batch_tokens=16))  # type: ignore[arg-type]
    shrink, alive = Engine._shrink, []

    def looking(engine: Engine, tokens: int) -> None:
        alive.append(encoder.held() is not None)
        shrink(engine, tokens)

    monkeypatch.setattr(Engine, "_shrink", looking)
    submit(engine, *[1] * 8)
    assert sum(map(len, engine.drain())) == 8
    assert alive == [False, False]


def test_a_single_sample_waits_for_the_memory_of_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = engine_of(micro_batch_tokens=2, under_way=2)
    submit(engine, 1, 3, 3)
    start, refused = Runner.start, []

    def with_room_for_one(runner: Runner, *given: Any) -> Step:
        if engine._under_way:
            refused.append(given)
            raise torch.OutOfMemoryError
        return start(runner, *given)

    monkeypatch.setattr(Runner, "start", with_room_for_one)
    assert sorted(int(i) for exits in engine.drain() for i in exits.sample_ids) == [0, 1, 2]
    assert refused
    assert not caplog.messages  # micro-batches stay as they are


def test_a_warm_up_leaves_nothing_behind() -> None:
    model = make_model()
    encoder = PackedEncoder.of(model)
    warm_up(encoder, HALF_A_NAT)
    ramp: Any = model.off_ramps[-1]
    with torch.no_grad():
        ramp.classifier.bias[1] = torch.nan
    warm_up(PackedEncoder.of(model), HALF_A_NAT)  # what has diverged is the rows' to say


class ThreadsEncoder(ScriptedEncoder):
    """An encoder that notes which threads run it."""

    longest_input = 8

    def layer(self, index: int, states: Tensor, layout: SequenceLayout) -> Tensor:
        self.threads = {*getattr(self, "threads", ()), threading.current_thread()}
        return super().layer(index, states, layout)


def test_a_warm_up_runs_on_one_thread_that_has_ended_with_it() -> None:
    encoder = ThreadsEncoder(2, (1,))

    warm_up(encoder, HALF_A_NAT)  # type: ignore[arg-type]

    (thread,) = encoder.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
