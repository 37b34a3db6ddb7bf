"""A replica: one copy of the model in a Ray actor, and everything a shard needs from reading to commit.

Ray Data hands it shards, several at a time, each on a thread of its own; all of them feed the same lanes.
A call returns when its shard's part is committed. Knows nothing of the other replicas or of the plan.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch

from deebert.checkpoint import Checkpoint
from deebert.encoder import PackedEncoder
from deebert.exit_policy import policy_from_dict
from deebert.precision import DTYPES, Precision
from pipeline.engine import EngineConfig
from pipeline.errors import ReadError
from pipeline.input_schema import InputSchema
from pipeline.lanes import Lanes, Submission
from pipeline.records import Identity, ShardRecord, Totals
from pipeline.schema import NOT_AUDITED, Answers, footer, part_table
from pipeline.shards import Shard, part_name
from pipeline.sink import Output
from pipeline.source import BadRow, read_shard
from pipeline.tokenization import TextTokenizer
from pipeline.turns import Turns

# Rows read, tokenized and submitted at a time: enough to fill micro-batches, little enough to overlap.
_BATCH_ROWS = 1024
# A shard that was in hand when its replica died this often is left out of the run and reported.
_MOST_ATTEMPTS = 2
_POISON_VARIABLE = "DEEBERT_TEST_POISON"


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What every replica of a run is made from; small, for the weights travel through the object store."""

    identity: Identity
    checkpoint: Any
    """Ray reference to the `Checkpoint`: replicas hold the very weights whose digest names the run."""
    device: str
    threads: int
    """CPU threads for the model."""
    micro_batch_tokens: int
    schema: InputSchema
    id_column: str | None
    keep_columns: tuple[str, ...]
    control: float
    """Share of rows that also run at full depth."""
    probabilities: bool
    output: Output
    board: Any
    """Handle of the `Board`."""


@dataclass(frozen=True, kw_only=True)
class ShardFailure:
    """A shard that could not be finished, through no fault of the replica."""

    part: str
    source_file: str
    first_row: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """Rows of a shard in the lanes, and what the part will say of them; their texts are let go."""

    source_rows: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    kept: pa.Table
    submission: Submission

    def answers(self) -> Answers:
        done = self.submission
        return Answers(
            source_rows=self.source_rows,
            num_tokens=self.lengths.astype(np.int32),
            truncated=self.truncated,
            prediction=done.prediction,
            exit_layer=done.exit_layer,
            entropy=done.entropy,
            probabilities=done.probabilities,
            audit_prediction=done.audit_prediction,
        )


@dataclass(kw_only=True)
class _Work:
    """A shard under way."""

    shard: Shard
    rows: list[_Rows] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    read_seconds: float = 0.0
    tokenize_seconds: float = 0.0

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)


class Replica:
    """The callable class that Ray Data instantiates once per actor."""

    def __init__(self, spec: ReplicaSpec) -> None:
        torch.set_num_threads(spec.threads)
        checkpoint: Checkpoint = ray.get(spec.checkpoint)
        precision: Precision = spec.identity.precision  # type: ignore[assignment]  # resolved by the driver
        encoder = PackedEncoder(checkpoint.model, device=spec.device, dtype=DTYPES[precision])
        self._spec = spec
        self._turns = Turns()
        self._labels = checkpoint.labels
        self._num_layers = encoder.num_layers
        self._tokenizer = TextTokenizer(
            checkpoint.tokenizer,
            max_length=spec.identity.max_length,
            has_token_types=encoder.has_token_types,
        )
        self._lanes = Lanes(
            encoder,
            policy_from_dict(spec.identity.exit_policy),
            EngineConfig(micro_batch_tokens=spec.micro_batch_tokens),
            on_progress=lambda rows, exit_layers: spec.board.add.remote(rows, exit_layers),
        )

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Classify one shard; returns its pickled `ShardRecord` or `ShardFailure`."""
        shard: Shard = pickle.loads(batch["shard"][0])
        return {"outcome": np.array([pickle.dumps(self._attempt(shard))], dtype=object)}

    def _attempt(self, shard: Shard) -> ShardRecord | ShardFailure:
        """Run the shard unless it has killed its replica twice; a suspect runs alone."""
        name, board = part_name(shard, self._spec.identity.digest), self._spec.board
        tried: int = ray.get(board.attempts.remote(name))
        if tried >= _MOST_ATTEMPTS:
            return _failure(shard, name, f"quarantined: its replica died in each of {tried} attempts")
        with self._turns.alone() if tried else self._turns.together():
            ray.get(board.begin.remote(name))
            try:
                return self._run(shard)
            except (ReadError, OSError) as error:
                return _failure(shard, name, str(error))

    def _run(self, shard: Shard) -> ShardRecord:
        work = _Work(shard=shard)
        with self._lanes.feeding():
            self._feed(work)
        for rows in work.rows:
            rows.submission.wait()
        return self._commit(work)

    def _feed(self, work: _Work) -> None:
        """Read, tokenize and submit, batch by batch."""
        spec = self._spec
        batches = read_shard(
            work.shard,
            text_columns=spec.schema.text_columns,
            other_columns=spec.schema.kept.names,
            schema=spec.schema,
            batch_rows=_BATCH_ROWS,
        )
        while True:
            with work.timing("read_seconds"):
                batch = next(batches, None)
            if batch is None:
                return
            texts = [column.to_pylist() for column in batch.texts]
            _die_of_poison(texts[0])
            with work.timing("tokenize_seconds"):
                tokenized = self._tokenizer(*texts)
            audited = _control_sample(batch.rows, spec.control)
            work.bad.extend(batch.bad)
            work.rows.append(
                _Rows(
                    source_rows=batch.rows,
                    lengths=tokenized.tokens.layout.lengths,
                    truncated=tokenized.truncated,
                    kept=batch.kept,
                    submission=self._lanes.submit(tokenized.tokens, audited),
                )
            )

    def _commit(self, work: _Work) -> ShardRecord:
        """Write the dead letters, then the part: its existence is the commit."""
        spec, shard = self._spec, work.shard
        started = time.perf_counter()
        answers = Answers.concat([rows.answers() for rows in work.rows], len(self._labels))
        name = part_name(shard, spec.identity.digest)
        table = part_table(
            answers,
            source_file=shard.source.path,
            kept=pa.concat_tables([spec.schema.kept.empty_table(), *(rows.kept for rows in work.rows)]),
            id_column=spec.id_column,
            keep_columns=spec.keep_columns,
            labels=self._labels,
            with_probabilities=spec.probabilities,
        )
        record = ShardRecord(
            part=name,
            source_file=shard.source.path,
            first_row=shard.first_row,
            replica=f"{socket.gethostname()}:{os.getpid()}",
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            totals=self._totals(work, answers),
        )
        spec.output.write_dead_letters(name, (_letter(shard, row) for row in work.bad))
        spec.output.commit_part(name, table, footer(spec.identity, record, self._labels))
        # Only the driver's record can know how long the commit itself took.
        return replace(record, totals=replace(record.totals, write_seconds=time.perf_counter() - started))

    def _totals(self, work: _Work, answers: Answers) -> Totals:
        compute, control = self._lanes.take_stats()
        lengths = answers.num_tokens.astype(np.int64)
        audited = answers.audit_prediction != NOT_AUDITED
        agree = answers.audit_prediction[audited] == answers.prediction[audited]
        layers = answers.exit_layer - 1
        return Totals(
            shards=1,
            rows=len(lengths),
            bad_rows=len(work.bad),
            truncated_rows=int(answers.truncated.sum()),
            tokens=int(lengths.sum()),
            squared_tokens=int(np.square(lengths).sum()),
            exit_rows=tuple(np.bincount(layers, minlength=self._num_layers).tolist()),
            exit_tokens=tuple(
                np.bincount(layers, weights=lengths, minlength=self._num_layers).astype(np.int64).tolist()
            ),
            compute=compute,
            control=control,
            audited_rows=int(audited.sum()),
            audit_agreements=int(agree.sum()),
            read_seconds=work.read_seconds,
            tokenize_seconds=work.tokenize_seconds,
            write_seconds=0.0,
        )


def _failure(shard: Shard, part: str, reason: str) -> ShardFailure:
    return ShardFailure(part=part, source_file=shard.source.path, first_row=shard.first_row, reason=reason)


def _die_of_poison(texts: list[str]) -> None:
    """For tests only: a text that kills its process, as a bug in native code would."""
    poison = os.environ.get(_POISON_VARIABLE)
    if poison is not None and poison in texts:
        os.kill(os.getpid(), signal.SIGKILL)


def _letter(shard: Shard, row: BadRow) -> dict[str, Any]:
    return {"source_file": shard.source.path, **asdict(row)}


def _control_sample(rows: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.bool_]:
    """Which rows also run at full depth: the same ones in every attempt, scattered over the file."""
    # Knuth's multiplicative hash of the row number, as a fraction of its range.
    return (rows.astype(np.uint64) * 2654435761 % 2**32) < share * 2**32
