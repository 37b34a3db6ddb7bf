"""Everything that can be known before an actor starts: what will run, and whether it may.

Resolves `ClassifyConfig` against the model, the inputs and the output, and refuses what cannot be meant.
Knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deebert.checkpoint import Checkpoint, load_checkpoint
from deebert.exit_policy import EntropyThreshold, LearningToExit, StoredPolicy, policy_from_dict
from deebert.precision import resolve_precision
from deebert.problem import REGRESSION
from pipeline.catalog import Catalog
from pipeline.config import ClassifyConfig, Thresholds
from pipeline.errors import OutputError, UsageError
from pipeline.input_schema import InputSchema, check_columns, spelled_type
from pipeline.inputs import InputFile, discover, real_path
from pipeline.records import Identity, ModelRecord, RunRecord
from pipeline.schema import RESERVED_COLUMNS, Answers, part_table
from pipeline.shard import Shard, parse_part_name, part_name, source_key
from pipeline.shards import plan, suitable_shard_rows
from pipeline.sink import SUCCESS, Output
from pipeline.tokenization import TextTokenizer, check_windows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunPlan:
    """A run that may start."""

    config: ClassifyConfig
    checkpoint: Checkpoint
    identity: Identity
    model: ModelRecord
    files: tuple[InputFile, ...]
    catalog: Catalog
    """What is known of them now, for the next run on the output."""
    schema: InputSchema
    columns: tuple[str, ...]
    """Name and Arrow type of each output column."""
    shard_rows: int
    shards: dict[str, Shard]
    """Every shard of the inputs, by the name of its part."""

    @property
    def estimated_rows(self) -> int:
        """Rows of all shards, exact where the format tells."""
        return sum(shard.estimated_rows for shard in self.shards.values())

    @property
    def may_exit(self) -> bool:
        """Whether a row could leave before the last layer."""
        policy = policy_from_dict(self.identity.exit_policy)
        return any(map(policy.can_fire, range(self.model.num_layers)))


def make_plan(config: ClassifyConfig, *, has_gpu: bool) -> RunPlan:
    """Resolve and check a run, the output's earlier content aside.

    Raises:
        UsageError, CheckpointError, PolicyError: the run cannot be meant as given.
    """
    output = Output(config.output)
    files = _inputs(config, output)
    try:
        earlier = output.read_run()
        shard_rows = _shard_rows(config, earlier, files)
        catalog = Catalog.of(output, shard_rows=shard_rows)
    except OutputError as error:
        raise UsageError(f"{error}; mend that, or choose another output") from error
    schema = check_columns(
        files,
        _text_columns(config),
        _other_columns(config),
        catalog=catalog,
        begun={} if earlier is None or config.overwrite else _types_of(config, earlier),
    )
    checkpoint = load_checkpoint(config.model)
    if config.probabilities and checkpoint.config.problem is REGRESSION:
        raise UsageError(
            f"the model {config.model!r} is a regression, whose answers are numbers without probabilities: leave "
            "--probabilities out"
        )
    identity = _identity(config, checkpoint, has_gpu=has_gpu)
    shards = plan(files, shard_rows=shard_rows, catalog=catalog)
    return RunPlan(
        config=config,
        checkpoint=checkpoint,
        identity=identity,
        model=_model_record(checkpoint),
        files=files,
        catalog=catalog,
        schema=schema,
        columns=_columns(config, schema, checkpoint, identity),
        shard_rows=shard_rows,
        shards={part_name(shard, identity.digest): shard for shard in shards},
    )


def check_output(run: RunPlan, output: Output, earlier: RunRecord | None) -> set[str]:
    """The parts that this run's shards have already; refuses an output that holds something else.

    Raises:
        UsageError: another run's output, another shard size, or an input that changed since.
    """
    existing = output.parts()
    if earlier is None:
        if existing:
            raise UsageError(
                f"the output {output.url!r} holds {len(existing)} parts but no run record: choose another output, "
                "or discard them with --overwrite"
            )
        return set()
    _check_same_run(run, output, earlier)
    stale = _stale_parts(run, existing)
    if stale and run.config.on_changed != "redo":  # parts go at that word alone
        paths = sorted(set(stale.values()))
        raise UsageError(
            f"the input {paths[0]!r}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} changed since it was "
            f"classified into {output.url!r}: classify it again with --on-changed redo, or choose another output"
        )
    if stale:
        log.info("%d parts belong to inputs that changed: doing them again", len(stale))
        # Old answers go before new ones come: a kill in between leaves rows missing, never twice.
        output.remove([SUCCESS])
        output.remove_parts(stale)
    return existing & run.shards.keys()


def can_go_on(run: RunPlan, earlier: RunRecord | None) -> bool:
    """Whether the output holds this very run, unfinished: going on with it is what its command means."""
    return (
        earlier is not None
        and earlier.status != "succeeded"
        and earlier.identity.digest == run.identity.digest
        and earlier.shard_rows == run.shard_rows
        and earlier.columns == run.columns
        and earlier.model.labels == run.model.labels
        and _has_same_ids(run, earlier)
    )


def _has_same_ids(run: RunPlan, earlier: RunRecord) -> bool:
    return earlier.id_column in (None, run.config.id_column or "")


def _stale_parts(run: RunPlan, existing: set[str]) -> dict[str, str]:
    """Parts of planned input files that are not planned any more, with the file's path.

    Not those of files that cannot be read now: nobody knows whether these changed.
    """
    unknown = {shard.source.path for shard in run.shards.values() if shard.flaw is not None}
    paths = {source_key(file): file.path for file in run.files if file.path not in unknown}
    named = {name: parse_part_name(name) for name in existing - run.shards.keys()}
    return {name: paths[p.source_key] for name, p in named.items() if p is not None and p.source_key in paths}


def _check_same_run(run: RunPlan, output: Output, earlier: RunRecord) -> None:
    if earlier.identity.digest != run.identity.digest:
        mine, theirs = vars(run.identity), vars(earlier.identity)
        name = next(key for key in mine if mine[key] != theirs[key])
        # What auto chooses changes with the machine, and with what is known of the model.
        go_on = f"go on with --precision {theirs[name]}, " if name == "precision" else ""
        raise UsageError(
            f"the output {output.url!r} holds another run: its {name.replace('_', ' ')} is {_short(theirs[name])}, "
            f"this one's is {_short(mine[name])}; {go_on}choose another output, or discard it with --overwrite"
        )
    if earlier.shard_rows != run.shard_rows:
        raise UsageError(
            f"the output {output.url!r} was begun with --shard-rows {earlier.shard_rows}, which names its parts: "
            f"go on with that, or start over with --overwrite"
        )
    if earlier.model.labels != run.model.labels:  # which the digest of the weights leaves out
        raise UsageError(
            f"the output {output.url!r} holds answers with the labels {_short(earlier.model.labels)}, this model's are "
            f"{_short(run.model.labels)}: give the model that began it, or start over with --overwrite"
        )
    if not _has_same_ids(run, earlier):
        raise UsageError(
            f"the output {output.url!r} was begun {_id_flag(earlier.id_column)}, this run is "
            f"{_id_flag(run.config.id_column)}: its row_id would hold two kinds of ids; give the same, or start over "
            "with --overwrite"
        )
    if earlier.columns != run.columns:
        pairs = itertools.zip_longest(earlier.columns, run.columns, fillvalue="none")
        before, now = next(pair for pair in pairs if pair[0] != pair[1])
        raise UsageError(
            f"the output {output.url!r} holds rows of other columns (first difference: {before}, now {now}): give the "
            "same --keep-columns, in the same order, and --probabilities, or start over with --overwrite"
        )


def _id_flag(column: str | None) -> str:
    return f"with --id-column {column}" if column else "without --id-column"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _inputs(config: ClassifyConfig, output: Output) -> tuple[InputFile, ...]:
    """The input files, without what earlier runs wrote into an output inside an input folder."""
    inside = f"{real_path(output.as_input).rstrip('/')}/"
    files = tuple(file for file in discover(config.inputs) if not real_path(file.path).startswith(inside))
    if not files:
        raise UsageError(
            f"the input {', '.join(config.inputs)} holds nothing but the output: give the texts' path"
        )
    return files


def _shard_rows(config: ClassifyConfig, earlier: RunRecord | None, files: Sequence[InputFile]) -> int:
    """What was asked for, else what the output was begun with, else what suits the corpus."""
    if config.shard_rows is not None:
        return config.shard_rows
    if earlier is None or (config.overwrite and earlier.status == "succeeded"):
        return suitable_shard_rows(files)
    return earlier.shard_rows


def _text_columns(config: ClassifyConfig) -> tuple[str, ...]:
    return tuple(c for c in (config.text_column, config.text_pair_column) if c is not None)


def _other_columns(config: ClassifyConfig) -> tuple[str, ...]:
    taken: dict[str, str] = {}
    for name in dict.fromkeys(config.kept_columns):
        # Many readers of tables, Spark among them, take names that differ in case for one.
        if (folded := name.casefold()) in RESERVED_COLUMNS:
            raise UsageError(f"--keep-columns {name} is the name of an output column: rename it in the input")
        if taken.setdefault(folded, name) != name:
            raise UsageError(
                f"--keep-columns {taken[folded]} and {name} are one name to readers that ignore case: rename one "
                "in the input"
            )
    wanted = (*((config.id_column,) if config.id_column else ()), *config.kept_columns)
    return tuple(dict.fromkeys(wanted))


def _types_of(config: ClassifyConfig, earlier: RunRecord) -> dict[str, Any]:
    """The types that id and kept columns have in the output, as far as those are such as JSON lines show.

    Of JSON lines no file declares them, and what today's files show may be another type than the first ones showed.
    """
    names = {name: name for name in config.kept_columns}
    if config.id_column and earlier.id_column == config.id_column:
        names[config.id_column] = "row_id"
    return {
        name: type_
        for name, recorded in names.items()
        for column in earlier.columns
        if column.startswith(f"{recorded} ")
        and (type_ := spelled_type(column.removeprefix(f"{recorded} "))) is not None
    }


def _columns(
    config: ClassifyConfig, schema: InputSchema, checkpoint: Checkpoint, identity: Identity
) -> tuple[str, ...]:
    """What the parts will look like: those of a table without rows."""
    for field in schema.kept:
        try:
            pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
        except pa.ArrowException as error:
            raise UsageError(
                f"column {field.name!r} is {field.type}, which Parquet cannot hold: leave it out of --id-column and "
                "--keep-columns, or convert it in the input"
            ) from error
    labels = checkpoint.labels
    table = part_table(
        Answers.empty(checkpoint.config.problem, len(labels)),
        source_file="",
        kept=schema.kept.empty_table(),
        id_column=config.id_column,
        keep_columns=config.kept_columns,
        labels=labels,
        with_probabilities=config.probabilities,
        with_windows=config.window_stride is not None,
        with_certainty=policy_from_dict(identity.exit_policy).reads_certainty,
    )
    return tuple(f"{field.name} {field.type}" for field in table.schema)


def _identity(config: ClassifyConfig, checkpoint: Checkpoint, *, has_gpu: bool) -> Identity:
    max_length = resolve_max_length(config.max_length, config.micro_batch_tokens, checkpoint)
    check_windows(
        checkpoint.tokenizer,
        max_length=max_length,
        window_stride=config.window_stride,
        of_pairs=config.text_pair_column is not None,
    )
    tokenizer = TextTokenizer(checkpoint.tokenizer, max_length=max_length)
    content: dict[str, Any] = {
        "model_digest": checkpoint.digest,
        "exit_policy": resolve_policy(
            config.entropy_threshold, config.certainty_threshold, checkpoint
        ).to_dict(),
        "tokenizer_digest": tokenizer.digest(),
        "text_columns": _text_columns(config),
        "max_length": max_length,
        "precision": resolve_precision(
            config.precision, has_gpu=has_gpu, int8_agreement=checkpoint.config.int8_agreement
        ),
    }
    if config.window_stride is not None:  # without windows, the digest that earlier versions gave
        content["window_stride"] = config.window_stride
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Identity(**content, digest=digest)


def resolve_max_length(asked: int | None, micro_batch_tokens: int | None, checkpoint: Checkpoint) -> int:
    """The tokens a text is cut to: what was asked for, or what the model was trained with.

    Raises:
        UsageError: more than the model has positions for, or than a micro-batch holds.
    """
    chosen = asked or checkpoint.default_max_length
    if chosen > checkpoint.longest_input:
        raise UsageError(
            f"--max-length {chosen} is more than the {checkpoint.longest_input} tokens that the model has "
            "positions for: give at most that"
        )
    if micro_batch_tokens is not None and chosen > micro_batch_tokens:
        raise UsageError(
            f"--micro-batch-tokens {micro_batch_tokens} cannot hold one text of --max-length {chosen}: "
            f"give at least {chosen}"
        )
    return chosen


def resolve_policy(
    entropy: Thresholds | None, certainty: Thresholds | None, checkpoint: Checkpoint
) -> StoredPolicy:
    """The policy asked for, or the model's own operating point.

    A list with one threshold more than the layers before the last begins with that of the off-ramp on the
    embeddings, where the model has one.

    Raises:
        UsageError: thresholds of both kinds.
        PolicyError: a threshold out of range, a wrong number of them, or none of a kind that the model knows.
    """
    if entropy is not None and certainty is not None:
        raise UsageError(
            "--entropy-threshold and --certainty-threshold are two ways to decide who leaves: give one"
        )
    config = checkpoint.config
    asked, kind = (certainty, LearningToExit) if entropy is None else (entropy, EntropyThreshold)
    policy: StoredPolicy = checkpoint.exit_policy
    if isinstance(asked, tuple) and 0 in config.off_ramp_layers and len(asked) == config.num_hidden_layers:
        policy = kind(asked[1:], layer_0=asked[0])
    elif asked is not None:
        policy = kind(asked)
    policy.check(
        problem=config.problem,
        num_labels=len(checkpoint.labels),
        num_layers=config.num_hidden_layers,
        learns_to_exit=config.learns_to_exit,
    )
    return policy


def _model_record(checkpoint: Checkpoint) -> ModelRecord:
    config = checkpoint.config
    return ModelRecord(
        path=checkpoint.path,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        labels=checkpoint.labels,
        off_ramp_layers=tuple(config.off_ramp_layers),
        off_ramp_pooling=config.off_ramp_pooling,
        problem_type=config.problem.name,
    )
