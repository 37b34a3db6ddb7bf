"""The lanes: many threads feed one engine thread, and each hears of its own rows."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from deebert.encoder import PackedEncoder
from deebert.evaluation import exits, trace
from deebert.exit_policy import FULL_DEPTH, EntropyThreshold, OffRampAnswer, entropy
from deebert.packing import PackedTokens
from pipeline.engine import EngineConfig
from pipeline.lanes import Lanes, Submission
from tests.conftest import ModelFactory

POLICY = EntropyThreshold(0.45)
CONFIG = EngineConfig(micro_batch_tokens=128)
PATIENCE_SECONDS = 30.0
"""How long a test waits for what must happen; only a failing test waits that long."""


class Background:
    """A call on a daemon thread: one that never returns fails its test instead of hanging all others."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self, within_seconds: float = PATIENCE_SECONDS) -> Any:
        self._thread.join(within_seconds)
        assert not self._thread.is_alive(), "still waiting"
        if self._error is not None:
            raise self._error
        return self._result


def wait(submission: Submission) -> None:
    Background(submission.wait).result()


def random_texts(count: int, seed: int) -> PackedTokens:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return PackedTokens.pack([torch.randint(5, 97, (n,), generator=generator).tolist() for n in lengths])


def every(nth: int, rows: int) -> npt.NDArray[np.bool_]:
    return np.arange(rows) % nth == 0


@pytest.fixture(scope="module")
def encoder(tiny_model: ModelFactory) -> PackedEncoder:
    return PackedEncoder.of(tiny_model())


def test_rows_of_many_threads_are_each_answered_with_their_own(encoder: PackedEncoder) -> None:
    lanes = Lanes(encoder, POLICY, CONFIG)
    texts = [random_texts(10 + 7 * i, seed=i) for i in range(12)]

    def feed(tokens: PackedTokens) -> list[Submission]:
        with lanes.feeding():
            parts = [tokens.slice(0, 5), tokens.slice(5, 5), tokens.slice(5, len(tokens))]
            submitted = [lanes.submit(part, every(4, len(part))) for part in parts]
        for submission in submitted:
            wait(submission)
        return submitted

    feeders = [Background(partial(feed, tokens)) for tokens in texts]
    answered = [feeder.result() for feeder in feeders]

    for tokens, submissions in zip(texts, answered, strict=True):
        at_all_layers = trace(encoder, tokens)
        exit_layer, prediction = exits(at_all_layers, POLICY)
        answering = at_all_layers.logits[exit_layer - 1, torch.arange(len(tokens))]
        assert np.concatenate([s.exit_layer for s in submissions]).tolist() == exit_layer.tolist()
        assert np.concatenate([s.prediction for s in submissions]).tolist() == prediction.tolist()
        np.testing.assert_allclose(
            np.concatenate([s.probabilities for s in submissions]), answering.softmax(-1), atol=1e-5
        )
        np.testing.assert_allclose(
            np.concatenate([s.entropy for s in submissions]), entropy(answering), atol=1e-5
        )
    layers = np.concatenate([s.exit_layer for submissions in answered for s in submissions])
    assert len(set(layers.tolist())) >= 3  # the policy spreads these rows over layers


def test_the_audit_lane_answers_the_control_sample_at_full_depth(encoder: PackedEncoder) -> None:
    lanes = Lanes(encoder, POLICY, CONFIG)
    tokens = random_texts(90, seed=1)
    audited = every(3, 90)

    submission = lanes.submit(tokens, audited)
    wait(submission)

    _, full_depth = exits(trace(encoder, tokens), FULL_DEPTH)
    assert submission.audit_prediction[audited].tolist() == full_depth[audited].tolist()
    assert submission.audited.tolist() == audited.tolist()
    assert (submission.prediction != full_depth.numpy()).any()  # the lanes do answer differently


def test_statistics_are_each_lanes_work_since_they_were_last_taken(encoder: PackedEncoder) -> None:
    lanes = Lanes(encoder, POLICY, CONFIG)
    tokens = random_texts(60, seed=2)
    lengths = tokens.layout.lengths
    audited = every(5, 60)

    submission = lanes.submit(tokens, audited)
    wait(submission)
    exit_stats, audit_stats = lanes.take_stats()
    again = lanes.take_stats()

    assert exit_stats.layer_tokens == int((lengths * submission.exit_layer).sum())
    assert exit_stats.samples[0] == 60
    assert audit_stats.layer_tokens == 5 * int(lengths[audited].sum())
    assert audit_stats.samples == (12,) * 5
    assert [stats.layer_tokens for stats in again] == [0, 0]


def test_no_rows_are_done_at_once(encoder: PackedEncoder) -> None:
    submission = Lanes(encoder, POLICY, CONFIG).submit(PackedTokens.pack([]), np.zeros(0, np.bool_))

    wait(submission)

    assert len(submission.prediction) == 0


def test_progress_adds_up_to_all_rows_and_their_layers(encoder: PackedEncoder) -> None:
    reported: list[tuple[int, int]] = []
    all_reported = threading.Event()

    def on_progress(rows: int, exit_layers: int) -> None:
        reported.append((rows, exit_layers))
        if sum(rows for rows, _ in reported) == 80:
            all_reported.set()

    lanes = Lanes(encoder, POLICY, CONFIG, on_progress=on_progress)
    submission = lanes.submit(random_texts(80, seed=3), every(4, 80))
    wait(submission)

    assert all_reported.wait(PATIENCE_SECONDS)
    assert sum(layers for _, layers in reported) == int(submission.exit_layer.sum())


class GatedPolicy:
    """A policy whose first decision waits until the test lets it go, and that may then fail."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.reached, self.gate = threading.Event(), threading.Event()
        self._error = error

    reads_certainty = False

    def can_fire(self, layer: int) -> bool:
        return True

    def fires(self, layer: int, answer: OffRampAnswer) -> Tensor:
        self.reached.set()
        assert self.gate.wait(PATIENCE_SECONDS)
        if self._error is not None:
            raise self._error
        return torch.ones(len(answer), dtype=torch.bool)

    def to_dict(self) -> dict[str, Any]:
        return {"type": "gated"}


def test_an_engine_error_reaches_every_waiter_and_everyone_who_comes_later(encoder: PackedEncoder) -> None:
    policy = GatedPolicy(RuntimeError("the device is gone"))
    lanes = Lanes(encoder, policy, CONFIG)
    tokens, nobody = random_texts(20, seed=4), np.zeros(20, np.bool_)

    running = lanes.submit(tokens, nobody)
    assert policy.reached.wait(PATIENCE_SECONDS)  # the engine is busy with it: what follows waits unseen
    waiting = [lanes.submit(tokens, nobody), lanes.submit(tokens, ~nobody)]
    hearing = [Background(submission.wait) for submission in (running, *waiting)]
    policy.gate.set()

    for waiter in hearing:
        with pytest.raises(RuntimeError, match="the device is gone"):
            waiter.result()
    with pytest.raises(RuntimeError, match="the device is gone"):
        lanes.submit(tokens, nobody)


def test_an_error_between_the_last_answer_and_those_who_wait_for_it_reaches_them(
    encoder: PackedEncoder,
) -> None:
    def on_progress(rows: int, exit_layers: int) -> None:
        raise RuntimeError("the board is gone")

    lanes = Lanes(encoder, POLICY, EngineConfig(micro_batch_tokens=4096), on_progress=on_progress)

    submission = lanes.submit(random_texts(3, seed=0), np.zeros(3, np.bool_))

    with pytest.raises(RuntimeError, match="the board is gone"):
        wait(submission)


def test_both_lanes_have_micro_batches_of_one_size(
    encoder: PackedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself the audit lane chooses another: it has fewer buffers, and finds the memory that is left."""
    free = iter([512, 128])
    monkeypatch.setattr("pipeline.engine.engine.micro_batch_tokens", lambda *args, **shape: next(free))

    lanes = Lanes(encoder, POLICY, EngineConfig())

    assert lanes._exit_lane.micro_batch_tokens == lanes._audit_lane.micro_batch_tokens == 512


def test_a_row_that_the_engine_refuses_fails_its_submission(encoder: PackedEncoder) -> None:
    lanes = Lanes(encoder, POLICY, EngineConfig(micro_batch_tokens=4))

    submission = lanes.submit(PackedTokens.pack([[2, 3], [2] * 5]), np.zeros(2, np.bool_))

    with pytest.raises(ValueError, match="a sample has 5 tokens but a micro-batch takes 4"):
        wait(submission)


def test_feeders_are_held_back_while_enough_input_is_queued(encoder: PackedEncoder) -> None:
    policy = GatedPolicy()
    lanes = Lanes(encoder, policy, EngineConfig(micro_batch_tokens=10))
    one_micro_batch, nobody = PackedTokens.pack([[2] * 10]), np.zeros(1, np.bool_)
    submitted: list[Submission] = []
    enough = threading.Event()

    def feed() -> None:
        for _ in range(40):
            submitted.append(lanes.submit(one_micro_batch, nobody))
            if len(submitted) == 16:
                enough.set()

    feeder = Background(feed)
    assert enough.wait(PATIENCE_SECONDS)
    assert policy.reached.wait(PATIENCE_SECONDS)
    # Sixteen micro-batches of 10 tokens are queued: whoever comes now waits, and so adds nothing.
    later = Background(partial(lanes.submit, one_micro_batch, nobody))
    with pytest.raises(AssertionError, match="still waiting"):
        later.result(within_seconds=0.2)
    assert len(submitted) == 16

    policy.gate.set()
    feeder.result()
    for submission in (*submitted, later.result()):
        wait(submission)
    assert len(submitted) == 40
    assert all(s.exit_layer.tolist() == [1] for s in submitted)


def test_progress_is_told_while_rows_are_on_their_way_and_of_each_row_once(
    encoder: PackedEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.lanes._REPORT_SECONDS", 0.0)
    reported: list[tuple[int, int]] = []
    policy = GatedPolicy()
    policy.gate.set()
    lanes = Lanes(
        encoder,
        policy,
        EngineConfig(micro_batch_tokens=10),
        on_progress=lambda rows, exit_layers: reported.append((rows, exit_layers)),
    )

    wait(lanes.submit(PackedTokens.pack([[2] * 5] * 6), np.zeros(6, np.bool_)))

    assert reported == [(2, 2)] * 3


class StepwisePolicy(GatedPolicy):
    """A policy each of whose decisions waits for its own permission; who decides, leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.permitted = threading.Semaphore(0)

    def fires(self, layer: int, answer: OffRampAnswer) -> Tensor:
        self.reached.set()
        assert self.permitted.acquire(timeout=PATIENCE_SECONDS)
        return torch.ones(len(answer), dtype=torch.bool)


def test_what_arrives_while_a_micro_batch_runs_counts_as_queued(encoder: PackedEncoder) -> None:
    policy, submitted = StepwisePolicy(), list[Submission]()
    lanes = Lanes(encoder, policy, EngineConfig(micro_batch_tokens=10))
    one_micro_batch, nobody = PackedTokens.pack([[2] * 10]), np.zeros(1, np.bool_)
    submitted.append(lanes.submit(one_micro_batch, nobody))
    assert policy.reached.wait(PATIENCE_SECONDS)

    def feed() -> None:
        while len(submitted) < 40:
            submitted.append(lanes.submit(one_micro_batch, nobody))

    feeder = Background(feed)
    with pytest.raises(AssertionError, match="still waiting"):
        feeder.result(within_seconds=0.2)
    assert len(submitted) == 16

    policy.reached.clear()
    policy.permitted.release()
    assert policy.reached.wait(PATIENCE_SECONDS)  # one has left, the next is at its decision
    with pytest.raises(AssertionError, match="still waiting"):
        feeder.result(within_seconds=0.2)
    assert len(submitted) == 17

    policy.permitted.release(100)
    feeder.result()
    for submission in submitted:
        wait(submission)


def test_a_feeder_that_is_held_back_hears_of_an_engine_error(encoder: PackedEncoder) -> None:
    policy = GatedPolicy(RuntimeError("the device is gone"))
    lanes = Lanes(encoder, policy, EngineConfig(micro_batch_tokens=10))
    one_micro_batch, nobody = PackedTokens.pack([[2] * 10]), np.zeros(1, np.bool_)
    for _ in range(16):
        lanes.submit(one_micro_batch, nobody)
    assert policy.reached.wait(PATIENCE_SECONDS)
    held_back = Background(partial(lanes.submit, one_micro_batch, nobody))
    with pytest.raises(AssertionError, match="still waiting"):
        held_back.result(within_seconds=0.1)

    policy.gate.set()

    with pytest.raises(RuntimeError, match="the device is gone"):
        held_back.result()


class TestPatience:
    """How long a partly filled micro-batch waits for a thread that feeds."""

    def few(self, seed: int = 0) -> PackedTokens:
        return random_texts(2, seed)

    def test_ends_though_the_thread_goes_on_reading(self, encoder: PackedEncoder) -> None:
        lanes = Lanes(encoder, POLICY, EngineConfig(micro_batch_tokens=4096))

        with lanes.feeding():
            wait(lanes.submit(self.few(), np.zeros(2, np.bool_)))

    def test_is_none_where_nobody_feeds(
        self, encoder: PackedEncoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.lanes._PATIENCE_SECONDS", 3600.0)
        lanes = Lanes(encoder, POLICY, EngineConfig(micro_batch_tokens=4096))
        with lanes.feeding():
            pass

        wait(lanes.submit(self.few(), np.zeros(2, np.bool_)))

    def test_ends_when_the_thread_has_read_all(
        self, encoder: PackedEncoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.lanes._PATIENCE_SECONDS", 3600.0)
        lanes = Lanes(encoder, POLICY, EngineConfig(micro_batch_tokens=4096))

        with lanes.feeding():
            submission = lanes.submit(self.few(), np.zeros(2, np.bool_))
            assert not submission._done.wait(0.2)

        wait(submission)

    def test_lets_what_is_fed_run_together(
        self, encoder: PackedEncoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.lanes._PATIENCE_SECONDS", 3600.0)
        lanes = Lanes(encoder, FULL_DEPTH, EngineConfig(micro_batch_tokens=16))
        halves = PackedTokens.pack([[2] * 8, [3] * 8])
        nobody = np.zeros(1, np.bool_)

        with lanes.feeding():
            first = lanes.submit(halves.sequence(0), nobody)
            assert not first._done.wait(0.2)
            second = lanes.submit(halves.sequence(1), nobody)
            wait(first)
            wait(second)

        assert lanes.take_stats()[0].steps == (1,) * 5


def test_short_rows_of_a_submission_run_together(encoder: PackedEncoder) -> None:
    lanes = Lanes(encoder, FULL_DEPTH, EngineConfig(micro_batch_tokens=16))
    tokens = PackedTokens.pack([[2] * length for length in [15, 1] * 8])

    wait(lanes.submit(tokens, np.zeros(16, np.bool_)))

    # The eight of one token, then each of the others: in the order of arrival each 15 would take a 1 along.
    assert lanes.take_stats()[0].steps == (9,) * 5


def test_the_control_sample_is_served_first(encoder: PackedEncoder) -> None:
    policy = GatedPolicy()
    lanes = Lanes(encoder, policy, EngineConfig(micro_batch_tokens=10))

    submission = lanes.submit(PackedTokens.pack([[2] * 10] * 2), np.ones(2, np.bool_))
    assert policy.reached.wait(PATIENCE_SECONDS)

    assert lanes._audit_lane.stats.steps == (2,) * 5
    policy.gate.set()
    wait(submission)


def test_each_micro_batch_is_held_to_a_time(encoder: PackedEncoder) -> None:
    running: list[str] = []
    seen: list[list[str]] = []

    @contextmanager
    def limit(what: str) -> Iterator[None]:
        running.append(what)
        yield
        running.remove(what)

    class Looking(GatedPolicy):
        def fires(self, layer: int, answer: OffRampAnswer) -> Tensor:
            seen.append(list(running))
            return torch.ones(len(answer), dtype=torch.bool)

    lanes = Lanes(encoder, Looking(), EngineConfig(micro_batch_tokens=10), limit=limit)
    wait(lanes.submit(PackedTokens.pack([[2] * 10] * 3), np.zeros(3, np.bool_)))

    assert seen == [["a micro-batch"]] * 3


def test_token_ids_are_let_go_when_their_rows_are_answered(encoder: PackedEncoder) -> None:
    tokens = random_texts(20, seed=5)
    held = weakref.ref(tokens)
    submission = Lanes(encoder, POLICY, CONFIG).submit(tokens, every(4, 20))
    del tokens

    wait(submission)

    assert held() is None
    assert len(submission.prediction) == 20
