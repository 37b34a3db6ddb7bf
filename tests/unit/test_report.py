"""The report: hand-checked arithmetic, an independent recount, and a page that trusts nobody's text."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from pipeline.errors import PipelineError, UsageError
from pipeline.records import RunRecord, Totals
from pipeline.report import (
    EvidenceError,
    account,
    evidence,
    gather_evidence,
    plots,
    verify_parts,
    write_report,
)
from pipeline.report import quantities as q
from pipeline.report.accounting import wilson_interval
from pipeline.report.facts import state_facts
from pipeline.report.html import render_page
from pipeline.report.ledger import Table, state_tables
from tests.run_by_hand import (
    ATTEMPT,
    COMPUTE,
    CONTROL,
    EMPTY,
    HOSTILE,
    LABELS,
    RECORD,
    TOTALS,
    UNMEASURED,
    WINDOWED,
    WINDOWED_ROWS,
    parts,
    with_totals,
    write_part,
    write_run,
)


class TestAccounting:
    def test_work_that_was_done_again_is_not_the_runs(self) -> None:
        """A replica had reported half of it, died, and another did all of it."""
        again = dataclasses.replace(
            COMPUTE,
            samples=(6, 2),
            tokens=(18, 4),
            squared_tokens=(63, 8),
            off_ramp_samples=(0, 6, 2),
            seconds=(4.5, 1.0),
            embedding_seconds=0.75,
        )
        killed, undisturbed = account(with_totals(compute=again)), account(RECORD)
        assert (undisturbed.repeated_seconds, killed.repeated_seconds) == (0, pytest.approx(2.25))
        for name in ("compute_seconds", "executed_flops", "flops_saved", "seconds_saved", "cost"):
            assert getattr(killed, name) == pytest.approx(getattr(undisturbed, name)), name
        for mine, theirs in zip(killed.layers, undisturbed.layers, strict=True):
            assert (mine.samples, mine.tokens, mine.saved_tokens) == (
                theirs.samples,
                theirs.tokens,
                theirs.saved_tokens,
            )

    def test_tokens_are_exact_whatever_rows_were_done_again(self) -> None:
        longest_again = dataclasses.replace(
            COMPUTE, samples=(5, 1), tokens=(17, 2), off_ramp_samples=(0, 5, 1)
        )
        layers = account(with_totals(compute=longest_again)).layers
        assert [(layer.samples, layer.tokens, layer.saved_tokens) for layer in layers] == [
            (4, 12, 0),
            (1, 2, 10),
        ]

    def test_windows_done_again_never_save_less_than_nothing(self) -> None:
        ran = WINDOWED.totals.compute
        again = dataclasses.replace(
            ran, samples=tuple(n + 1 for n in ran.samples), tokens=tuple(n + 30 for n in ran.tokens)
        )
        totals = dataclasses.replace(WINDOWED.totals, compute=again)
        layers = account(dataclasses.replace(WINDOWED, totals=totals)).layers
        assert layers[0].samples == sum(WINDOWED.totals.exit_windows)
        assert min(layer.saved_tokens for layer in layers) >= 0

    def test_layer_work(self) -> None:
        got = account(RECORD)
        assert got.mean_exit_layer == 1.25  # (3·1 + 1·2) / 4
        assert got.layer_work_saved == 0.375  # 1 - 1.25 / 2
        assert got.rows_per_second == 0.5

    def test_flops(self) -> None:
        # A layer: 2·tokens·(4·2² + 2·2·8) + 4·squared·2 = 96·tokens + 8·squared.
        # An off-ramp: 2·2·(2 + 2) = 16 a sample.
        got = account(RECORD)
        assert got.executed_flops == (96 * 12 + 8 * 42) + (96 * 2 + 8 * 4) + 16 * 5 == 1792
        assert got.full_depth_flops == 2 * (96 * 12 + 8 * 42) + 16 * 4 == 3040
        assert got.flops_saved == pytest.approx(1 - 1792 / 3040)

    def test_full_depth_is_measured_by_the_control_sample(self) -> None:
        # 2.2 s for 4 tokens; 12 tokens are 6.6 s; 4.0 s were spent.
        got = account(RECORD)
        assert got.full_depth is not None
        assert got.full_depth.seconds == got.full_depth.control_seconds == pytest.approx(6.6)
        assert (got.full_depth.basis, got.full_depth.control_rows) == ("measured", 2)
        assert got.seconds_saved == pytest.approx(1 - 4.0 / 6.6)
        assert [layer.full_depth_seconds for layer in got.layers] == pytest.approx([3.0, 3.0])

    def test_a_slow_control_sample_is_no_saving(self) -> None:
        # 2.4 s for 4 tokens are 7.2 s for all, but at the exits' 4.0 s for 1792 FLOPs full depth takes 6.79.
        slow = dataclasses.replace(CONTROL, seconds=(1.0, 1.2))
        got = account(with_totals(control=slow), price_per_hour=3.6)
        assert got.full_depth is not None
        assert got.cost is not None
        assert got.full_depth.control_seconds == pytest.approx(7.2)
        assert {got.full_depth.basis, got.cost.basis} == {"bounded"}
        assert got.full_depth.control_rows == 2
        assert got.seconds_saved == pytest.approx(got.flops_saved)
        assert got.cost.full_depth == pytest.approx(1000 * 3040 / 1792)

    def test_without_a_control_sample_full_depth_is_expected_and_says_so(self) -> None:
        got = account(UNMEASURED)
        assert got.full_depth is not None
        assert got.full_depth.seconds == pytest.approx(4.0 * 3040 / 1792)
        assert (got.full_depth.basis, got.full_depth.control_rows) == ("expected", 0)
        assert got.agreement is None
        assert {layer.full_depth_seconds for layer in got.layers} == {None}

    def test_cost_per_million(self) -> None:
        # 4.0 s for 4 rows are 1 s a row: 1e6 s at 3.60 an hour are 1000; full depth is 1.65 times that,
        # and one replica for 8 s of wall time twice.
        cost = account(RECORD, price_per_hour=3.6).cost
        assert cost is not None
        assert cost.with_exits == pytest.approx(1000)
        assert cost.full_depth == pytest.approx(1650)
        assert cost.wall == pytest.approx(2000)
        assert cost.basis == "measured"
        assert account(RECORD).cost is None

    def test_a_pool_that_grows_costs_what_it_may_grow_to(self) -> None:
        growing = dataclasses.replace(ATTEMPT, replicas="1:4")
        record = dataclasses.replace(RECORD, attempts=(ATTEMPT, growing))
        cost = account(record, price_per_hour=3.6).cost
        assert cost is not None
        assert cost.wall == pytest.approx(2000 * (1 + 4))

    def test_the_difference_of_a_regression_is_of_the_audited_rows(self) -> None:
        model = dataclasses.replace(RECORD.model, problem_type="regression")
        got = account(dataclasses.replace(with_totals(audit_distance=0.5), model=model))
        assert (got.difference, got.agreement) == (0.25, None)  # of 2 rows
        assert account(RECORD).difference is None

    def test_layers(self) -> None:
        first, second = account(RECORD).layers
        assert (first.layer, first.has_off_ramp, first.exit_rows, first.saved_tokens) == (1, True, 3, 0)
        assert (second.layer, second.has_off_ramp, second.exit_rows, second.saved_tokens) == (2, False, 1, 10)

    def test_what_was_run_is_counted_in_windows(self) -> None:
        got = account(WINDOWED)
        assert (got.rows, got.windows) == (4, 5)
        assert got.mean_exit_layer == 1.4  # (3·1 + 2·2) / 5
        assert got.layer_work_saved == pytest.approx(0.3)
        assert got.full_depth_flops == 2 * (96 * 16 + 8 * 58) + 16 * 5
        assert got.executed_flops == (96 * 16 + 8 * 58) + (96 * 6 + 8 * 20) + 16 * 7
        assert got.full_depth is not None
        assert got.full_depth.control_seconds == pytest.approx(2.2 * 16 / 4)

    def test_rows_are_added_up_by_what_they_ran_on(self) -> None:
        one, other = (dataclasses.replace(TOTALS, hardware=h) for h in ({"a": 3}, {"a": 1, "b": 2}))
        assert (one + other).hardware == {"a": 4, "b": 2}
        assert (one + TOTALS).hardware == {"a": 3}
        assert Totals.from_dict(json.loads(json.dumps(other.to_dict()))) == other

    def test_a_record_from_before_there_were_windows_is_read(self) -> None:
        values = json.loads(json.dumps(RECORD.to_dict()))
        del values["totals"]["exit_windows"], values["identity"]["window_stride"]

        assert RunRecord.from_dict(values) == RECORD

    def test_an_empty_run_states_nothing(self) -> None:
        got = account(EMPTY, price_per_hour=1.0)
        stated = (
            got.mean_exit_layer,
            got.layer_work_saved,
            got.flops_saved,
            got.full_depth,
            got.seconds_saved,
        )
        assert {*stated, got.agreement, got.rows_per_second, got.cost} == {None}

    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        [(50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775)],
    )
    def test_wilson_interval(self, successes: int, trials: int, low: float, high: float) -> None:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


class TestEvidence:
    def test_sound_parts_agree(self, tmp_path: Path) -> None:
        got = gather_evidence(parts(write_run(tmp_path / "out")), RECORD)
        assert got.findings == ()
        assert (got.parts, got.rows, got.tokens, got.squared_tokens, got.truncated_rows) == (2, 4, 12, 42, 1)
        assert (got.exit_rows, got.exit_tokens) == ((0, 3, 1), (0, 10, 2))
        assert got.label_rows == (2, 2)
        assert (got.audited_rows, got.agreeing_rows) == ((0, 1, 1), (0, 0, 1))

    def test_parts_with_windows_agree(self, tmp_path: Path) -> None:
        got = gather_evidence(parts(write_run(tmp_path / "out", WINDOWED, **WINDOWED_ROWS)), WINDOWED)
        assert got.findings == ()
        assert (got.rows, got.windows, got.tokens, got.squared_tokens) == (4, 5, 16, 58)

    @pytest.mark.parametrize(
        ("changes", "quantity"),
        [
            ({"num_windows": [1, 1, 3, 1]}, "windows"),
            ({"num_tokens": [3, 3, 8, 2]}, "squared tokens"),
        ],
    )
    def test_a_disagreement_about_windows_is_found(
        self, tmp_path: Path, changes: dict[str, list[Any]], quantity: str
    ) -> None:
        folder = write_run(tmp_path / "out", WINDOWED, **{**WINDOWED_ROWS, **changes})
        got = gather_evidence(parts(folder), WINDOWED)
        assert quantity in {finding.quantity for finding in got.findings}

    def test_score_ranges(self, tmp_path: Path) -> None:
        first, second = gather_evidence(parts(write_run(tmp_path / "out")), RECORD).score_ranges
        assert (first.layer, first.rows, second.layer, second.rows) == (1, 3, 2, 1)
        assert (first.low, first.median, first.high) == pytest.approx((0.8, 0.9, 0.95), abs=0.006)

    @pytest.mark.parametrize(
        ("changes", "quantity"),
        [
            ({"exit_layer": [1, 1, 2, 2]}, "rows per exit layer"),
            ({"exit_layer": [0, 1, 1, 2]}, "rows with an exit layer that the model does not have"),
            ({"exit_layer": [1, 1, 1, 3]}, "rows with an exit layer that the model does not have"),
            ({"num_tokens": [4, 2, 5, 2]}, "tokens"),
            ({"num_tokens": [2, 3, 4, 3]}, "squared tokens"),
            ({"num_tokens": [3, 2, 2, 5]}, "tokens per exit layer"),
            ({"truncated": [True, True, True, False]}, "truncated rows"),
            ({"audit_prediction": [None, 1, None, 0]}, "control rows that agree"),
            ({"audit_prediction": [None, None, None, 0]}, "control rows"),
            ({"prediction": [0, 1, 1, 2]}, "rows whose label is not the name of their prediction"),
            ({"label": ["no", HOSTILE, "no", "no"]}, "rows whose label is not the name of their prediction"),
            ({"label": ["no", HOSTILE, HOSTILE, "maybe"]}, "rows with a label that the model does not have"),
            ({"label": ["no", HOSTILE, HOSTILE, None]}, "rows with a label that the model does not have"),
        ],
    )
    def test_a_disagreement_is_found(
        self, tmp_path: Path, changes: dict[str, list[Any]], quantity: str
    ) -> None:
        got = gather_evidence(parts(write_run(tmp_path / "out", **changes)), RECORD)
        assert quantity in {finding.quantity for finding in got.findings}

    def test_a_missing_part_is_found(self, tmp_path: Path) -> None:
        got = gather_evidence(parts(write_run(tmp_path / "out"))[:1], RECORD)
        found = {finding.quantity: (finding.recorded, finding.recounted) for finding in got.findings}
        assert found["parts"] == ("2", "1")
        assert found["rows"] == ("4", "2")
        assert found["rows per exit layer"] == ("0, 3, 1", "0, 2, 0")

    def test_a_part_without_rows_is_fine(self, tmp_path: Path) -> None:
        write_part(tmp_path / "part-0.parquet", slice(0, 0))
        got = gather_evidence(parts(tmp_path), dataclasses.replace(EMPTY, totals=Totals.zero(2)))
        assert [finding.quantity for finding in got.findings] == ["parts"]

    def test_parts_are_read_beside_each_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = parts(write_run(tmp_path / "out"))
        all_open = threading.Barrier(len(paths), timeout=60)

        class Slow(evidence.ParquetFile):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                all_open.wait()  # breaks where one waits for another's end
                super().__init__(*args, **kwargs)

        monkeypatch.setattr(evidence, "ParquetFile", Slow)
        assert gather_evidence(paths, RECORD).findings == ()

    def test_it_tells_how_far_the_reading_is(self, tmp_path: Path) -> None:
        told: list[int] = []

        @contextmanager
        def watch(total: int) -> Iterator[Callable[[int], object]]:
            told.append(total)
            yield told.append

        gather_evidence(parts(write_run(tmp_path / "out")), RECORD, watch=watch)
        assert told == [2, 1, 1]

    def test_it_reads_with_fastparquet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []

        class Spy(evidence.ParquetFile):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                opened.append(args[0])
                super().__init__(*args, **kwargs)

        paths = parts(write_run(tmp_path / "out"))
        monkeypatch.setattr(evidence, "ParquetFile", Spy)
        monkeypatch.setattr(pq, "ParquetFile", None)
        monkeypatch.setattr(pq, "read_table", None)
        assert gather_evidence(paths, RECORD).findings == ()
        assert sorted(opened) == paths
        assert evidence.ParquetFile.__mro__[1].__module__.startswith("fastparquet")

    def test_verify_parts_reads_footers_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evidence.ParquetFile, "iter_row_groups", None)
        verify_parts(dict.fromkeys(parts(write_run(tmp_path / "out")), 2))
        verify_parts({})

    def test_verify_parts_names_the_part_that_disagrees(self, tmp_path: Path) -> None:
        first, second = parts(write_run(tmp_path / "out"))
        with pytest.raises(EvidenceError, match=r"part-1\.parquet' holds 2 rows, but 3 were committed"):
            verify_parts({first: 2, second: 3})

    @pytest.mark.parametrize("content", [b"", b"not parquet at all", None])
    def test_an_unreadable_part_is_named(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "part-0.parquet"
        if content is not None:
            path.write_bytes(content)
        for check in (lambda: verify_parts({str(path): 0}), lambda: gather_evidence([str(path)], RECORD)):
            with pytest.raises(EvidenceError, match=r"part-0\.parquet cannot be read"):
                check()

    def test_a_damaged_page_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "part-0.parquet"
        write_part(path, slice(0, 4))
        content = bytearray(path.read_bytes())
        content[4:400] = bytes(396)
        path.write_bytes(content)
        with pytest.raises(EvidenceError, match="is damaged"):
            gather_evidence([str(path)], RECORD)

    def test_a_foreign_part_is_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"prediction": [1]}), tmp_path / "part-0.parquet")
        with pytest.raises(PipelineError, match="lacks the column label"):
            gather_evidence(parts(tmp_path), RECORD)


class TestTables:
    @pytest.fixture
    def tables(self, tmp_path: Path) -> dict[str, Table]:
        """Those of a run of whose two control rows both agree, where the record says one."""
        folder = write_run(tmp_path / "out", audit_prediction=[0, None, None, 0])
        found = gather_evidence(parts(folder), RECORD)
        return {table.title: table for table in state_tables(RECORD, account(RECORD), found)}

    def test_bad_rows_are_a_share_of_all_and_truncated_ones_of_the_good(
        self, tables: dict[str, Table]
    ) -> None:
        assert tables["Bad and truncated rows"].rows == (
            ("Bad rows", "1", "20.0 %"),
            ("Truncated rows", "1", "25.0 %"),
        )

    def test_agreement_is_of_the_rows_that_were_audited(self, tables: dict[str, Table]) -> None:
        assert [row[-2:] for row in tables["Layer by layer"].rows] == [("1", "100.0 %"), ("1", "100.0 %")]

    def test_a_recount_of_more_than_was_recorded_is_not_the_same(self, tables: dict[str, Table]) -> None:
        assert tables["Recount"].rows[-2:] == (
            ("Control rows that agree", "1", "2", "NO"),
            ("Rows that left before the last layer", "3", "3", "yes"),
        )


def all_plots(record: RunRecord, labels: tuple[str, ...] = LABELS) -> Iterator[str]:
    accounting = account(record, price_per_hour=1.0)
    ranges = (evidence.ScoreRange(layer=1, rows=3, low=0.3, median=0.9, high=1.0),)
    drawn = (
        plots.exit_histogram(accounting),
        plots.layer_work(accounting),
        plots.seconds_per_layer(accounting),
        plots.flops_comparison(accounting),
        plots.seconds_comparison(accounting),
        plots.cost_comparison(accounting.cost),
        plots.label_distribution(labels, range(len(labels)), of=accounting.rows),
        plots.score_ranges(ranges, record.model.num_layers),
    )
    return (svg for svg in drawn if svg is not None)


class TestPlots:
    @pytest.mark.parametrize("record", [RECORD, UNMEASURED, EMPTY], ids=["measured", "expected", "empty"])
    def test_they_are_xml_without_references(self, record: RunRecord) -> None:
        for svg in all_plots(record):
            assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
            assert set(re.findall(r"https?://[^\"' ]+", svg)) == {"http://www.w3.org/2000/svg"}

    def test_ids_are_unique_across_the_page(self) -> None:
        ids = [found for svg in all_plots(RECORD) for found in re.findall(r'\bid="([^"]+)"', svg)]
        assert len(ids) == len(set(ids))
        for svg in all_plots(RECORD):
            targets = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
            assert set(targets) <= set(re.findall(r'\bid="([^"]+)"', svg))

    def test_the_same_numbers_give_the_same_bytes(self) -> None:
        assert list(all_plots(RECORD)) == list(all_plots(RECORD))

    def test_numbers_stand_in_the_text(self) -> None:
        texts = "|".join(ElementTree.fromstring(plots.exit_histogram(account(RECORD))).itertext())
        assert "75.0" in texts
        assert "25.0" in texts
        assert "mean 1.25" in texts

    def test_hostile_names_stay_text(self) -> None:
        names = (HOSTILE, "$a$ & $b", "nul\x00\x1b[31m", "日本語", "long " * 50, 'id="x" #1f2a37')
        svg = plots.label_distribution(names, [6, 5, 4, 3, 2, 1], of=21)
        texts = list(ElementTree.fromstring(svg).itertext())
        assert "<script" not in svg
        assert {"$a$ & $b", "nul\ufffd\ufffd[31m", "日本語", 'id="x" #1f2a37'} <= set(texts)

    def test_many_labels_are_summed(self) -> None:
        svg = plots.label_distribution([f"class {i}" for i in range(100)], [1] * 100, of=100)
        texts = list(ElementTree.fromstring(svg).itertext())
        assert "89 others" in texts
        assert "89  (89.0 %)" in texts

    def test_of_several_labels_a_row_each_has_its_share_of_the_rows(self) -> None:
        svg = plots.label_distribution(LABELS, [100, 50], of=100, one_each=False)
        assert {"100  (100.0 %)", "50  (50.0 %)"} <= set(ElementTree.fromstring(svg).itertext())
        many = plots.label_distribution([f"class {i}" for i in range(13)], [9] * 13, of=10, one_each=False)
        texts = list(ElementTree.fromstring(many).itertext())
        assert texts.count("9  (90.0 %)") == 11
        assert "18" in texts  # of the two others; which rows have both is not known

    def test_nothing_is_left_behind_in_matplotlib(self) -> None:
        import matplotlib

        before = dict(matplotlib.rcParams)
        list(all_plots(RECORD))
        assert dict(matplotlib.rcParams) == before


class TestWriteReport:
    def test_page_and_text(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "out")
        report = write_report(str(folder), price_per_hour=3.6)
        page = Path(report.path).read_text(encoding="utf-8")
        assert Path(report.path) == folder / "_deebert" / "report.html"
        for said in (
            "39.4 %",
            "$1,000.00",
            "$1,650.00",
            "$2,000.00",
            "1 of 2 control rows",
            "measured on 2 control rows",
        ):
            assert said in page
            assert said in report.text
        assert page.count("(measured)</text>") == 2
        assert page.count("<svg") == 8
        assert 'role="alert"' not in page
        assert "!!" not in report.text

    def test_labels_of_a_multi_label_run_are_shares_of_its_rows(self, tmp_path: Path) -> None:
        """All four rows have all thirteen labels."""
        labels = tuple(f"class {i}" for i in range(13))
        model = dataclasses.replace(RECORD.model, labels=labels, problem_type="multi_label_classification")
        record, accounting = dataclasses.replace(RECORD, model=model), account(RECORD)
        found = gather_evidence(parts(write_run(tmp_path / "out")), RECORD)
        found = dataclasses.replace(found, label_rows=(4,) * 13)
        page = render_page("out", record, accounting, found, state_facts(record, accounting, found))
        assert page.count(">4  (100.0 %)</text>") == 11
        assert page.count(">8</text>") == 1  # of the two others: whose rows are the same ones

    def test_work_that_was_done_again_is_told_apart(self, tmp_path: Path) -> None:
        again = COMPUTE + COMPUTE
        killed = write_report(str(write_run(tmp_path / "a", with_totals(compute=again))), price_per_hour=None)
        undisturbed = write_report(str(write_run(tmp_path / "b")), price_per_hour=None)
        assert re.search(r"Compute time done again +4 s", killed.text)
        assert "done again" not in undisturbed.text

    def test_the_page_is_self_contained_and_escapes(self, tmp_path: Path) -> None:
        record = dataclasses.replace(
            RECORD,
            inputs=(HOSTILE,),
            model=dataclasses.replace(RECORD.model, path=HOSTILE),
            attempts=(dataclasses.replace(ATTEMPT, error=HOSTILE, host='"><img src=x>'),),
        )
        folder = write_run(tmp_path / "<b>&out", record)
        page = Path(write_report(str(folder), price_per_hour=None).path).read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"'< ]+", page)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"<(script|link|img|iframe|b)\b", page)
        assert not re.search(r"\b(src|@import)\b\s*=?\s*[\"'(]", page)
        assert "&lt;script&gt;" in page

    def test_what_is_not_measured_names_its_remedy(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "out", UNMEASURED, audit_prediction=[None] * 4)
        report = write_report(str(folder), price_per_hour=None)
        page = Path(report.path).read_text(encoding="utf-8")
        assert report.evidence.findings == ()
        assert "not measured" in report.text
        # The same command with --control finds all shards committed, and measures nothing.
        remedy = "classify with --control 0.01, into a new output or with --overwrite, to measure it"
        assert remedy in " ".join(report.text.split())
        assert "<code>--control</code> 0.01" in page
        assert "Compute time saved (expected)" in page
        assert "control rows at full depth" not in page

    @pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
    def test_an_unfinished_run_says_so_first(self, tmp_path: Path, status: Any) -> None:
        attempt = dataclasses.replace(ATTEMPT, status=status, error="the node was lost")
        record = dataclasses.replace(RECORD, status=status, planned_shards=5, attempts=(attempt,))
        report = write_report(str(write_run(tmp_path / "out", record)), price_per_hour=None)
        first = " ".join(report.text.split("\n\n")[0].split())
        assert first.startswith(f"!! This run is not finished (status: {status}): 2 of 5 planned shards")
        assert "the node was lost" in first
        assert 'role="alert"' in Path(report.path).read_text(encoding="utf-8")

    @pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
    def test_an_unfinished_run_is_what_its_parts_are(self, tmp_path: Path, status: Any) -> None:
        """Its record is as old as its driver's last word, which a kill does not wait for."""
        folder = write_run(tmp_path / "out")
        old = dataclasses.replace(
            EMPTY, status=status, attempts=(dataclasses.replace(ATTEMPT, status=status),)
        )
        (folder / "_deebert" / "run.json").write_text(json.dumps(old.to_dict()))
        report = write_report(str(folder), price_per_hour=None)
        assert report.evidence.findings == ()
        assert report.accounting.rows == 4
        assert "2 of 2 planned shards are committed" in " ".join(report.text.split())

    def test_shards_of_inputs_that_it_did_not_name_are_none_that_it_planned(self, tmp_path: Path) -> None:
        record = dataclasses.replace(RECORD, status="failed", planned_shards=5, other_shards=1)
        said = write_report(str(write_run(tmp_path / "out", record)), price_per_hour=None).text
        assert "1 of 5 planned shards are committed beside 1 of earlier inputs, and" in " ".join(said.split())

    def test_a_page_that_cannot_be_written_is_a_problem_of_the_page(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = write_run(tmp_path / "out")
        page = folder / "_deebert" / "report.html"
        page.mkdir()
        assert cli.main(["report", str(folder)]) == 0
        out, _ = capsys.readouterr()
        assert "Rows classified" in out
        assert str(page) not in out
        assert caplog.messages == [f"no page beside the table: cannot write {page}: Is a directory"]
        report = write_report(str(folder), price_per_hour=None)
        assert (report.problem, report.path) == (f"cannot write {page}: Is a directory", str(page))
        page.rmdir()
        assert cli.main(["report", str(folder)]) == 0
        assert capsys.readouterr().out.endswith(f"\n{page}\n")

    def test_nothing_committed_yet(self, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        (folder / "_deebert").mkdir(parents=True)
        (folder / "_deebert" / "run.json").write_text(json.dumps(EMPTY.to_dict()))
        report = write_report(str(folder), price_per_hour=2.0)
        assert report.evidence.findings == ()
        assert "0 of 2 planned shards" in report.text
        assert "nan" not in report.text
        assert "<svg" not in Path(report.path).read_text(encoding="utf-8")

    def test_a_disagreement_is_loud(self, tmp_path: Path) -> None:
        report = write_report(str(write_run(tmp_path / "out", exit_layer=[1, 1, 2, 2])), price_per_hour=None)
        loud = "The parts disagree with the run record on rows per exit layer: recorded 0, 3, 1, recounted 0, 2, 2."
        assert report.text.startswith(f"!! {loud}")
        assert "NOT agree" in report.text
        assert loud in Path(report.path).read_text(encoding="utf-8")

    def test_exits_that_cost_more_than_they_save_are_not_hidden(self, tmp_path: Path) -> None:
        slow = dataclasses.replace(COMPUTE, seconds=(9.0, 1.0))
        report = write_report(
            str(write_run(tmp_path / "out", with_totals(compute=slow))), price_per_hour=None
        )
        assert report.text.startswith("!! The exits cost more time than they saved")
        assert f"{q.MINUS}59.1 %" in report.text  # 1 - 10.5 / 6.6

    def test_a_control_sample_in_tiny_micro_batches_is_flagged(self, tmp_path: Path) -> None:
        tiny = dataclasses.replace(CONTROL, steps=(2, 2))
        report = write_report(
            str(write_run(tmp_path / "out", with_totals(control=tiny))), price_per_hour=None
        )
        assert "smaller micro-batches (1 samples) than the exit lane (4)" in " ".join(report.text.split())

    def test_a_control_sample_slower_than_the_exits_is_said_to_bound_nothing(self, tmp_path: Path) -> None:
        slow = dataclasses.replace(CONTROL, seconds=(1.0, 1.2))
        report = write_report(str(write_run(tmp_path / "out", with_totals(control=slow))), price_per_hour=3.6)
        text = " ".join(report.text.split())
        assert "41.1 %" in text  # 1 - 1792 / 3040
        assert "44.4 %" not in text
        said = "bounded by the FLOPs saved: 2 control rows at full depth say more, but ran in slower micro-batches"
        assert said in text
        assert "times all tokens are 7.2 s, for in fewer and emptier micro- batches they took longer" in text
        # 1,000 with exits, by FLOPs 1,696.43; the control rows' 7.2 s would be 1,800.
        assert "$1,696.43 at full depth (bounded)" in text
        assert "the exits' own seconds per FLOP, times all FLOPs; the control rows took longer" in text
        assert "1,800" not in text
        page = Path(report.path).read_text(encoding="utf-8")
        assert page.count("(bounded)</text>") == 2  # under the bars of seconds and of money
        assert "measured on" not in text
        assert "(measured)" not in page
        assert "</i>control rows at full depth<" in page  # of each layer

    def test_the_machines_are_named(self, tmp_path: Path) -> None:
        mixed = with_totals(hardware={"NVIDIA H200": 1, "AMD EPYC": 3})
        found, old = (
            Path(write_report(str(folder), price_per_hour=None).path).read_text(encoding="utf-8")
            for folder in (write_run(tmp_path / "out", mixed), write_run(tmp_path / "old"))
        )
        assert "AMD EPYC (3 rows); NVIDIA H200 (1 rows)" in found
        assert "not recorded" in old

    def test_windows_are_named(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "out", WINDOWED, **WINDOWED_ROWS)
        report = write_report(str(folder), price_per_hour=None)
        text = " ".join(report.text.split())
        assert "of 2 layers, over 5 windows; 30.0 % of layer work saved" in text
        page = Path(report.path).read_text(encoding="utf-8")
        assert "in windows; neighbours share 1 tokens" in page
        assert "Share of windows per exit layer" in page
        assert "Share of rows" not in page
        assert "counts windows, not their length" in page
        assert "windows" not in write_report(str(write_run(tmp_path / "rows")), price_per_hour=None).text

    def test_urls_work(self, tmp_path: Path) -> None:
        fs = fsspec.filesystem("memory")
        fs.put(str(write_run(tmp_path / "out")), "/report-test/run", recursive=True)
        try:
            report = write_report("memory://report-test/run", price_per_hour=None)
            assert report.evidence.findings == ()
            assert fs.cat("/report-test/run/_deebert/report.html").startswith(b"<!DOCTYPE html>")
        finally:
            fs.rm("/report-test", recursive=True)

    def test_odd_folder_names_work(self, tmp_path: Path) -> None:
        report = write_report(str(write_run(tmp_path / "out [1] *#é")), price_per_hour=None)
        assert report.evidence.findings == ()

    def test_a_folder_without_a_run_is_an_error_of_use(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="holds no run"):
            write_report(str(tmp_path), price_per_hour=None)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "format version None"),
            ('{"format_version": 99}', "format version 99"),
        ],
    )
    def test_a_strange_run_record_is_an_error_of_use(
        self, tmp_path: Path, content: str, message: str
    ) -> None:
        (tmp_path / "_deebert").mkdir()
        (tmp_path / "_deebert" / "run.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            write_report(str(tmp_path), price_per_hour=None)

    def test_an_incomplete_run_record_is_an_error_of_use(self, tmp_path: Path) -> None:
        (tmp_path / "_deebert").mkdir()
        (tmp_path / "_deebert" / "run.json").write_text('{"format_version": 1}')
        with pytest.raises(UsageError, match="not a complete run record"):
            write_report(str(tmp_path), price_per_hour=None)

    @pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_price_that_makes_no_sense_is_an_error_of_use(self, tmp_path: Path, price: float) -> None:
        with pytest.raises(UsageError, match="price per hour"):
            write_report(str(tmp_path), price_per_hour=price)

    def test_terminal_control_characters_do_not_reach_the_terminal(self, tmp_path: Path) -> None:
        attempt = dataclasses.replace(ATTEMPT, status="failed", error="\x1b[2J gone")
        record = dataclasses.replace(RECORD, status="failed", attempts=(attempt,))
        assert "\x1b" not in write_report(str(write_run(tmp_path / "out", record)), price_per_hour=None).text


# The same rows through a model with an off-ramp on the embeddings too: the first leaves there.
LAYER_0 = dataclasses.replace(
    with_totals(
        exit_rows=(1, 2, 1),
        exit_windows=(1, 2, 1),
        exit_tokens=(3, 7, 2),
        compute=dataclasses.replace(COMPUTE, samples=(3, 1), tokens=(9, 2), off_ramp_samples=(4, 3, 1)),
    ),
    model=dataclasses.replace(RECORD.model, off_ramp_layers=(0, 1)),
)


class TestLayer0:
    def test_is_the_first_of_the_layers_and_runs_all_rows(self) -> None:
        embeddings, first, _ = account(LAYER_0).layers

        assert (embeddings.layer, embeddings.has_off_ramp, embeddings.exit_rows) == (0, True, 1)
        assert (embeddings.samples, embeddings.tokens, embeddings.saved_tokens) == (4, 12, 0)
        assert (embeddings.steps, embeddings.seconds) == (None, 0.5)
        assert embeddings.full_depth_seconds == pytest.approx(0.6)
        assert (first.layer, first.exit_rows, first.saved_tokens) == (1, 2, 3)

    def test_is_run_by_each_window_of_a_text(self) -> None:
        model = dataclasses.replace(WINDOWED.model, off_ramp_layers=(0, 1))

        embeddings, *_ = account(dataclasses.replace(WINDOWED, model=model)).layers

        assert (WINDOWED.totals.rows, embeddings.samples) == (4, 5)

    def test_counts_as_no_layer(self) -> None:
        got = account(LAYER_0)

        assert got.mean_exit_layer == 1.0  # (1·0 + 2·1 + 1·2) / 4
        assert got.layer_work_saved == 0.5
        assert got.executed_flops == (96 * 9 + 8 * 42) + (96 * 2 + 8 * 4) + 16 * 8

    def test_is_recounted_shown_and_drawn(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "out", LAYER_0, exit_layer=[0, 1, 1, 2])

        report = write_report(str(folder), price_per_hour=None)

        assert report.evidence.findings == ()
        assert report.evidence.exit_rows == (1, 2, 1)
        assert [part.layer for part in report.evidence.score_ranges] == [0, 1, 2]
        assert "off-ramps after 0, 1 (0: the embeddings)" in Path(report.path).read_text()
        assert re.search(r"^\s*0 • +1 +25\.0 % +4 +12 +– ", report.text, re.MULTILINE)
        for plot in (plots.exit_histogram, plots.seconds_per_layer):
            assert drawn_layers(plot(account(LAYER_0))) == ["0", "1", "2"]
        assert drawn_layers(plots.layer_work(account(LAYER_0))) == ["1", "2"]
        assert drawn_layers(plots.exit_histogram(account(RECORD))) == ["1", "2"]

    def test_records_written_before_it_was_there_read_as_if_nobody_had_left_there(self) -> None:
        old = json.loads(json.dumps(RECORD.to_dict()))
        old["format_version"] = 1
        for stats_ in (old["totals"]["compute"], old["totals"]["control"]):
            stats_["off_ramp_samples"] = stats_["off_ramp_samples"][1:]
        for name in ("exit_rows", "exit_tokens"):
            old["totals"][name] = old["totals"][name][1:]

        read = RunRecord.from_dict(old)

        assert read.totals == TOTALS
        assert read.totals + LAYER_0.totals == LAYER_0.totals + TOTALS

    def test_a_run_of_the_old_format_is_still_reported(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "out")
        record = folder / "_deebert" / "run.json"
        old = json.loads(record.read_text()) | {"format_version": 1}
        for name in ("exit_rows", "exit_tokens"):
            old["totals"][name] = old["totals"][name][1:]
        record.write_text(json.dumps(old))

        assert write_report(str(folder), price_per_hour=None).evidence.findings == ()


def drawn_layers(svg: str) -> list[str]:
    """The numbers under the bars."""
    root = ElementTree.fromstring(svg)
    axis = next(group for group in root.iter() if group.get("id", "").endswith("matplotlib.axis_1"))
    return [text for t in axis.iter() if (text := (t.text or "").strip()).isdigit()]


class TestQuantities:
    @pytest.mark.parametrize(
        ("share", "text"),
        [
            (0.4125, "41.2 %"),
            (1.0, "100.0 %"),
            (0.99999, "99.9 %"),
            (0.0, "0.0 %"),
            (0.00001, "< 0.1 %"),
            (-0.031, f"{q.MINUS}3.1 %"),
            (None, q.NOT_MEASURED),
        ],
    )
    def test_percent(self, share: float | None, text: str) -> None:
        assert q.percent(share) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0.0, "0 s"),
            (8.314, "8.31 s"),
            (59.0, "59.0 s"),
            (59.9, "59.9 s"),
            (59.96, "1 min 0 s"),
            (754.0, "12 min 34 s"),
            (3571.0, "59 min 31 s"),
            (3599.9, "1 h 0 min"),
            (5025.0, "1 h 24 min"),
            (84_600.0, "23 h 30 min"),
            (86_399.0, "1 d 0 h"),
            (200_000.0, "2 d 8 h"),
        ],
    )
    def test_duration(self, seconds: float, text: str) -> None:
        assert q.duration(seconds) == text

    def test_money(self) -> None:
        spelled = [q.money(12.5, "$"), q.money(0.01234, "$"), q.money(-2.0, "€"), q.money(1.0, "EUR")]
        assert spelled == ["$12.50", "$0.0123", f"{q.MINUS}€2.00", "EUR\u00a01.00"]

    @pytest.mark.parametrize(
        ("text", "keeps_end", "short"),
        [
            ("abcde", False, "abcde"),
            ("abcdef", False, "abcd…"),
            ("abcdef", True, "…cdef"),
            ("a\x1b", True, "a\ufffd"),
        ],
    )
    def test_names_that_are_too_long(self, text: str, keeps_end: bool, short: str) -> None:
        assert q.shortened(text, 5, keeps_end=keeps_end) == short

    def test_flops(self) -> None:
        assert [q.flops(v) for v in (12.0, 3.2e15, 999.9e9)] == ["12 FLOP", "3.2 PFLOP", "1 TFLOP"]
