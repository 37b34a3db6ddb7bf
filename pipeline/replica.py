"""A replica: one copy of the model in a Ray actor, and everything a shard needs from reading to commit.

Ray Data hands it shards, several at a time, each on a thread of its own; all of them feed the same lanes.
A call returns when its shard's part is committed. Knows nothing of the other replicas or of the plan.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from deebert.encoder import PackedEncoder
from deebert.exit_policy import policy_from_dict
from deebert.fused import FusedModel
from deebert.precision import DTYPES, resolve_precision
from deebert.windows import text_sums
from pipeline import sabotage
from pipeline.board import History
from pipeline.engine import EngineConfig, warm_up
from pipeline.engine.budget import is_out_of_memory
from pipeline.errors import (
    BadRowsError,
    NotFiniteError,
    OutputError,
    OutputFullError,
    ReadError,
    UsageError,
)
from pipeline.hardware import device_name
from pipeline.input_schema import InputSchema
from pipeline.lanes import Lanes, Submission
from pipeline.narrowing import PROOF, pieces, why_hopeless
from pipeline.raw_rows import excerpt
from pipeline.records import Identity, ShardRecord, Totals
from pipeline.schema import Answers, footer, part_table
from pipeline.shard import Shard, part_name
from pipeline.shard_records import committed
from pipeline.shard_work import RowsInLanes, ShardWork
from pipeline.sink import Output
from pipeline.source import BadRow, Readers, SourceBatch, read_shard
from pipeline.tokenization import TextTokenizer
from pipeline.turns import Turns
from pipeline.watchdog import Watchdog

log = logging.getLogger(__name__)

# Rows read, tokenized and submitted at a time: enough to fill micro-batches, little enough to overlap.
_BATCH_ROWS = 1024
# And bytes of text, but for a single row: a tokenizer takes about 100 bytes for each of them meanwhile.
_PIECE_BYTES = 1 << 20
# A shard that was in hand when its replica died once may have stood beside the cause; twice, it is the cause.
_WHOLE_ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """What replicas run: free of the library that loaded it, which takes each process seconds to import."""

    fused: FusedModel
    tokenizer: TextTokenizer
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """What every replica of a run is made from; small, for the weights travel through the object store."""

    identity: Identity
    model: Any
    """Ray reference to the `ServedModel`: replicas hold the very weights whose digest names the run."""
    device: str
    threads: int
    """CPU threads for the model."""
    shards_in_flight: int
    """That Ray Data hands a replica at a time."""
    micro_batch_tokens: int | None
    """None: as many as suit the replica's device."""
    schema: InputSchema
    id_column: str | None
    keep_columns: tuple[str, ...]
    control: float
    """Share of rows that also run at full depth."""
    probabilities: bool
    max_bad_rows: int
    """Rows of the run that may be bad: a shard that has more by itself ends the run, unfinished."""
    hang_seconds: float
    """What one read, micro-batch or commit may take."""
    output: Output
    board: Any
    """Handle of the `Board`."""


@dataclass(frozen=True, kw_only=True)
class ShardFailure:
    """A shard that could not be finished."""

    part: str
    source_file: str
    first_row: int
    reason: str
    is_fatal: bool = False
    """Whether no other shard could be finished either."""


class Replica:
    """The callable class that Ray Data instantiates once per actor."""

    def __init__(self, spec: ReplicaSpec) -> None:
        torch.set_num_threads(spec.threads)
        # The tokenizer makes its pool when it is first used, and with a thread for each core of the node: replicas
        # that share the node would start the square of its cores.
        os.environ.setdefault("RAYON_NUM_THREADS", str(spec.threads))
        model: ServedModel = ray.get(spec.model)
        # Resolved by the driver, for its own machine: this one may lack what that takes.
        precision = resolve_precision(spec.identity.precision, has_gpu=spec.device == "cuda")
        encoder = PackedEncoder(model.fused, device=spec.device, dtype=DTYPES[precision])
        self._spec = spec
        self._turns, self._readers = Turns(), Readers(most_kept=spec.shards_in_flight)
        self._watchdog = Watchdog(spec.hang_seconds)
        self._labels, self._problem = model.labels, encoder.problem
        self._hardware = device_name(spec.device)
        policy = policy_from_dict(spec.identity.exit_policy)
        self._with_certainty = policy.reads_certainty
        self._num_layers = encoder.num_layers
        self._tokenizer = model.tokenizer
        if spec.device == "cuda":
            warm_up(encoder, policy)
        self._lanes = Lanes(
            encoder,
            policy,
            EngineConfig(micro_batch_tokens=spec.micro_batch_tokens),
            on_progress=lambda rows, exit_layers: spec.board.add.remote(rows, exit_layers),
            limit=self._watchdog.limit,
        )

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Classify one shard; returns its pickled `ShardRecord` or `ShardFailure`."""
        shard: Shard = pickle.loads(batch["shard"][0])
        return {"outcome": np.array([pickle.dumps(self._attempt(shard))], dtype=object)}

    def _attempt(self, shard: Shard) -> ShardRecord | ShardFailure:
        """Run the shard as its history in this run demands: with others, alone, in pieces, or not at all."""
        name, board = part_name(shard, self._spec.identity.digest), self._spec.board
        history: History = _answer(board.history.remote(name))
        try:
            if (history.deaths or history.has_ended) and (record := committed(self._spec.output, name)):
                return record  # the commit was made, the word of it was lost
        except (OutputError, UsageError) as error:
            return _failure(shard, name, str(error))
        if (reason := why_hopeless(history)) is not None:
            return _failure(shard, name, reason)
        with self._turns.alone() if history.deaths else self._turns.together():
            _answer(board.begin.remote(name))
            try:
                return self._run(shard, name, history)
            except (OutputFullError, BadRowsError, NotFiniteError) as error:
                return _failure(shard, name, str(error), is_fatal=True)
            except (ReadError, OutputError, OSError) as error:
                return _failure(shard, name, str(error))
            except Exception as error:  # ours to report, not Ray's to wrap
                if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
                    # Nothing works any more in a process whose device context is lost, and a sample that fits no
                    # memory is found as any other that ends its process.
                    log.exception("the device or the memory failed under %s: this process ends", name)
                    os._exit(1)
                log.exception("shard %s", name)
                return _failure(shard, name, f"{type(error).__name__}: {error}", is_fatal=True)
            finally:
                _answer(board.end.remote(name))

    def _run(self, shard: Shard, name: str, history: History) -> ShardRecord:
        work = ShardWork(shard=shard)
        if history.deaths < _WHOLE_ATTEMPTS:
            with self._lanes.feeding():
                for batch in self._batches(work):
                    self._submit(work, batch)
            for rows in work.rows:
                rows.submission.wait()
        else:
            for batch in self._batches(work):
                self._try_pieces(work, batch, name, history)
        sabotage.reach("shard-classified")
        try:
            with self._watchdog.limit(f"the commit of {name}"):
                return self._commit(work)
        except Exception as error:
            if isinstance(error, (OutputError, OSError)) or is_out_of_memory(error):
                raise
            # Something about this shard's rows, which were read and classified: no other shard's concern.
            log.exception("the commit of %s", name)
            raise OutputError(f"{name} cannot be written: {type(error).__name__}: {error}") from error

    def _batches(self, work: ShardWork) -> Iterator[SourceBatch]:
        """Read the shard; the bad rows are put aside on the way."""
        spec, path = self._spec, work.shard.source.path
        batches = read_shard(
            work.shard,
            text_columns=spec.schema.text_columns,
            other_columns=spec.schema.kept.names,
            schema=spec.schema,
            batch_rows=_BATCH_ROWS,
            readers=self._readers,
        )
        while True:
            with work.timing("read_seconds"), self._watchdog.limit(f"a read of {path}"):
                batch = next(batches, None)
            if batch is None:
                return
            sabotage.reach("shard-read")
            work.bad.extend(batch.bad)
            self._check_bad_rows(work)
            yield from batch.pieces(_PIECE_BYTES)

    def _check_bad_rows(self, work: ShardWork) -> None:
        """End the run when this shard alone has too many bad rows, before they fill the memory."""
        spec, count = self._spec, len(work.bad)
        if count > spec.max_bad_rows:
            with self._watchdog.limit(f"the dead letters of {work.shard.source.path}"):
                self._write_dead_letters(work)  # they show what to mend
            raise BadRowsError(too_many_bad_rows(count, spec.max_bad_rows, spec.output))

    def _submit(self, work: ShardWork, batch: SourceBatch) -> Submission:
        """Tokenize a batch and hand it to the lanes."""
        texts = [column.to_pylist() for column in batch.texts]
        with work.timing("tokenize_seconds"), self._watchdog.limit("the tokenization of a batch"):
            sabotage.taste(texts[0])
            tokenized = self._tokenizer(*texts)
        windows, layout = tokenized.windows, tokenized.tokens.layout
        submission = self._lanes.submit(
            tokenized.tokens,
            _control_sample(batch.rows, self._spec.control, work.shard.source.path),
            None if self._tokenizer.window_stride is None else windows,
        )
        work.rows.append(
            RowsInLanes(
                source_rows=batch.rows,
                tokens=text_sums(layout.lengths, windows),
                squared_tokens=layout.squared_tokens,
                windows=windows,
                truncated=tokenized.truncated,
                kept=batch.kept,
                submission=submission,
            )
        )
        return submission

    def _try_pieces(self, work: ShardWork, batch: SourceBatch, name: str, history: History) -> None:
        """Run a batch piece by piece, each announced before it is tried; leave out the rows that kill."""
        board = self._spec.board
        for piece in pieces(batch.rows, history.deadly):
            rows = batch.slice(piece.start, piece.stop)
            if piece.is_deadly:
                work.bad.append(_deadly_row(rows))
                continue
            _answer(board.trying.remote(name, (int(rows.rows[0]), int(rows.rows[-1]))))
            self._submit(work, rows).wait()
        _answer(board.trying.remote(name, None))

    def _commit(self, work: ShardWork) -> ShardRecord:
        """Write the dead letters, then the part: its existence is the commit."""
        spec, shard = self._spec, work.shard
        started = time.perf_counter()
        no_rows = (Answers.empty(self._problem, len(self._labels)), spec.schema.kept.empty_table())
        answered = [(rows.answers(), rows.kept) for rows in work.rows] or [no_rows]
        table = self._table(shard, answered)
        name = part_name(shard, spec.identity.digest)
        record = ShardRecord(
            part=name,
            source_file=shard.source.path,
            first_row=shard.first_row,
            replica=f"{socket.gethostname()}:{os.getpid()}",
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            totals=self._totals(work, [answers for answers, _ in answered]),
        )
        self._write_dead_letters(work)
        spec.output.commit_part(name, table, footer(spec.identity, record, self._labels))
        # Only the driver's record can know how long the commit itself took.
        return replace(record, totals=replace(record.totals, write_seconds=time.perf_counter() - started))

    def _table(self, shard: Shard, answered: Sequence[tuple[Answers, pa.Table]]) -> pa.Table:
        """The part's rows, a chunk for each piece: an Arrow array of strings ends at 2 GiB, a file need not."""
        spec = self._spec
        return pa.concat_tables(
            part_table(
                answers,
                source_file=shard.source.path,
                kept=kept,
                id_column=spec.id_column,
                keep_columns=spec.keep_columns,
                labels=self._labels,
                with_probabilities=spec.probabilities,
                with_windows=spec.identity.window_stride is not None,
                with_certainty=self._with_certainty,
            )
            for answers, kept in answered
        )

    def _write_dead_letters(self, work: ShardWork) -> None:
        """Those of an earlier try are replaced."""
        name = part_name(work.shard, self._spec.identity.digest)
        bad = sorted(work.bad, key=lambda row: row.source_row)
        self._spec.output.write_dead_letters(name, (_letter(work.shard, row) for row in bad))

    def _totals(self, work: ShardWork, answered: Sequence[Answers]) -> Totals:
        compute, control = self._lanes.take_stats()
        lengths = np.concatenate([answers.num_tokens for answers in answered]).astype(np.int64)
        layers = np.concatenate([answers.exit_layer for answers in answered])
        bins = self._num_layers + 1
        left = sum((rows.submission.samples_left for rows in work.rows), Counter[int]())
        return Totals(
            shards=1,
            rows=len(lengths),
            bad_rows=len(work.bad),
            truncated_rows=sum(int(answers.truncated.sum()) for answers in answered),
            tokens=int(lengths.sum()),
            squared_tokens=sum(rows.squared_tokens for rows in work.rows),
            exit_rows=tuple(np.bincount(layers, minlength=bins).tolist()),
            exit_windows=tuple(left[layer] for layer in range(bins)),
            exit_tokens=tuple(np.bincount(layers, weights=lengths, minlength=bins).astype(np.int64).tolist()),
            compute=compute,
            control=control,
            audited_rows=sum(int(answers.audited.sum()) for answers in answered),
            audit_agreements=sum(int(answers.agreeing().sum()) for answers in answered),
            audit_distance=sum(answers.audit_distance() for answers in answered),
            hardware={self._hardware: len(lengths)},
            read_seconds=work.read_seconds,
            tokenize_seconds=work.tokenize_seconds,
            write_seconds=0.0,
        )


def too_many_bad_rows(count: int, limit: int, output: Output) -> str:
    """What ends a run that has more bad rows than it allows."""
    return (
        f"{count} rows cannot be classified, more than --max-bad-rows {limit}: see "
        f"{output.path('_deebert/dead_letters')}, mend the input or raise the limit"
    )


def _answer(asked: Any) -> Any:
    """What the board says; a process that does not hear from it is on a node that is being lost."""
    try:
        return ray.get(asked)
    except RayError:
        log.exception("the board of the run cannot be reached: this process ends, another takes over")
        os._exit(1)


def _failure(shard: Shard, part: str, reason: str, *, is_fatal: bool = False) -> ShardFailure:
    return ShardFailure(
        part=part,
        source_file=shard.source.path,
        first_row=shard.first_row,
        reason=reason,
        is_fatal=is_fatal,
    )


def _deadly_row(row: SourceBatch) -> BadRow:
    return BadRow(
        source_row=int(row.rows[0]),
        reason=f"it ended its replica's process, {PROOF} times by itself",
        excerpt=excerpt(row.texts[0][0].as_py()),
    )


def _letter(shard: Shard, row: BadRow) -> dict[str, Any]:
    return {"source_file": shard.source.path, **asdict(row)}


def _control_sample(rows: npt.NDArray[np.int64], share: float, source_file: str) -> npt.NDArray[np.bool_]:
    """Which rows also run at full depth: the same ones in every attempt, scattered over the file."""
    # Knuth's multiplicative hash of the row number, as a fraction of its range. Each file begins elsewhere in it:
    # row 0 of every one would be too many of a corpus of small files, and all of them first rows.
    start = np.uint64(zlib.crc32(source_file.encode()))
    return ((rows.astype(np.uint64) + start) * 2654435761 % 2**32) < share * 2**32
