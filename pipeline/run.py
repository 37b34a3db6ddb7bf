"""The driver of a classification run: plan, skip what is committed, run the rest on Ray, prove the end.

    inputs ─▶ shards ─▶ minus committed parts ─▶ Ray Data actor pool of replicas ─▶ parts
                                                            └─▶ shard records ─▶ run.json, _SUCCESS

Success means planned = committed. Anything else raises, names what is missing, and the same call resumes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deebert.version import __version__
from pipeline import sabotage
from pipeline.board import Board
from pipeline.cluster import Placement, RaySession, place
from pipeline.config import ClassifyConfig
from pipeline.errors import OutputError, RunFailedError
from pipeline.lock import locked
from pipeline.planning import RunPlan, can_go_on, check_output, make_plan
from pipeline.pool import cause, outcomes
from pipeline.records import Attempt, RunRecord, RunStatus, ShardRecord, Totals
from pipeline.replica import ReplicaSpec, ServedModel, ShardFailure, too_many_bad_rows
from pipeline.shard import Shard
from pipeline.shard_records import RecordLog, read_shard_records
from pipeline.sink import SUCCESS, Output
from pipeline.tokenization import TextTokenizer
from pipeline.watching import showing_progress

log = logging.getLogger(__name__)
shard_log = logging.getLogger("pipeline.shards_done")
"""One line per committed shard: for collectors of logs, too much for a terminal."""

# How old the numbers of a run under way may be: what its record says if nothing can be said at the end.
_RECORD_SECONDS = 60.0
_LEAST_BAD_ROWS = 100
_BAD_ROW_SHARE = 0.001


@dataclass(frozen=True, kw_only=True)
class ClassifyResult:
    """How a run ended."""

    record: RunRecord
    new_shards: int
    """Shards that this call committed; 0 when there was nothing left to do."""


def classify(config: ClassifyConfig) -> ClassifyResult:
    """Classify a corpus into Parquet; resumes what an earlier call with the same output left undone.

    Raises:
        UsageError, CheckpointError, PolicyError: the run cannot be meant as given; nothing was started.
        RunFailedError: shards are missing at the end; the same call finishes the job.
    """
    started = _Start(at=_now(), clock=time.monotonic())
    with RaySession(config.ray_address) as session:
        run = make_plan(config, has_gpu=session.uses_gpus(config.device))
        output = Output(config.output)
        output.prepare()
        with locked(output):
            return _resume(session, run, output, started)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """When the command began: what it plans and connects to is its time too."""

    at: str
    """ISO 8601, UTC."""
    clock: float


def _resume(session: RaySession, run: RunPlan, output: Output, started: _Start) -> ClassifyResult:
    config = run.config
    sabotage.reach("driver-planned")
    earlier = output.read_run()
    if config.overwrite and not can_go_on(run, earlier):
        output.set_aside()
        earlier = None
    done = check_output(run, output, earlier)
    run.catalog.save(output)
    if len(done) == len(run.shards) and earlier is not None and _still_holds(earlier, output):
        log.info(
            "nothing to do: all %d shards of %d files are committed%s",
            len(done),
            len(run.files),
            "; --control measures rows as they are classified, and none are: add --overwrite"
            if config.control
            else "",
        )
        _seal(output)  # a kill may have come between the record and the mark
        return ClassifyResult(record=earlier, new_shards=0)
    placement = place(
        session.resources(),
        on_gpus=session.uses_gpus(config.device),
        replicas=config.replica_range,
        threads=config.threads,
        weight_bytes=sum(weight.nbytes for weight in run.checkpoint.weights.values()),
        shards=sum(shard.flaw is None for name, shard in run.shards.items() if name not in done),
    )
    attempt = _Attempt(run, output, earlier, placement, started)
    attempt.execute(session, done)
    return ClassifyResult(record=attempt.record, new_shards=attempt.new_shards)


def _still_holds(earlier: RunRecord, output: Output) -> bool:
    """Whether an earlier run succeeded and its parts, of which some may have gone as stale, are all there."""
    return earlier.status == "succeeded" and earlier.totals.shards == len(output.parts())


def _seal(output: Output) -> None:
    """What is left to do once the record says that the run has succeeded."""
    sabotage.reach("run-recorded")
    output.mark_success()
    output.discard_aside()
    output.sweep()  # what replicas were writing when they were killed


class _Attempt:
    """One invocation on an output folder."""

    def __init__(
        self,
        run: RunPlan,
        output: Output,
        earlier: RunRecord | None,
        placement: Placement,
        started: _Start,
    ) -> None:
        self._run, self._output, self._placement, self._started = run, output, placement, started
        self._earlier = tuple(map(_ended, earlier.attempts)) if earlier else ()
        self._failures: list[ShardFailure] = []
        self._new: dict[str, ShardRecord] = {}
        # Of all parts in the folder, and of those alone that this run is about: an earlier one may have had others.
        self._totals = self._planned = Totals.zero(run.model.num_layers)
        self._known: Set[str] = set()
        """Parts that were there when the attempt began."""
        self._max_bad_rows = _max_bad_rows(run)
        self._written_at = 0.0

    @property
    def new_shards(self) -> int:
        """Shards committed by this attempt."""
        return len(self._new)

    def execute(self, session: RaySession, done: set[str]) -> None:
        """Run what is not `done`, and end the run one way or another."""
        remaining = {name: shard for name, shard in self._run.shards.items() if name not in done}
        self._output.sweep()
        self._output.remove([SUCCESS])
        # Parts of inputs that are no longer named count too: the folder is one table.
        known = read_shard_records(self._output, self._output.parts(), redone=remaining.keys())
        self._known = known.keys()
        self._output.keep_dead_letters(known.keys() | remaining.keys())
        self._totals = self._totals.plus(r.totals for r in known.values())
        self._planned = self._planned.plus(r.totals for name, r in known.items() if name in done)
        self._write("running", None)
        log.info(
            "%d files, %d shards: %d committed already, %d to do, in %s%s",
            len(self._run.files),
            len(self._run.shards),
            len(done),
            len(remaining),
            self._run.identity.precision,
            "" if self._run.may_exit else ", at full depth (no threshold that can fire is given or stored)",
        )
        self._failures = [_flawed(name, shard) for name, shard in remaining.items() if shard.flaw is not None]
        for failure in self._failures:
            log.error("%s; the other files go on", failure.reason)
        whole = [shard for shard in remaining.values() if shard.flaw is None]
        try:
            self._check_bad_rows()
            if whole:
                session.start()
                self._run_shards(session, whole)
            self._finish()
        except KeyboardInterrupt:
            self._write("interrupted", "interrupted")
            raise
        except BaseException as error:
            with suppress(OutputError):  # a full disk has no room for this either
                self._write("failed", str(error))
            raise
        self._write("succeeded", None)
        _seal(self._output)

    @property
    def record(self) -> RunRecord:
        """The run record as it stands in the output."""
        return self._record

    def _run_shards(self, session: RaySession, shards: list[Shard]) -> None:
        # On the driver's node: what ends the board's node ends the run anyway.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board: Any = (
            ray.remote(Board)
            .options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)
            .remote()
        )
        records = RecordLog(self._output, f"{self._started.at.replace(':', '')}-{uuid.uuid4().hex[:6]}")
        try:
            with showing_progress(board, self._run, self._planned):
                for outcome in outcomes(self._spec(board), self._placement, shards):
                    if isinstance(outcome, ShardRecord):
                        self._count(outcome, records)
                    else:
                        self._count_failure(outcome)
            if deaths := ray.get(board.deaths.remote()):
                log.warning("replicas died %d times with a shard in hand; others took over", deaths)
                session.keep_logs()
        except RayError as error:
            raise RunFailedError(f"{self._missing()}: {cause(error)}") from error
        finally:
            records.close()

    def _count(self, record: ShardRecord, records: RecordLog) -> None:
        records.append(record)
        sabotage.reach("shard-recorded")
        self._new[record.part] = record
        self._totals += record.totals
        self._planned += record.totals
        shard_log.info("%s", _shard_line(record, self._run.model.num_layers))
        self._check_bad_rows()
        if time.monotonic() - self._written_at >= _RECORD_SECONDS:
            with suppress(OutputError):  # its own trouble is not the run's
                self._write("running", None)

    def _count_failure(self, failure: ShardFailure) -> None:
        self._failures.append(failure)
        log.error("shard %s failed: %s", failure.part, failure.reason)
        if failure.is_fatal:
            raise RunFailedError(f"{self._missing()}: {failure.reason}")

    def _spec(self, board: Any) -> ReplicaSpec:
        run, config = self._run, self._run.config
        return ReplicaSpec(
            identity=run.identity,
            model=ray.put(_served(run)),
            device=self._placement.device,
            threads=self._placement.threads,
            shards_in_flight=self._placement.shards_in_flight,
            micro_batch_tokens=config.micro_batch_tokens,
            schema=run.schema,
            id_column=config.id_column,
            keep_columns=config.kept_columns,
            control=config.control,
            probabilities=config.probabilities,
            max_bad_rows=self._max_bad_rows,
            hang_seconds=config.hang_seconds,
            output=self._output,
            board=board,
        )

    def _check_bad_rows(self) -> None:
        count, limit = self._planned.bad_rows, self._max_bad_rows
        if count > limit:
            raise RunFailedError(too_many_bad_rows(count, limit, self._output))

    def _finish(self) -> None:
        """Prove that planned = committed, nothing more, with a Parquet reader that did not write the parts."""
        sabotage.reach("run-finishing")
        if self._failures:
            first = self._failures[0]
            raise RunFailedError(f"{self._missing()}: first {first.source_file!r}: {first.reason}")
        committed = self._output.parts()
        if missing := self._run.shards.keys() - committed:
            if unseen := missing & self._new.keys():
                raise RunFailedError(
                    f"{len(unseen)} parts that replicas wrote are not in {self._output.url!r}: is the output on a "
                    "file system that every node mounts?"
                )
            raise RunFailedError(self._missing())
        if strays := committed - self._known - self._new.keys():
            raise RunFailedError(
                f"{len(strays)} parts have come into {self._output.url!r} that this run neither found there nor wrote "
                f"(first {min(strays)}): a replica of another run was still at work; delete them, and the same "
                "command finishes the job"
            )
        from pipeline.report.evidence import verify_parts  # brings pandas and plotting along

        verify_parts({self._output.path(name): r.totals.rows for name, r in self._new.items()})

    def _missing(self) -> str:
        missing = len(self._run.shards.keys() - self._output.parts())
        return f"{missing} of {len(self._run.shards)} shards are not committed; the same command tries them again"

    def _write(self, status: RunStatus, error: str | None) -> None:
        attempt = Attempt(
            started_at=self._started.at,
            ended_at=None if status == "running" else _now(),
            status=status,
            host=socket.gethostname(),
            pid=os.getpid(),
            replicas=str(self._placement.replicas),
            device=self._placement.device,
            threads_per_replica=self._placement.threads,
            wall_seconds=round(time.monotonic() - self._started.clock, 3),
            committed_shards=len(self._new),
            committed_rows=sum(r.totals.rows for r in self._new.values()),
            error=error,
        )
        self._record = RunRecord(
            status=status,
            software_version=__version__,
            identity=self._run.identity,
            model=self._run.model,
            inputs=self._run.config.inputs,
            planned_shards=len(self._run.shards),
            planned_files=len(self._run.files),
            other_shards=self._totals.shards - self._planned.shards,
            shard_rows=self._run.shard_rows,
            columns=self._run.columns,
            id_column=self._run.config.id_column or "",
            totals=self._totals,
            attempts=(*self._earlier, attempt),
        )
        self._output.write_run(self._record)
        self._written_at = time.monotonic()


def _max_bad_rows(run: RunPlan) -> int:
    asked = run.config.max_bad_rows
    return max(_LEAST_BAD_ROWS, int(_BAD_ROW_SHARE * run.estimated_rows)) if asked is None else asked


def _served(run: RunPlan) -> ServedModel:
    tokenizer = TextTokenizer(
        run.checkpoint.tokenizer,
        max_length=run.identity.max_length,
        has_token_types=run.checkpoint.config.has_token_types,
        window_stride=run.identity.window_stride,
    )
    return ServedModel(fused=run.checkpoint.fused, tokenizer=tokenizer, labels=run.checkpoint.labels)


def _flawed(name: str, shard: Shard) -> ShardFailure:
    return ShardFailure(
        part=name, source_file=shard.source.path, first_row=shard.first_row, reason=shard.flaw or ""
    )


def _shard_line(record: ShardRecord, num_layers: int) -> str:
    """One line of ``key=value`` for whoever collects logs."""
    totals = record.totals
    exit_layers = sum(layer * left for layer, left in enumerate(totals.exit_windows))
    facts = {
        "shard": record.part,
        "source_file": json.dumps(record.source_file),
        "first_row": record.first_row,
        "rows": totals.rows,
        "bad_rows": totals.bad_rows,
        "mean_exit_layer": f"{exit_layers / max(1, sum(totals.exit_windows)):.2f}/{num_layers}",
        "tokens": totals.tokens,
        "read_seconds": f"{totals.read_seconds:.3f}",
        "tokenize_seconds": f"{totals.tokenize_seconds:.3f}",
        "write_seconds": f"{totals.write_seconds:.3f}",
        "replica": record.replica,
    }
    return " ".join(f"{name}={value}" for name, value in facts.items())


def _ended(attempt: Attempt) -> Attempt:
    """An earlier attempt as it must have ended: we hold the lock, so nobody runs any more."""
    if attempt.status != "running":
        return attempt
    return replace(attempt, status="failed", error="killed: it never said how it ended")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
