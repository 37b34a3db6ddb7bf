"""`deebert stream` as its users meet it: a process between two pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deebert.checkpoint import Checkpoint, load_checkpoint
from deebert.exit_policy import EntropyThreshold, OffRampAnswer
from deebert.reference import ReferenceResult, classify_one, classify_windows
from pipeline.errors import ReadError
from pipeline.stream import StreamConfig, stream

THRESHOLD = 0.6
WORDS = ["film", "story", "plot", "end", "bad", "good", "great", "dull", "very", "not"]
SECONDS = 300.0
"""How long a test waits for an answer before it fails; nothing sleeps."""

Start = Callable[..., "Process"]


class Process:
    """A running `python -m jobs.stream`."""

    def __init__(self, model: Path, *flags: str, stdin: int = subprocess.PIPE) -> None:
        words = [
            "--model",
            str(model),
            "--entropy-threshold",
            str(THRESHOLD),
            "--precision",
            "float32",
            *flags,
        ]
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "jobs.stream", *words],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Write one line and wait for the one answer; stdin stays open."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{line}\n".encode())
        self.popen.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of stdout."""
        assert self.popen.stdout is not None
        # The buffer is empty between answers: each line has been read whole.
        assert select.select([self.popen.stdout], [], [], SECONDS)[0], "no answer"
        answer: dict[str, Any] = json.loads(self.popen.stdout.readline())
        return answer

    def finish(self, rest: bytes = b"") -> tuple[list[dict[str, Any]], str, int]:
        """Write the rest, close stdin; the answers, what stderr holds, and the exit code."""
        out, err = self.popen.communicate(rest, timeout=SECONDS)
        return [json.loads(line) for line in out.decode().splitlines()], err.decode(), self.popen.returncode


@pytest.fixture
def start(saved_model: Path) -> Iterator[Start]:
    """Starts a stream; ends it whatever the test does."""
    started: list[Process] = []

    def make(*flags: str, stdin: int = subprocess.PIPE) -> Process:
        started.append(Process(saved_model, *flags, stdin=stdin))
        return started[-1]

    yield make
    for process in started:
        process.popen.kill()
        with contextlib.suppress(ValueError, BrokenPipeError):
            process.popen.communicate()


@pytest.fixture(scope="module")
def checkpoint(saved_model: Path) -> Checkpoint:
    return load_checkpoint(str(saved_model))


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> dict[str, ReferenceResult]:
    """What the reference answers for some texts, those near the threshold left out."""
    texts = [f"the {a} is {b} and {c}" for a in WORDS for b in WORDS[4:] for c in ("it", "a")]
    thresholds = [THRESHOLD] * (checkpoint.model.config.num_hidden_layers - 1)
    answers = {
        t: classify_one(checkpoint.model, checkpoint.tokenizer(t)["input_ids"], thresholds) for t in texts
    }
    return {text: answer for text, answer in answers.items() if answer.margin > 1e-3}


@pytest.fixture(scope="module")
def easy(expected: dict[str, ReferenceResult]) -> list[str]:
    """Texts that leave at the first off-ramp."""
    found = [text for text, answer in expected.items() if answer.exit_layer == 1]
    assert len(found) >= 5
    return found


@pytest.fixture(scope="module")
def hard(checkpoint: Checkpoint, expected: dict[str, ReferenceResult]) -> list[str]:
    """Texts that go to the last layer."""
    last = checkpoint.model.config.num_hidden_layers
    found = [text for text, answer in expected.items() if answer.exit_layer == last]
    assert len(found) >= 5
    return found


def jsonl(texts: list[str]) -> bytes:
    return b"".join(
        json.dumps({"id": f"s{i}", "text": text}).encode() + b"\n" for i, text in enumerate(texts)
    )


def streamed(
    checkpoint: Checkpoint, lines: list[bytes], config: StreamConfig | None = None
) -> dict[int, dict[str, Any]]:
    """In this process: the answers by index."""
    out = io.StringIO()
    stream(checkpoint, EntropyThreshold(THRESHOLD), lines, out, config or StreamConfig())
    return {answer["index"]: answer for answer in map(json.loads, out.getvalue().splitlines())}


class TestAnswers:
    def test_every_line_is_answered_once_as_the_reference_does(
        self, start: Start, expected: dict[str, ReferenceResult], checkpoint: Checkpoint
    ) -> None:
        texts = list(expected)
        answers, err, code = start().finish(jsonl(texts))
        assert (code, err) == (0, "")
        assert sorted(answer["index"] for answer in answers) == list(range(len(texts)))
        for answer in answers:
            theirs = expected[texts[answer["index"]]]
            assert answer["id"] == f"s{answer['index']}"
            assert (answer["prediction"], answer["exit_layer"]) == (theirs.label, theirs.exit_layer)
            assert answer["label"] == checkpoint.labels[theirs.label]
            assert answer["entropy"] == pytest.approx(theirs.entropy, abs=1e-4)
            probabilities = torch.softmax(torch.tensor(theirs.logits), dim=0)
            assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-4)

    def test_bad_lines_are_answered_with_an_error(self, start: Start) -> None:
        lines = [
            b"a plain line",
            b'{"text": "json"}',
            b'{"text": 1}',
            b'{"texts": "wrong field"}',
            b'{"text": "half',
            b"\xff\xfe",
            b'{"text": null}',
            b'{"text": "half a pair \\ud83d"}',
            b'{"id": "\\udc00", "text": "good"}',
            b'{"text":' * 50_000,
            b"",
            b'{"id": {"any": ["json"]}, "text": "a pair \\ud83d\\ude00"}\r',
        ]
        answers, err, code = start().finish(b"\n".join(lines))
        assert code == 0
        said = "8 of 12 lines could not be read and are answered with an error, the first: no text in the field 'text'"
        assert err.count("\n") == 1
        assert err.rstrip().endswith(said)
        by_index = {answer["index"]: answer for answer in answers}
        assert sorted(answer["index"] for answer in answers) == list(range(len(lines)))
        bad = [index for index, answer in sorted(by_index.items()) if "error" in answer]
        assert bad == [2, 3, 4, 5, 6, 7, 8, 9]
        assert by_index[3]["error"] == "no text in the field 'text'"
        assert by_index[5]["error"] == "not UTF-8: invalid start byte at byte 0"
        assert by_index[10]["num_tokens"] == 2  # [CLS] [SEP]: empty text is a text
        assert by_index[11]["id"] == {"any": ["json"]}

    def test_not_one_line_that_can_be_read_is_a_failure(self, start: Start) -> None:
        answers, err, code = start("--text-column", "body").finish(b'{"text": "good"}\n{"text": "bad"}\n')
        assert code == 1
        error = "no text in the field 'body'"
        assert answers == [{"index": 0, "error": error}, {"index": 1, "error": error}]
        assert f"2 of 2 lines could not be read and are answered with an error, the first: {error}\n" in err

    def test_long_texts_are_cut_and_say_so(self, start: Start) -> None:
        answers, _, code = start("--max-length", "8").finish(b"good film\n" + b"good " * 100)
        assert code == 0
        assert {a["index"]: (a["num_tokens"], a["truncated"]) for a in answers} == {
            0: (4, False),
            1: (8, True),
        }

    def test_long_texts_in_windows_are_answered_once_by_the_mean(
        self, start: Start, checkpoint: Checkpoint
    ) -> None:
        texts = ["good film", "the film is very dull and not good " * 40, "", "bad story " * 9]
        flags = ("--max-length", "16", "--window-stride", "5")
        answers, err, code = start(*flags).finish("\n".join(texts).encode())
        assert (code, err) == (0, "")
        assert sorted(answer["index"] for answer in answers) == [0, 1, 2, 3]
        for answer in answers:
            windows = checkpoint.tokenizer(
                texts[answer["index"]],
                truncation=True,
                max_length=16,
                stride=5,
                return_overflowing_tokens=True,
            )["input_ids"]
            theirs = classify_windows(checkpoint.model, windows, [THRESHOLD] * 4)
            assert min(window.margin for window in theirs.windows) > 1e-5
            assert answer["num_windows"] == len(windows)
            assert answer["num_tokens"] == sum(map(len, windows))
            assert not answer["truncated"]
            assert (answer["prediction"], answer["exit_layer"]) == (theirs.label, theirs.exit_layer)
            assert answer["entropy"] == pytest.approx(theirs.entropy, abs=1e-4)
            assert answer["score"] == pytest.approx(max(theirs.probabilities), abs=1e-4)

    def test_columns_are_chosen_by_flags(self, start: Start) -> None:
        flags = ("--text-column", "q", "--text-pair-column", "a", "--id-column", "key")
        lines = b'{"q": "good film", "a": "bad film", "key": 7}\n{"q": "good film"}\n'
        answers, _, code = start(*flags).finish(lines)
        assert code == 0
        by_index = {answer["index"]: answer for answer in answers}
        assert (by_index[0]["id"], by_index[0]["num_tokens"]) == (7, 7)
        assert by_index[1]["error"] == "no text in the field 'a'"

    def test_a_plain_line_is_not_half_a_pair(self, checkpoint: Checkpoint) -> None:
        """An empty second text, made up, would be answered as if it had been asked for."""
        lines = [b"good film", b"", b'{"text": "good film", "b": ""}']
        answers = streamed(checkpoint, lines, StreamConfig(text_pair_column="b"))
        error = "a plain line has no field 'b': pairs come as JSON objects"
        assert [answers[index].get("error") for index in range(3)] == [error, error, None]
        assert answers[2]["num_tokens"] == 5

    @pytest.mark.parametrize("before", [b"\xef\xbb\xbf", b" ", b"\t ", b"\xef\xbb\xbf  "])
    @pytest.mark.parametrize("line", [b'{"id": 7, "text": "good film"}', b"good film"])
    def test_what_comes_before_the_first_line_changes_nothing(
        self, checkpoint: Checkpoint, before: bytes, line: bytes
    ) -> None:
        assert streamed(checkpoint, [before + line]) == streamed(checkpoint, [line])

    def test_json_may_be_indented_on_any_line(self, checkpoint: Checkpoint) -> None:
        answers = streamed(
            checkpoint, [b"good film\n", b' {"id": 7, "text": "good film"}\n', b" {good film}\n"]
        )
        assert answers[1] == {**answers[0], "index": 1, "id": 7}
        assert answers[2]["error"].startswith("not a JSON object: ")

    def test_no_lines_no_answers(self, start: Start) -> None:
        assert start().finish() == ([], "", 0)


class TestInput:
    @pytest.mark.parametrize("num_lines", [0, 1, 700])
    def test_one_that_breaks_off_is_answered_so_far_and_then_an_error(
        self, checkpoint: Checkpoint, num_lines: int
    ) -> None:
        def arriving() -> Iterator[bytes]:
            yield from [b"good film\n"] * num_lines
            raise OSError(5, "Input/output error")

        out = io.StringIO()
        with pytest.raises(ReadError) as caught:
            stream(checkpoint, EntropyThreshold(THRESHOLD), arriving(), out, StreamConfig())
        lines = "1 line" if num_lines == 1 else f"{num_lines} lines"
        assert str(caught.value) == (
            f"the input broke off after {lines}: Input/output error; what was read is answered, send the rest again"
        )
        answers = [json.loads(line) for line in out.getvalue().splitlines()]
        assert sorted(answer["index"] for answer in answers) == list(range(num_lines))

    def test_one_whose_reader_is_told_to_exit_has_not_ended_either(self, checkpoint: Checkpoint) -> None:
        def arriving() -> Iterator[bytes]:
            yield b"good film"
            sys.exit()

        with pytest.raises(ReadError, match="broke off after 1 line: SystemExit; "):
            stream(checkpoint, EntropyThreshold(THRESHOLD), arriving(), io.StringIO(), StreamConfig())

    def test_a_connection_that_is_reset_ends_it_with_one_sentence(self, start: Start) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
        with ours:
            with theirs:
                process = start(stdin=theirs.fileno())
            for index, line in enumerate((b"good film\n", b"bad film\n")):
                ours.sendall(line)
                assert process.answer()["index"] == index
            # Closed without lingering: the peer is sent a reset, no end.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert process.finish() == (
            [],
            "deebert stream: the input broke off after 2 lines: Connection reset by peer; "
            "what was read is answered, send the rest again\n",
            1,
        )

    def test_no_more_than_some_bytes_are_read_ahead_of_a_slow_engine(self, checkpoint: Checkpoint) -> None:
        """300 lines of 100 kB, then one that is longer than all that may wait; none is text, to save time."""
        lines = [b"\xff" * 100_000] * 300 + [b"\xff" * (20 << 20), b"good film"]
        some_read, too_many_read = threading.Event(), threading.Event()

        def arriving() -> Iterator[bytes]:
            for index, line in enumerate(lines):
                if index == 50:
                    some_read.set()
                if index == 150:
                    too_many_read.set()
                yield line

        class Slow(io.StringIO):
            flushed = False

            def flush(self) -> None:
                """The first answer takes until the reader has gone as far as it will."""
                if not self.flushed:
                    self.flushed = True
                    assert some_read.wait(SECONDS)
                    assert not too_many_read.wait(1.0)

        out = Slow()
        stream(checkpoint, EntropyThreshold(THRESHOLD), arriving(), out, StreamConfig())
        answers = [json.loads(line) for line in out.getvalue().splitlines()]
        assert sorted(answer["index"] for answer in answers) == list(range(len(lines)))
        assert ["error" in answer for answer in answers].count(False) == 1


class TestOrder:
    def test_easy_samples_overtake_hard_ones_that_came_first(
        self, start: Start, easy: list[str], hard: list[str]
    ) -> None:
        many = 100
        texts = [hard[i % len(hard)] for i in range(many)] + [easy[i % len(easy)] for i in range(many)]
        answers, _, code = start().finish(jsonl(texts))
        assert code == 0
        places = {answer["index"]: place for place, answer in enumerate(answers)}
        mean = [sum(places[i] for i in range(first, first + many)) / many for first in (0, many)]
        assert mean[1] < mean[0]

    def test_once_read_easy_samples_leave_before_any_hard_one(
        self, checkpoint: Checkpoint, easy: list[str], hard: list[str]
    ) -> None:
        """In this process, where the first off-ramp can be made to wait until all lines have been read."""
        all_read = threading.Event()
        lines = jsonl([*hard[:5], *easy[:5]]).splitlines()

        def arriving() -> Iterator[bytes]:
            yield from lines
            all_read.set()

        class Patient(EntropyThreshold):
            def fires(self, layer: int, answer: OffRampAnswer) -> torch.Tensor:
                assert all_read.wait(SECONDS)
                return super().fires(layer, answer)

        out = io.StringIO()
        stream(checkpoint, Patient(THRESHOLD), arriving(), out, StreamConfig())
        order = [json.loads(line)["index"] for line in out.getvalue().splitlines()]
        assert sorted(order[:5]) == [5, 6, 7, 8, 9]
        assert sorted(order[5:]) == [0, 1, 2, 3, 4]


class TestPipes:
    def test_each_line_is_answered_before_the_next_is_written(
        self, start: Start, easy: list[str], hard: list[str]
    ) -> None:
        process = start()
        for index, text in enumerate([hard[0], easy[0], hard[1]]):
            assert process.ask(text)["index"] == index
        assert "error" in process.ask("{")
        left, said, code = process.finish()
        assert (left, code) == ([], 0)
        assert said.endswith("(char 1)\n")
        assert (
            "1 of 4 lines could not be read and are answered with an error, the first: not a JSON object"
            in said
        )

    def test_a_reader_that_leaves_ends_it(self, start: Start) -> None:
        """As in `yes good | deebert stream | head -1`: stdin does not end, stdout closes."""
        process = start()
        assert process.popen.stdin is not None
        assert process.popen.stdout is not None
        feeder = threading.Thread(target=feed_for_ever, args=(process.popen.stdin,), daemon=True)
        feeder.start()
        process.answer()
        process.popen.stdout.close()
        assert process.popen.wait(SECONDS) == 0
        feeder.join(SECONDS)
        assert process.popen.stderr is not None
        assert process.popen.stderr.read() == b""

    def test_a_reader_that_leaves_while_no_line_comes(self, start: Start) -> None:
        """The next answer finds nobody; that stdin is still open must not hold the process."""
        process = start()
        assert process.popen.stdin is not None
        assert process.popen.stdout is not None
        process.ask("good film")
        process.popen.stdout.close()
        process.popen.stdin.write(b"bad film\n")
        process.popen.stdin.flush()
        assert process.popen.wait(SECONDS) == 0
        assert process.popen.stderr is not None
        assert process.popen.stderr.read() == b""

    def test_an_interrupt_ends_it_while_no_line_comes(self, start: Start) -> None:
        process = start()
        process.ask("good film")
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(SECONDS) == 130
        assert process.popen.stderr is not None
        assert process.popen.stderr.read() == b"deebert stream: interrupted\n"

    def test_ray_is_not_imported(self, saved_model: Path) -> None:
        script = (
            "import sys; from jobs.cli import run\n"
            f"code = run('stream', ['--model', {str(saved_model)!r}])\n"
            "sys.exit('ray' in sys.modules or code)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], input=b"good film\n", capture_output=True, timeout=SECONDS
        )
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["index"] == 0


def feed_for_ever(stdin: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        while True:
            stdin.write(b"good film\n" * 100)
            stdin.flush()
