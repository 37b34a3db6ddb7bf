"""`classify` on real Ray and real files: the contract of DESIGN's Output, Commit and Success."""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import duckdb
import fastparquet
import numpy as np
import polars
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from deebert.checkpoint import load_checkpoint
from deebert.reference import classify_one, classify_windows
from pipeline import ClassifyConfig, classify
from pipeline.config import Replicas
from pipeline.errors import OutputError, RunFailedError, UsageError
from pipeline.records import RunRecord
from pipeline.report import write_report
from pipeline.sink import Output
from tests.conftest import make_model
from tests.integration.conftest import sentences, write_parquet

pytestmark = pytest.mark.usefixtures("ray_session")

TIE = 1e-5
"""Entropies this close to the threshold may fall on either side: float32 products are not associative."""


def make_config(saved_model: Path, tmp_path: Path) -> ClassifyConfig:
    """Two files of 300 and 150 rows, shards of 100, float32, a threshold in the middle."""
    write_parquet(tmp_path / "in" / "a.parquet", sentences(300, seed=1), row_group_size=120)
    write_parquet(tmp_path / "in" / "b.parquet", sentences(150, seed=2), row_group_size=1000)
    return ClassifyConfig(
        model=str(saved_model),
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        entropy_threshold=0.7,
        precision="float32",
        shard_rows=100,
        micro_batch_tokens=256,
        replicas=Replicas(1, 1),
        threads=1,
    )


@pytest.fixture
def config(saved_model: Path, tmp_path: Path) -> ClassifyConfig:
    return make_config(saved_model, tmp_path)


@dataclass(frozen=True)
class Finished:
    """A run that nobody changes: a Ray actor takes seconds to start."""

    config: ClassifyConfig
    record: RunRecord

    @property
    def parts(self) -> list[Path]:
        return sorted(Path(self.config.output).glob("part-*.parquet"))


@pytest.fixture(scope="module")
def finished(saved_model: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Finished:
    """A run with every column there is, and a control sample."""
    config = replace(
        make_config(saved_model, tmp_path_factory.mktemp("finished")),
        id_column="key",
        keep_columns=("weight",),
        probabilities=True,
        control=0.3,
    )
    return Finished(config, classify(config).record)


def rows_of(output: str | Path) -> pa.Table:
    """All rows of the output, in the order of their sources."""
    table = pyarrow.dataset.dataset(str(output)).to_table()
    return table.sort_by([("source_file", "ascending"), ("source_row", "ascending")])


def run_record(config: ClassifyConfig) -> dict[str, Any]:
    return json.loads((Path(config.output) / "_deebert" / "run.json").read_text())


def exit_rows_of(config: ClassifyConfig, name: str) -> list[int]:
    """The exit-layer histogram of one source file's rows."""
    rows = rows_of(config.output)
    is_its = [Path(file).name == name for file in rows["source_file"].to_pylist()]
    return np.bincount(rows.filter(is_its)["exit_layer"], minlength=6).tolist()


def dead_letters(config: ClassifyConfig) -> list[dict[str, Any]]:
    files = sorted((Path(config.output) / "_deebert" / "dead_letters").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


class TestAnswers:
    @pytest.mark.parametrize("replicas", [1, 2])
    def test_equal_the_reference_for_every_row(self, config: ClassifyConfig, replicas: int) -> None:
        classify(replace(config, replicas=Replicas(replicas, replicas)))

        checkpoint = load_checkpoint(config.model)
        texts = sentences(300, seed=1) + sentences(150, seed=2)
        ties = 0
        for text, row in zip(texts, rows_of(config.output).to_pylist(), strict=True):
            ids = checkpoint.tokenizer(text)["input_ids"]
            expected = classify_one(checkpoint.model, ids, [0.7] * 4)
            if expected.margin < TIE:
                ties += 1
                continue
            assert (row["prediction"], row["exit_layer"]) == (expected.label, expected.exit_layer)
            assert row["entropy"] == pytest.approx(expected.entropy, abs=1e-4)
            assert row["num_tokens"] == len(ids)
        assert ties <= 2

    def test_equal_the_reference_after_the_embeddings_too(
        self, config: ClassifyConfig, tmp_path: Path, tokenizer: Any
    ) -> None:
        model = make_model("bert", "both", off_ramp_layers=[0, 1, 3], shares_off_ramp_pooler=True)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        thresholds = (0.05, 0.6, None, 0.05, None)
        run = replace(config, model=str(tmp_path / "model"), entropy_threshold=thresholds, control=0.3)

        record = classify(run).record

        layers = []
        for text, row in zip(
            sentences(300, seed=1) + sentences(150, seed=2), rows_of(run.output).to_pylist(), strict=True
        ):
            ids = tokenizer(text)["input_ids"]
            expected = classify_one(model, ids, thresholds[1:], layer_0=thresholds[0])
            layers.append(row["exit_layer"])
            if expected.margin >= TIE:
                assert (row["prediction"], row["exit_layer"]) == (expected.label, expected.exit_layer)
        histogram = np.bincount(layers, minlength=6)
        assert min(histogram[[0, 1, 3, 5]]) > 10
        assert record.totals.exit_rows == tuple(histogram.tolist())
        assert record.totals.compute.off_ramp_samples[0] == 450
        assert record.identity.exit_policy == {
            "type": "entropy",
            "thresholds": [0.6, None, 0.05, None],
            "layer_0": 0.05,
        }
        assert write_report(run.output, price_per_hour=None).evidence.findings == ()
        assert classify(run).new_shards == 0

    def test_leave_at_several_layers(self, finished: Finished) -> None:
        """Without which the test above would prove little."""
        assert sum(rows > 10 for rows in finished.record.totals.exit_rows) >= 3

    def test_control_rows_carry_the_answer_of_full_depth(self, finished: Finished, tmp_path: Path) -> None:
        full_output = str(tmp_path / "full")
        classify(replace(finished.config, entropy_threshold=-1.0, control=0.0, output=full_output))

        audited = rows_of(finished.config.output)["audit_prediction"].to_pylist()
        full = rows_of(full_output)["prediction"].to_pylist()
        pairs = [(a, f) for a, f in zip(audited, full, strict=True) if a is not None]
        assert 0.2 < len(pairs) / len(full) < 0.4
        assert all(a == f for a, f in pairs)
        assert finished.record.totals.audited_rows == len(pairs)
        assert finished.record.totals.control.samples == (len(pairs),) * 5

    def test_work_is_counted_exactly(self, finished: Finished) -> None:
        totals, rows = finished.record.totals, rows_of(finished.config.output)
        tokens, layers = (rows[c].to_numpy().astype(np.int64) for c in ("num_tokens", "exit_layer"))
        assert totals.compute.tokens == tuple(int(tokens[layers > i].sum()) for i in range(5))
        assert totals.compute.layer_tokens == int((tokens * layers).sum())
        assert totals.exit_rows == tuple(np.bincount(layers, minlength=6).tolist())


class TestOutput:
    def test_a_relative_folder_is_the_drivers(
        self, config: ClassifyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Replicas have the working directory of the Ray that they live in."""
        monkeypatch.chdir(tmp_path)
        assert classify(replace(config, output="out")).record.status == "succeeded"
        assert rows_of(tmp_path / "out").num_rows == 450

    def test_parts_that_the_driver_cannot_see(
        self, config: ClassifyConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Output, "parts", lambda self: set())  # here; replicas are other processes
        said = f"7 parts that replicas wrote are not in '{config.output}': is the output on a file system that every"
        with pytest.raises(RunFailedError, match=re.escape(said)):
            classify(config)
        assert not (Path(config.output) / "_SUCCESS").exists()

    def test_has_the_columns_of_the_contract(self, finished: Finished) -> None:
        assert pq.read_schema(finished.parts[0]).remove_metadata() == pa.schema(
            {
                "row_id": pa.string(),
                "source_file": pa.string(),
                "source_row": pa.int64(),
                "weight": pa.float64(),
                "prediction": pa.int32(),
                "label": pa.dictionary(pa.int32(), pa.string()),
                "score": pa.float32(),
                "exit_layer": pa.int16(),
                "entropy": pa.float32(),
                "num_tokens": pa.int32(),
                "truncated": pa.bool_(),
                "audit_prediction": pa.int32(),
                "probabilities": pa.list_(pa.field("element", pa.float32())),
            }
        )

    def test_names_and_keeps_what_was_asked_for(self, finished: Finished) -> None:
        rows = rows_of(finished.config.output).to_pylist()
        assert [r["row_id"] for r in rows] == [f"a-{i}" for i in range(300)] + [f"b-{i}" for i in range(150)]
        assert [r["weight"] for r in rows] == [r["source_row"] for r in rows]

    def test_stands_in_input_order_inside_each_part(self, finished: Finished) -> None:
        for part in finished.parts:
            rows = pq.read_table(part)["source_row"].to_pylist()
            assert rows == list(range(rows[0], rows[0] + len(rows)))

    def test_probabilities_are_the_answer(self, finished: Finished) -> None:
        for row in rows_of(finished.config.output).to_pylist():
            probabilities = row["probabilities"]
            assert sum(probabilities) == pytest.approx(1, abs=1e-5)
            assert max(probabilities) == row["score"] == probabilities[row["prediction"]]
            assert row["entropy"] == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-4)
            assert row["label"] == ("negative", "neutral", "positive")[row["prediction"]]

    def test_all_readers_see_one_table(self, finished: Finished) -> None:
        output, parts = finished.config.output, list(map(str, finished.parts))
        columns = ["row_id", "source_row", "label", "score", "exit_layer", "audit_prediction"]
        order = ["source_file", "source_row"]
        expected = rows_of(output).select(columns).to_pylist()

        duck = duckdb.sql(f"select * from read_parquet('{output}/*.parquet')").to_arrow_table()
        polar = polars.read_parquet(f"{output}/*.parquet").sort(order)
        fast = fastparquet.ParquetFile(parts).to_pandas().sort_values(order)

        assert duck.sort_by([(c, "ascending") for c in order]).select(columns).to_pylist() == expected
        assert polar.select(columns).to_dicts() == expected
        for column in columns[:-1]:
            assert fast[column].tolist() == [row[column] for row in expected]

    def test_footer_names_the_run(self, finished: Finished) -> None:
        for part in finished.parts:
            metadata = pq.read_metadata(part)
            footer = metadata.metadata
            assert footer[b"deebert.identity"].decode() == finished.record.identity.digest
            assert int(footer[b"deebert.rows"]) == metadata.num_rows
            assert sum(json.loads(footer[b"deebert.exit_histogram"])) == metadata.num_rows

    def test_success_is_planned_equals_committed(self, finished: Finished) -> None:
        output, record = Path(finished.config.output), finished.record
        assert record.id_column == "key"
        assert (output / "_SUCCESS").exists()
        assert record.status == "succeeded"
        assert record.planned_shards == record.totals.shards == len(finished.parts)
        assert record.totals.rows == 450
        assert not list((output / "_deebert" / "tmp").iterdir())


class TestInputs:
    def test_every_format_gives_the_same_answers(self, config: ClassifyConfig, tmp_path: Path) -> None:
        texts = [t for t in sentences(60, seed=3) if t] + ['the "film", good', "bad\nplot"]
        lines = [t for t in texts if "\n" not in t]
        folder = tmp_path / "formats"
        folder.mkdir()
        csv = "text\n" + "".join('"' + t.replace('"', '""') + '"\n' for t in texts)
        (folder / "a.csv").write_text(csv)
        (folder / "b.csv.gz").write_bytes(gzip.compress(csv.encode()))
        (folder / "c.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        (folder / "d.txt").write_text("".join(t + "\n" for t in lines))
        write_parquet(folder / "e.parquet", texts)
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "f"))

        classify(replace(config, input=(str(folder / "*"),)))

        rows = rows_of(config.output).to_pylist()
        answers: dict[str, list[tuple[int, int]]] = {}
        for row in rows:
            name = Path(row["source_file"]).relative_to(folder).parts[0]
            answers.setdefault(name, []).append((row["prediction"], row["exit_layer"]))
        whole = answers.pop("e.parquet")
        assert len(whole) == len(texts)
        assert answers.pop("d.txt") == whole[:-1]
        assert answers == dict.fromkeys(("a.csv", "b.csv.gz", "c.jsonl", "f"), whole)

    def test_pairs(self, config: ClassifyConfig, saved_model: Path, tmp_path: Path) -> None:
        left, right = sentences(40, seed=4, longest=10), sentences(40, seed=5, longest=10)
        pq.write_table(pa.table({"one": left, "two": right}), tmp_path / "pairs.parquet")
        classify(
            replace(
                config, input=(str(tmp_path / "pairs.parquet"),), text_column="one", text_pair_column="two"
            )
        )
        checkpoint = load_checkpoint(str(saved_model))
        for row, a, b in zip(rows_of(config.output).to_pylist(), left, right, strict=True):
            tokens = checkpoint.tokenizer(a, b, return_token_type_ids=True)
            expected = classify_one(
                checkpoint.model, tokens["input_ids"], [0.7] * 4, tokens["token_type_ids"]
            )
            assert (row["prediction"], row["exit_layer"]) == (expected.label, expected.exit_layer)

    def test_long_text_is_cut_and_flagged(self, config: ClassifyConfig, tmp_path: Path) -> None:
        write_parquet(tmp_path / "long.parquet", ["good", "very " * 500, "good " * 14, "good " * 15])
        classify(replace(config, input=(str(tmp_path / "long.parquet"),), max_length=16))
        rows = rows_of(config.output).to_pylist()
        assert [(r["num_tokens"], r["truncated"]) for r in rows] == [
            (3, False),
            (16, True),
            (16, False),
            (16, True),
        ]

    def test_long_texts_in_windows(self, config: ClassifyConfig, tmp_path: Path) -> None:
        """Each row once, as the reference answers it, and the work counted window by window."""
        texts = [*sentences(60, seed=9, longest=60), " ".join(sentences(400, seed=10)), "", "film " * 14]
        write_parquet(tmp_path / "long.parquet", texts)
        windowed = replace(
            config,
            input=(str(tmp_path / "long.parquet"),),
            max_length=16,
            window_stride=5,
            shard_rows=25,
            control=0.3,
            probabilities=True,
        )
        totals = classify(windowed).record.totals

        table, checkpoint = rows_of(windowed.output), load_checkpoint(config.model)
        assert table.schema.field("num_windows").type == pa.int32()
        rows = table.to_pylist()
        assert [row["source_row"] for row in rows] == list(range(63))
        left, squared, ties = np.zeros(6, np.int64), 0, 0
        for text, row in zip(texts, rows, strict=True):
            cut = {"truncation": True, "max_length": 16, "stride": 5, "return_overflowing_tokens": True}
            windows = checkpoint.tokenizer(text, **cut)["input_ids"]
            assert (row["num_windows"], row["num_tokens"]) == (len(windows), sum(map(len, windows)))
            assert not row["truncated"]
            expected = classify_windows(checkpoint.model, windows, [0.7] * 4)
            left += np.bincount([window.exit_layer for window in expected.windows], minlength=6)
            squared += sum(len(window) ** 2 for window in windows)
            if row["audit_prediction"] is not None:
                at_full_depth = classify_windows(checkpoint.model, windows, [None] * 4)
                assert row["audit_prediction"] == at_full_depth.label
            if tied := sum(window.margin < TIE for window in expected.windows):
                ties += tied
                continue
            assert (row["prediction"], row["exit_layer"]) == (expected.label, expected.exit_layer)
            assert row["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)
            assert row["score"] == max(row["probabilities"])
            assert row["entropy"] == pytest.approx(expected.entropy, abs=1e-4)

        assert ties <= 2
        assert max(row["num_windows"] for row in rows) > 500
        assert np.abs(np.array(totals.exit_windows) - left).sum() <= 2 * ties
        assert totals.squared_tokens == squared
        assert totals.compute.samples == tuple(np.cumsum(totals.exit_windows[:0:-1])[::-1].tolist())
        audited = [row["num_windows"] for row in rows if row["audit_prediction"] is not None]
        assert (totals.audited_rows, totals.control.samples) == (len(audited), (sum(audited),) * 5)
        assert write_report(windowed.output, price_per_hour=None).evidence.findings == ()
        with pytest.raises(UsageError, match="its window stride is 5, this one's is null; choose another"):
            classify(replace(windowed, window_stride=None))

    def test_output_inside_the_input_is_not_input(self, config: ClassifyConfig, tmp_path: Path) -> None:
        inside = replace(config, output=str(tmp_path / "in" / "out"))
        classify(inside)
        assert classify(inside).new_shards == 0

    def test_urls_are_as_good_as_paths(self, config: ClassifyConfig, tmp_path: Path) -> None:
        """And without an id column a row is named after its source."""
        url = f"file://{tmp_path}"
        record = classify(replace(config, input=(f"{url}/in/*.parquet",), output=f"{url}/remote")).record
        rows = rows_of(tmp_path / "remote").to_pylist()
        assert record.totals.rows == len(rows) == 450
        assert rows[7]["row_id"].endswith("/in/a.parquet:7")


class TestRecord:
    def test_keeps_up_with_a_run_under_way(
        self, config: ClassifyConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.run._RECORD_SECONDS", 0.0)
        write, written = Output.write_run, list[tuple[str, int, int]]()

        def flaky(self: Output, record: RunRecord) -> None:
            attempt = record.attempts[-1]
            written.append((record.status, record.totals.rows, attempt.committed_rows))
            if len(written) == 3:
                raise OutputError("a PUT timed out")
            write(self, record)

        monkeypatch.setattr(Output, "write_run", flaky)
        assert classify(config).record.status == "succeeded"
        assert [status for status, _, _ in written] == ["running"] * 8 + ["succeeded"]
        rows = [rows for _, rows, _ in written]
        assert rows == [committed for _, _, committed in written] == sorted(rows)
        assert (rows[0], rows[7]) == (0, 450)


class TestResume:
    def test_a_finished_run_does_nothing(self, config: ClassifyConfig) -> None:
        classify(config)
        before = {p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*")}
        again = classify(config)
        assert again.new_shards == 0
        assert {
            p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*.parquet")
        }.items() <= before.items()

    def test_missing_parts_alone_are_done(self, config: ClassifyConfig) -> None:
        first = classify(config)
        whole = rows_of(config.output)
        parts = sorted(Path(config.output).glob("part-*.parquet"))
        for part in parts[:2]:
            part.unlink()
        (Path(config.output) / "_SUCCESS").unlink()
        # A run that was killed never said how it ended.
        path = Path(config.output) / "_deebert" / "run.json"
        path.write_text(path.read_text().replace('"status": "succeeded"', '"status": "running"'))

        again = classify(config)

        assert again.new_shards == 2
        assert again.record.totals.rows == first.record.totals.rows
        assert again.record.totals.exit_rows == first.record.totals.exit_rows
        redone = rows_of(config.output)
        exact = ["row_id", "prediction", "exit_layer", "num_tokens"]
        assert redone.select(exact).equals(whole.select(exact))
        # Other neighbours in the micro-batch, other rounding in the products.
        np.testing.assert_allclose(redone["entropy"], whole["entropy"], atol=1e-5)

    def test_new_files_and_lost_parts_alone_are_done(self, config: ClassifyConfig, tmp_path: Path) -> None:
        first = classify(config).record
        # The records went with their driver: the footers have them still.
        for file in (Path(config.output) / "_deebert" / "shards").iterdir():
            file.unlink()
        write_parquet(tmp_path / "in" / "c.parquet", sentences(50, seed=6))

        again = classify(config)

        assert again.new_shards == 1
        assert again.record.attempts[-1].committed_rows == 50
        assert again.record.totals.rows == rows_of(config.output).num_rows == 500
        assert again.record.totals.compute.layer_tokens > first.totals.compute.layer_tokens

        next(Path(config.output).glob("part-*.parquet")).unlink()
        assert classify(config).new_shards == 1

    def test_a_changed_input_is_refused_or_redone(self, config: ClassifyConfig, tmp_path: Path) -> None:
        classify(config)
        write_parquet(tmp_path / "in" / "b.parquet", sentences(70, seed=7))
        with pytest.raises(UsageError, match=r"b\.parquet' changed since .* --on-changed redo"):
            classify(config)
        assert rows_of(config.output).num_rows == 450

        again = classify(replace(config, on_changed="redo"))

        assert again.new_shards == 1
        rows = rows_of(config.output).to_pylist()
        assert len(rows) == 370
        assert len({r["row_id"] for r in rows}) == 370
        assert again.record.totals.rows == 370

    def test_a_redo_of_a_file_that_is_empty_now_leaves_nothing_of_it(
        self, config: ClassifyConfig, tmp_path: Path
    ) -> None:
        classify(config)
        file = tmp_path / "in" / "b.parquet"
        pq.write_table(pq.read_table(file).slice(0, 0), file)

        redo = classify(replace(config, on_changed="redo"))

        assert redo.new_shards == 0
        assert run_record(config)["totals"]["rows"] == rows_of(config.output).num_rows == 300
        assert run_record(config)["planned_shards"] == 5
        assert write_report(config.output, price_per_hour=None).evidence.findings == ()
        assert (Path(config.output) / "_SUCCESS").exists()
        before = run_record(config)
        assert classify(config).new_shards == 0
        assert run_record(config) == before, "nothing to do, nothing done"

    def test_rows_of_earlier_inputs_are_no_progress(
        self, config: ClassifyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The folder is one table of all, the display is about what was asked for now."""
        first = replace(config, input=(str(tmp_path / "in" / "a.parquet"),))
        classify(first)
        caplog.set_level(logging.INFO, "pipeline.progress")
        caplog.clear()
        second = classify(replace(config, input=(str(tmp_path / "in" / "b.parquet"),)))
        shown = [r.getMessage() for r in caplog.records if r.name == "pipeline.progress"]
        assert shown[-1].startswith("150 of ~150 rows")
        rows, layers = np.array(second.record.totals.exit_rows), np.arange(6)
        rows -= np.array(exit_rows_of(config, "a.parquet"))
        assert f"mean exit layer {(rows * layers).sum() / 150:.2f}/5" in shown[-1]
        assert second.record.totals.rows == 450
        counts = (second.record.totals.shards, second.record.planned_shards, second.record.other_shards)
        assert counts == (7, 2, 5)

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"entropy_threshold": 0.5}, "exit policy"),
            ({"max_length": 32}, "max length"),
            ({"precision": "bfloat16"}, "precision"),
            ({"text_column": "key"}, "text columns"),
            ({"shard_rows": 50}, "--shard-rows 100"),
            ({"keep_columns": ()}, "other columns .*weight double"),
            ({"id_column": "weight"}, "this run is with --id-column weight: "),
        ],
    )
    def test_another_run_is_refused(
        self, finished: Finished, change: dict[str, Any], difference: str
    ) -> None:
        with pytest.raises(UsageError, match=difference):
            classify(replace(finished.config, **change))

    @pytest.mark.parametrize(
        ("change", "difference"), [("weights", "model digest"), ("tokenizer", "tokenizer digest")]
    )
    def test_another_model_is_refused(
        self, finished: Finished, tmp_path: Path, change: str, difference: str
    ) -> None:
        other = tmp_path / "model"
        shutil.copytree(finished.config.model, other)
        if change == "weights":
            weights = safetensors.torch.load_file(other / "model.safetensors")
            weights["final_classifier.classifier.bias"][0] += 1e-3
            safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
        else:
            tokenizer = json.loads((other / "tokenizer.json").read_text())
            tokenizer["normalizer"]["lowercase"] = False
            (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(
            UsageError, match=f"its {difference} is .*, this one's is .*; choose another output"
        ):
            classify(replace(finished.config, model=str(other)))

    def test_overwriting_an_unfinished_run_of_the_same_kind_goes_on_with_it(
        self, config: ClassifyConfig, tmp_path: Path
    ) -> None:
        """So that the command which was cut short finishes the job, --overwrite and all."""
        classify(config)
        other = replace(config, entropy_threshold=-1.0, overwrite=True)
        (tmp_path / "in" / "gone.parquet").symlink_to(tmp_path / "nothing")
        with pytest.raises(RunFailedError, match=r"1 of 8 shards.*gone\.parquet"):
            classify(other)
        output = Path(config.output)
        assert {path.stem for path in (output / "_deebert" / "aside").glob("part-*")}, "the old run is kept"
        assert rows_of(output).num_rows == 450

        (tmp_path / "in" / "gone.parquet").unlink()
        done = classify(other)

        assert done.new_shards == 0
        assert done.record.attempts[0].committed_shards == 7
        assert not (output / "_deebert" / "aside").exists()
        assert classify(other).new_shards == 7, "a finished run is done anew"

    def test_overwrite_starts_over(self, config: ClassifyConfig) -> None:
        classify(config)
        other = replace(config, entropy_threshold=-1.0, overwrite=True)
        record = classify(other).record
        assert record.totals.exit_rows == (0, 0, 0, 0, 0, 450)
        assert rows_of(config.output)["exit_layer"].unique().to_pylist() == [5]


class TestBadInput:
    def test_bad_rows_are_set_aside_with_their_reason(self, config: ClassifyConfig, tmp_path: Path) -> None:
        lines = [b'{"text": "good"}', b'{"text": null}', b"{broken", b'{"text": "bad \xff"}', b'{"text": ""}']
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        record = classify(replace(config, input=(str(tmp_path / "rows.jsonl"),))).record
        assert rows_of(config.output)["source_row"].to_pylist() == [0, 4]
        assert [letter["source_row"] for letter in dead_letters(config)] == [1, 2, 3]
        assert all(letter["reason"] and letter["source_file"] for letter in dead_letters(config))
        assert (record.totals.rows, record.totals.bad_rows) == (2, 3)

    def test_too_many_bad_rows_fail_the_run(self, config: ClassifyConfig, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": null}\n' * 3 + '{"text": "good"}\n')
        strict = replace(config, input=(str(tmp_path / "rows.jsonl"),), max_bad_rows=2)
        with pytest.raises(RunFailedError, match="3 rows cannot be classified, more than --max-bad-rows 2"):
            classify(strict)
        assert not (Path(config.output) / "_SUCCESS").exists()
        assert run_record(config)["status"] == "failed"
        assert len(dead_letters(config)) == 3

        (tmp_path / "rows.jsonl").write_text('{"text": "mended"}\n' * 3)
        assert classify(strict).record.totals.bad_rows == 0
        assert dead_letters(config) == [], "those of a part that there never was"

    def test_too_many_bad_rows_fail_the_same_command_again(
        self, config: ClassifyConfig, tmp_path: Path
    ) -> None:
        """Each shard is within the limit, and committed: only their sum is not."""
        for name in ("a", "b"):
            (tmp_path / f"{name}.jsonl").write_text('{"text": null}\n' * 2 + '{"text": "good"}\n')
        both = tuple(str(tmp_path / f"{name}.jsonl") for name in ("a", "b"))
        strict = replace(config, input=both, max_bad_rows=3)
        for _ in range(2):
            with pytest.raises(
                RunFailedError, match="4 rows cannot be classified, more than --max-bad-rows 3"
            ):
                classify(strict)
            assert not (Path(config.output) / "_SUCCESS").exists()
            assert run_record(config)["status"] == "failed"
            assert rows_of(config.output).num_rows == 2

        # Rows of inputs that are not asked for any more are no business of this run's.
        done = classify(replace(strict, input=both[:1], max_bad_rows=2)).record
        assert (done.status, done.totals.bad_rows) == ("succeeded", 4)

    def test_a_broken_file_is_named_and_the_others_finish(
        self, config: ClassifyConfig, tmp_path: Path
    ) -> None:
        broken = tmp_path / "in" / "broken.parquet"
        write_parquet(broken, sentences(100, seed=8))
        content = bytearray(broken.read_bytes())
        content[8:200] = b"\xff" * 192  # the footer stays whole: planning cannot know
        broken.write_bytes(bytes(content))
        with pytest.raises(RunFailedError, match=r"1 of 8 shards are not committed.*broken\.parquet"):
            classify(config)
        assert rows_of(config.output).num_rows == 450
        assert not (Path(config.output) / "_SUCCESS").exists()

    def test_inputs_without_rows(self, config: ClassifyConfig, tmp_path: Path) -> None:
        (tmp_path / "empty.csv").write_text("text\n")
        record = classify(replace(config, input=(str(tmp_path / "empty.csv"),))).record
        assert record.status == "succeeded"
        assert record.totals.rows == 0
