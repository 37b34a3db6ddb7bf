"""A run of four rows in two parts, by hand: its record, its parts, and both on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.stats import EngineStats
from pipeline.records import Attempt, Identity, ModelRecord, RunRecord, ShardRecord, Totals

HOSTILE = '<script>alert("x")</script>'
LABELS = ("no", HOSTILE)

# Four rows of 3, 2, 5 and 2 tokens, in two parts; a model of 2 layers. Rows 1 to 3 leave after layer 1.
ROWS: dict[str, list[Any]] = {
    "prediction": [0, 1, 1, 0],
    "exit_layer": [1, 1, 1, 2],
    "num_tokens": [3, 2, 5, 2],
    "score": [0.9, 0.8, 0.95, 0.6],
    "truncated": [False, False, True, False],
    "audit_prediction": [None, 0, None, 0],
}


def stats(
    *, tokens: tuple[int, int], squared: tuple[int, int], samples: tuple[int, int], **rest: Any
) -> EngineStats:
    work = {
        "tokens": tokens,
        "squared_tokens": squared,
        "samples": samples,
        "off_ramp_samples": (0, *samples),
    }
    return dataclasses.replace(EngineStats.zero(2), steps=(1, 1), **work, **rest)


COMPUTE = stats(tokens=(12, 2), squared=(42, 4), samples=(4, 1), seconds=(3.0, 0.5), embedding_seconds=0.5)
# Rows 2 and 4 (4 tokens) at full depth: off-ramps are not computed there.
CONTROL = dataclasses.replace(
    stats(tokens=(4, 4), squared=(8, 8), samples=(2, 2), seconds=(1.0, 1.0), embedding_seconds=0.2),
    off_ramp_samples=(0, 0, 2),
)
TOTALS = Totals(
    shards=2,
    rows=4,
    bad_rows=1,
    truncated_rows=1,
    tokens=12,
    squared_tokens=42,
    exit_rows=(0, 3, 1),
    exit_windows=(0, 3, 1),
    exit_tokens=(0, 10, 2),
    compute=COMPUTE,
    control=CONTROL,
    audited_rows=2,
    audit_agreements=1,
    read_seconds=0.1,
    tokenize_seconds=0.1,
    write_seconds=0.1,
)
ATTEMPT = Attempt(
    started_at="2026-01-01T00:00:00Z",
    ended_at="2026-01-01T00:00:08Z",
    status="succeeded",
    host="h",
    pid=1,
    replicas="1",
    device="cpu",
    threads_per_replica=1,
    wall_seconds=8.0,
    committed_shards=2,
    committed_rows=4,
)
RECORD = RunRecord(
    status="succeeded",
    software_version="0",
    identity=Identity(
        model_digest="m",
        exit_policy={"type": "entropy", "thresholds": [0.2]},
        tokenizer_digest="t",
        text_columns=("text",),
        max_length=5,
        precision="float32",
        digest="d",
    ),
    model=ModelRecord(
        path="model",
        num_layers=2,
        hidden_size=2,
        intermediate_size=8,
        labels=LABELS,
        off_ramp_layers=(1,),
        off_ramp_pooling="cls",
    ),
    inputs=("in.parquet",),
    planned_shards=2,
    planned_files=1,
    shard_rows=2,
    columns=("row_id string",),
    totals=TOTALS,
    attempts=(ATTEMPT,),
)


def with_totals(**changes: Any) -> RunRecord:
    return dataclasses.replace(RECORD, totals=dataclasses.replace(TOTALS, **changes))


# The same, but the third row was longer than 5 tokens: windows of 5 and 4 left after layers 1 and 2.
WINDOWED = dataclasses.replace(
    with_totals(
        truncated_rows=0,
        tokens=16,
        squared_tokens=58,
        exit_rows=(0, 2, 2),
        exit_windows=(0, 3, 2),
        exit_tokens=(0, 5, 11),
        compute=stats(tokens=(16, 6), squared=(58, 20), samples=(5, 2), seconds=(3.0, 1.0)),
    ),
    identity=dataclasses.replace(RECORD.identity, window_stride=1),
)
WINDOWED_ROWS: dict[str, list[Any]] = {
    "exit_layer": [1, 1, 2, 2],
    "num_tokens": [3, 2, 9, 2],
    "num_windows": [1, 1, 2, 1],
    "truncated": [False] * 4,
}
UNMEASURED = with_totals(control=EngineStats.zero(2), audited_rows=0, audit_agreements=0)
EMPTY = dataclasses.replace(RECORD, status="running", totals=Totals.zero(2), attempts=())


def write_part(path: Path, rows: slice, **changes: list[Any]) -> None:
    values = {**ROWS, **changes}
    prediction = pa.array(values["prediction"][rows], pa.int32())
    columns = {
        "row_id": pa.array([f"in.parquet:{i}" for i in range(4)][rows]),
        "prediction": prediction,
        "label": pa.DictionaryArray.from_arrays(
            pa.array([p % 2 for p in values["prediction"]][rows], pa.int32()), LABELS
        ),
        "score": pa.array(values["score"][rows], pa.float32()),
        "exit_layer": pa.array(values["exit_layer"][rows], pa.int16()),
        "num_tokens": pa.array(values["num_tokens"][rows], pa.int32()),
        "truncated": pa.array(values["truncated"][rows], pa.bool_()),
        "audit_prediction": pa.array(values["audit_prediction"][rows], pa.int32()),
    }
    if "num_windows" in changes:
        columns["num_windows"] = pa.array(changes["num_windows"][rows], pa.int32())
    if "label" in changes:
        columns["label"] = pa.array(changes["label"][rows]).dictionary_encode()
    pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=1)


def write_run(folder: Path, record: RunRecord = RECORD, **changes: list[Any]) -> Path:
    (folder / "_deebert").mkdir(parents=True)
    (folder / "_deebert" / "run.json").write_text(json.dumps(record.to_dict()))
    write_shard_records(folder, record.totals)
    write_part(folder / "part-0.parquet", slice(0, 2), **changes)
    write_part(folder / "part-1.parquet", slice(2, 4), **changes)
    return folder


def write_shard_records(folder: Path, totals: Totals) -> None:
    """Those of the two parts: the first has all that `totals` say, the second nothing."""
    rest = dataclasses.replace(Totals.zero(2), shards=1)
    both = {"part-0.parquet": dataclasses.replace(totals, shards=1), "part-1.parquet": rest}
    records = (
        ShardRecord(part=name, source_file="in", first_row=0, replica="h:1", finished_at="", totals=its)
        for name, its in both.items()
    )
    (folder / "_deebert" / "shards").mkdir()
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in records)
    (folder / "_deebert" / "shards" / "first.jsonl").write_text(lines)


def parts(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("part-*.parquet"))]
