"""A trace comes back from Parquet bit for bit, and a file that is none is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deebert.cost import ModelShape
from deebert.errors import DataError
from deebert.evaluation import LabelledSequences, Trace
from deebert.packing import PackedTokens
from jobs.timing import Measure, Timing
from jobs.traces import (
    _KEY,
    StaticRecord,
    TracedSet,
    TraceFile,
    TraceOrigin,
    data_digest,
    read_traces,
    write_traces,
)
from pipeline.errors import UsageError

ORIGIN = TraceOrigin(
    model="m",
    model_digest="abc",
    data_digest="def",
    task="mnli",
    labels=("contradiction", "entailment", "neutral"),
    precision="float32",
    max_length=64,
    shape=ModelShape(num_layers=5, hidden_size=32, intermediate_size=48, num_labels=3),
)
STATIC = StaticRecord(depth=2, style="first", recipe={"backbone": "b", "learning_rate": 2e-5})
TIMING = Timing(
    name="0.2",
    rounds=3,
    alone=Measure(samples=3, seconds=0.1, mean_exit_layer=2.5),
    engine=Measure(samples=7, seconds=1 / 3, mean_exit_layer=2.25),
)


def traced(seed: int, rows: int) -> TracedSet:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, rows, 3, generator=generator)
    logits[0, 0] = torch.tensor([float("inf"), -0.0, 1e-42])  # a denormal and a signed zero
    trace = Trace(layers=(2, 4, 5), logits=logits, lengths=np.arange(3, 3 + rows, dtype=np.int64))
    answers = {STATIC.name: torch.arange(rows) % 2}
    return TracedSet(trace=trace, labels=torch.arange(rows) % 3, static_predictions=answers)


FILE = TraceFile(
    origin=ORIGIN,
    sets={"matched": traced(0, 7), "mismatched": traced(1, 4)},
    timings={"matched": (TIMING,)},
    statics=(STATIC,),
    agreeing=5,
)


def test_a_trace_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_traces(tmp_path / "deep" / "t.parquet", FILE)
    back = read_traces(tmp_path / "deep" / "t.parquet")

    assert back.origin == ORIGIN
    assert back.timings == FILE.timings
    assert back.statics == (STATIC,)
    assert back.agreeing == 5
    assert list(back.sets) == ["matched", "mismatched"]
    for name, before in FILE.sets.items():
        after = back.sets[name]
        assert after.trace.layers == before.trace.layers
        assert torch.equal(after.trace.logits.view(torch.int32), before.trace.logits.view(torch.int32))
        assert after.trace.lengths.tolist() == before.trace.lengths.tolist()
        assert after.labels.tolist() == before.labels.tolist()
        assert after.static_predictions.keys() == {"static 2 (first)"}
        assert torch.equal(after.static_predictions[STATIC.name], before.static_predictions[STATIC.name])
        assert after.trace.lengths.dtype == np.int64
        assert after.labels.dtype == torch.long
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.parquet"]


def test_a_trace_of_windows_comes_back_as_texts(tmp_path: Path) -> None:
    windows = {"matched": np.array([2, 1, 4]), "mismatched": np.array([1, 1, 2])}
    sets = {}
    for name, one in FILE.sets.items():
        trace = replace(one.trace, windows=windows[name])
        answers = {STATIC.name: torch.tensor([1, 0, 1])}
        sets[name] = TracedSet(trace=trace, labels=torch.tensor([2, 0, 1]), static_predictions=answers)
    file = replace(FILE, origin=replace(ORIGIN, window_stride=4), sets=sets)

    write_traces(tmp_path / "t.parquet", file)
    back = read_traces(tmp_path / "t.parquet")

    assert back.origin == file.origin
    for name, before in sets.items():
        after = back.sets[name]
        assert after.trace.windows is not None
        assert after.trace.windows.tolist() == windows[name].tolist()
        assert after.trace.lengths.tolist() == before.trace.lengths.tolist()
        assert after.labels.tolist() == [2, 0, 1]
        assert after.static_predictions[STATIC.name].tolist() == [1, 0, 1]


def test_a_trace_from_before_there_were_windows_and_counts_of_labels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_traces(path, FILE)
    table = pq.read_table(path)
    document = json.loads(table.schema.metadata[b"deebert.trace"])
    del document["origin"]["window_stride"]
    del document["agreeing"]
    pq.write_table(table.replace_schema_metadata({b"deebert.trace": json.dumps(document)}), path)

    assert read_traces(path).origin == ORIGIN


def test_a_trace_is_a_table_to_others(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_traces(path, FILE)

    found = duckdb.sql(f"select set, count(*), sum(num_tokens), sum(logits_4[2]) from '{path}' group by set")

    expected = {
        name: (len(one.labels), int(one.trace.lengths.sum()), float(one.trace.logits[1, :, 1].sum()))
        for name, one in FILE.sets.items()
    }
    rows = {name: tuple(values) for name, *values in found.fetchall()}
    assert rows.keys() == expected.keys()
    for name, values in expected.items():
        assert rows[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.parametrize("content", [b"", b"no Parquet at all"])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"t\.parquet' is not a trace of `deebert evaluate`: remove it"):
        read_traces(path)


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    duckdb.sql(f"copy (select 1 as x) to '{tmp_path / 't.parquet'}' (format parquet)")

    with pytest.raises(DataError, match="is not a trace"):
        read_traces(tmp_path / "t.parquet")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"no JSON", b'{"statics": [{"depth": 1}], "origin": {}}'])
def test_a_table_that_says_it_is_a_trace_and_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({_KEY: content}), path)

    with pytest.raises(DataError, match="is not a trace"):
        read_traces(path)


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match="cannot write the trace"):
        write_traces(tmp_path / "file" / "t.parquet", FILE)


def test_the_datas_digest_sees_tokens_labels_and_boundaries() -> None:
    def digest(texts: list[list[int]], labels: list[int], name: str = "") -> str:
        data = LabelledSequences(tokens=PackedTokens.pack(texts), labels=torch.tensor(labels))
        return data_digest({name: data})

    given = digest([[1, 2], [3]], [0, 1])
    assert given == digest([[1, 2], [3]], [0, 1])
    others = [
        digest([[1, 2], [4]], [0, 1]),
        digest([[1], [2, 3]], [0, 1]),
        digest([[1, 2], [3]], [1, 1]),
        digest([[1, 2], [3]], [0, 1], "matched"),
    ]
    assert given not in others
