"""What other operating points would have cost, what a larger corpus takes, and many runs summed: by hand."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deebert.cost import ModelShape
from deebert.evaluation import Trace
from deebert.exit_policy import policy_from_dict
from jobs import cli
from jobs.traces import TracedSet, TraceFile, TraceOrigin, write_traces
from pipeline.records import RunRecord
from pipeline.report import account, summarise, write_report
from pipeline.report.outlook import (
    Outlook,
    Prospect,
    TracedPoint,
    WhatIf,
    look_ahead,
    outlook_table,
    outlook_warnings,
)
from tests.run_by_hand import EMPTY, HOSTILE, LABELS, RECORD, UNMEASURED, with_totals, write_run

# The run by hand: 1,792 of 3,040 FLOPs in 4.0 s; full depth was measured as 6.6 s.
SAVED = 1 - 1792 / 3040


def point(name: str, flops_saved: float, **rest: Any) -> TracedPoint:
    given = {"score": 0.9, "other_answers": 0.1, "mean_exit_layer": 1.5, **rest}
    return TracedPoint(name=name, mark=name, flops_saved=flops_saved, **given)


def what_if(*others: TracedPoint, own: float = SAVED) -> WhatIf:
    full = point("full depth", 0.0, other_answers=0.0)
    return WhatIf(
        texts=7, precision="float32", metric="accuracy", full=full, own=point("own", own), others=others
    )


def outlook_of(record: RunRecord, **asked: Any) -> Outlook:
    given: dict[str, Any] = {"documents": 10, "what_if": None, "price_per_hour": None, **asked}
    outlook = look_ahead(
        record,
        account(record),
        currency="$",
        **given,
    )
    assert outlook is not None
    return outlook


def slower(seconds: float) -> RunRecord:
    """The run, but its compute took so long."""
    compute = dataclasses.replace(RECORD.totals.compute, seconds=(seconds, 0.0), embedding_seconds=0.0)
    return with_totals(compute=compute)


def barely_early(seconds: float) -> RunRecord:
    """A run without off-ramps computed in vain, of which one token was spared the last layer, in so many seconds."""
    compute = dataclasses.replace(
        RECORD.totals.compute,
        tokens=(12, 11),
        squared_tokens=(42, 41),
        samples=(4, 4),
        seconds=(seconds, 0.0),
        embedding_seconds=0.0,
        off_ramp_samples=(0, 0, 4),
    )
    return with_totals(compute=compute, exit_rows=(0, 0, 4), exit_windows=(0, 0, 4), exit_tokens=(0, 1, 11))


def named(outlook: Outlook, name: str) -> Prospect:
    return next(prospect for prospect in outlook.prospects if prospect.name == name)


class TestLookAhead:
    def test_other_points_lie_on_the_line_through_the_run_and_full_depth(self) -> None:
        outlook = outlook_of(RECORD, what_if=what_if(point("half", 0.5), point("a bit", 0.1)))
        half, a_bit = named(outlook, "half"), named(outlook, "a bit")
        assert half.seconds == pytest.approx(4.0 - (1792 - 1520) * 2.6 / (3040 - 1792))
        assert a_bit.seconds == pytest.approx(4.0 + (0.9 * 3040 - 1792) * 2.6 / (3040 - 1792))
        assert outlook.saved(half) == pytest.approx(1 - half.seconds / 6.6)

    def test_at_the_ends_of_the_line_are_the_seconds_that_are_known(self) -> None:
        outlook = outlook_of(RECORD, what_if=what_if(point("like the run", SAVED), point("none", 0.0)))
        assert named(outlook, "like the run").seconds == pytest.approx(4.0)
        assert named(outlook, "none").seconds == pytest.approx(6.6)

    def test_without_a_control_sample_seconds_go_with_flops(self) -> None:
        outlook = outlook_of(UNMEASURED, what_if=what_if(point("half", 0.5)))
        assert named(outlook, "half").seconds == pytest.approx(4.0 * 1520 / 1792)

    def test_a_run_without_exits_tells_what_exits_would_save(self) -> None:
        whole = dataclasses.replace(RECORD.totals.control, seconds=(3.0, 3.0), embedding_seconds=0.0)
        totals = dataclasses.replace(
            UNMEASURED.totals,
            compute=dataclasses.replace(
                whole, tokens=(12, 12), squared_tokens=(42, 42), samples=(4, 4), off_ramp_samples=(0, 0, 4)
            ),
            exit_rows=(0, 0, 4),
            exit_windows=(0, 0, 4),
            exit_tokens=(0, 0, 12),
        )
        record = dataclasses.replace(UNMEASURED, totals=totals)
        outlook = outlook_of(record, what_if=what_if(point("half", 0.5), own=0.0))
        assert account(record).flops_saved == 0.0
        assert named(outlook, "half").seconds == pytest.approx(3.0)

    def test_exits_that_cost_time_do_not_earn_it_back_where_more_leave(self) -> None:
        outlook = outlook_of(slower(31.0), what_if=what_if(point("half", 0.5), point("a bit", 0.1)))
        full, half, a_bit = outlook.prospects[0], named(outlook, "half"), named(outlook, "a bit")
        assert full.seconds == pytest.approx(6.6)
        assert half.seconds == 31.0
        assert 6.6 < a_bit.seconds < 31.0  # between the two that are known

    def test_where_exits_bring_no_time_a_little_noise_changes_little(self) -> None:
        # 6.6 s at full depth: runs that took a hair less and a hair more.
        less, more = (
            named(outlook_of(slower(spent), what_if=what_if(point("half", 0.5))), "half").seconds
            for spent in (6.599, 6.601)
        )
        assert less == pytest.approx(more, abs=0.01)

    def test_a_run_that_hardly_saved_tells_by_proportion_what_exits_would(self) -> None:
        # 104 of 3,040 FLOPs are saved; the seconds are those of full depth, but for noise either way.
        less, more = (
            named(outlook_of(barely_early(seconds), what_if=what_if(point("half", 0.5), own=0.01)), "half")
            for seconds in (6.59, 6.61)
        )
        assert less.seconds == pytest.approx(more.seconds, rel=0.02)
        # Of the slope, a sixth (104 / 3,040 of a fifth) is the line's, all but level, and the rest proportion's.
        weight = 104 / 3040 / 0.2
        slope = weight * (6.6 - 6.59) / 104 + (1 - weight) * 6.59 / 2936
        assert less.seconds == pytest.approx(6.59 - (2936 - 1520) * slope)

    def test_off_ramps_at_which_nobody_leaves_cost_more_than_full_depth(self) -> None:
        outlook = outlook_of(RECORD, what_if=what_if(point("never", -0.01)))
        assert named(outlook, "never").seconds == pytest.approx(6.6 * 1.01)

    def test_another_precision_is_said(self) -> None:
        int8 = dataclasses.replace(what_if(), precision="int8")
        said = outlook_table(outlook_of(RECORD, what_if=int8)).note
        assert said.endswith("The trace is in int8, the run was in float32.")
        assert "int8" not in outlook_table(outlook_of(RECORD, what_if=what_if())).note

    def test_points_stand_from_the_slowest_to_the_fastest_below_full_depth(self) -> None:
        outlook = outlook_of(RECORD, what_if=what_if(point("half", 0.5), point("a bit", 0.1)))
        assert [p.mark for p in outlook.prospects] == ["full depth", "a bit", "this run", "half"]

    def test_documents_are_like_those_of_the_run(self) -> None:
        outlook = outlook_of(RECORD, documents=2_000_000, price_per_hour=3.0)
        full, own = outlook.prospects
        assert outlook.replica_hours(full) == pytest.approx(6.6 / 3600 * 500_000)
        assert outlook.cost(own) == pytest.approx(4.0 / 3600 * 500_000 * 3.0)

    def test_where_nothing_ran_there_is_no_outlook(self) -> None:
        outlook = look_ahead(
            EMPTY,
            account(EMPTY),
            documents=5,
            what_if=None,
            price_per_hour=None,
            currency="$",
        )
        assert outlook is None

    @pytest.mark.parametrize(("own", "warnings"), [(SAVED, 0), (SAVED + 0.04, 0), (SAVED - 0.06, 1)])
    def test_a_trace_of_other_texts_is_said_to_be_one(self, own: float, warnings: int) -> None:
        found = list(outlook_warnings(outlook_of(RECORD, what_if=what_if(own=own))))
        assert len(found) == warnings
        assert all("unlike the run's" in text for text in found)

    def test_the_share_saved_is_said_of_both_texts(self) -> None:
        (said,) = outlook_warnings(outlook_of(RECORD, what_if=what_if(own=0.6)))
        assert "60.0 % of the FLOPs are saved on them, 41.1 % on the rows of the run" in said

    def test_answers_that_are_numbers_have_no_share_of_others(self) -> None:
        number = point("half", 0.5, other_answers=None)
        table = outlook_table(outlook_of(RECORD, what_if=what_if(number)))
        assert table.rows[-1][:3] == ("half", "90.00", "–")


# Four texts of a model of two layers: entropies at the first off-ramp of 0.00003, 0.2, 0.5 and 0.69 nats.
LOGITS = torch.tensor(
    [
        [[6.5, -6.5], [3.0, 0.0], [0.0, 1.4], [0.1, 0.0]],
        [[5.0, -5.0], [0.0, 3.0], [0.0, 5.0], [0.0, 5.0]],
    ]
)
LABELS_OF_TEXTS = torch.tensor([0, 1, 0, 1])  # full depth is wrong about the third
ORIGIN = TraceOrigin(
    model="model",
    model_digest=RECORD.identity.model_digest,
    data_digest="d",
    task=None,
    labels=LABELS,
    precision="float32",
    max_length=RECORD.identity.max_length,
    shape=ModelShape(num_layers=2, hidden_size=2, intermediate_size=8, num_labels=2),
)


def write_trace(path: Path, sets: int = 1, **origin: Any) -> str:
    trace = Trace(layers=(1, 2), logits=LOGITS, lengths=np.array([3, 2, 5, 2]))
    traced = TracedSet(trace=trace, labels=LABELS_OF_TEXTS)
    named_sets = {str(i): traced for i in range(sets)}
    write_traces(path, TraceFile(origin=dataclasses.replace(ORIGIN, **origin), sets=named_sets))
    return str(path)


class TestCommand:
    def test_what_if_and_projection_in_text_and_page(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_run(tmp_path / "out")
        trace = write_trace(tmp_path / "t.parquet")
        words = [
            "report",
            str(folder),
            "--what-if",
            trace,
            "--project",
            "2e6",
            "--thresholds",
            "0.1,0.3,0.65",
        ]
        assert cli.main([*words, "--price-per-hour", "1"]) == 0
        text = capsys.readouterr().out
        lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
        # Of four texts, one leaves at 0.1 nats, two at 0.3 (of which one says otherwise), three at 0.65.
        assert lines["full depth"][2:6] == ["75.00", "0.00", "%", "2.00"]
        assert lines["entropy < 0.1 nats"][4:8] == ["75.00", "0.00", "%", "1.75"]
        assert lines["entropy < 0.3 nats"][4:8] == ["50.00", "25.00", "%", "1.50"]
        assert lines["entropy < 0.65 nats"][4:8] == ["50.00", "25.00", "%", "1.25"]
        assert lines["full depth"][-2:] == ["917", "$916.67"]
        page = (folder / "_deebert" / "report.html").read_text(encoding="utf-8")
        assert "Looking ahead: 2,000,000 documents" in page
        assert page.count("<svg") == 10
        assert "$916.67" in page

    def test_the_runs_own_point_is_not_listed_twice(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = dataclasses.replace(RECORD.identity, exit_policy={"type": "entropy", "thresholds": 0.3})
        folder = write_run(tmp_path / "out", dataclasses.replace(RECORD, identity=own))
        trace = write_trace(tmp_path / "t.parquet")
        assert cli.main(["report", str(folder), "--what-if", trace, "--thresholds", "0.1,0.3"]) == 0
        text = capsys.readouterr().out
        assert "\nthis run (entropy < 0.3 nats)" in text
        assert "\nentropy < 0.1 nats" in text
        assert "\nentropy < 0.3 nats" not in text

    @pytest.mark.parametrize(
        ("origin", "said"),
        [
            ({"model_digest": "other"}, "is of another model than the run (other, not m)"),
            ({"max_length": 64}, "is of texts cut to another length than the run (64, not 5)"),
            ({"window_stride": 2}, "is of texts in other windows than the run (2, not None)"),
            ({"sets": 2}, "holds 2 sets"),
        ],
    )
    def test_a_trace_of_something_else_is_refused(
        self, origin: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_run(tmp_path / "out")
        trace = write_trace(tmp_path / "t.parquet", **origin)
        assert cli.main(["report", str(folder), "--what-if", trace]) == 2
        assert said in capsys.readouterr().err

    def test_a_point_is_listed_once_however_it_is_written(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = dataclasses.replace(RECORD.identity, exit_policy={"type": "entropy", "thresholds": [0.3]})
        folder = write_run(tmp_path / "out", dataclasses.replace(RECORD, identity=own))
        trace = write_trace(tmp_path / "t.parquet")
        words = ["--what-if", trace, "--thresholds", "0,-1,0.1,0.10,0.3"]
        assert cli.main(["report", str(folder), *words]) == 0
        text = capsys.readouterr().out
        table = text[text.index("What 1,000,000 documents") : text.index("Model compute for documents")]
        assert sum("  " in line for line in table.splitlines()) == 1 + 3  # a head, full depth, the run's, 0.1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--what-if", "none.parquet"], "there is no trace file 'none.parquet' here: make one with"),
            (["--what-if", "s3://b/t.parquet"], "there is no trace file 's3://b/t.parquet' here"),
            (["--what-if", "TRACE", "--thresholds", "5"], "the entropy threshold 5 is above ln(2) = 0.6931"),
            (["--currency", "A\x01"], "argument --currency: 'A\\x01' cannot be printed"),
        ],
    )
    def test_misuse_is_refused_before_any_part_is_read(
        self, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_run(tmp_path / "out")
        for part in folder.glob("part-*"):
            part.write_bytes(b"no Parquet")
        trace = write_trace(tmp_path / "t.parquet")
        assert cli.main(["report", str(folder), *(trace if w == "TRACE" else w for w in words)]) == 2
        assert said in capsys.readouterr().err

    def test_a_run_in_which_nothing_ran_projects_nothing_and_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_empty(tmp_path / "out")
        with caplog.at_level(logging.WARNING):
            assert cli.main(["report", str(tmp_path / "out"), "--project", "5"]) == 0
        assert "there is nothing to project" in caplog.text

    def test_a_policy_of_a_version_to_come_is_shown_as_it_was_recorded(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        later = dataclasses.replace(RECORD.identity, exit_policy={"type": "patience", "steps": 3})
        folder = write_run(tmp_path / "out", dataclasses.replace(RECORD, identity=later))
        assert cli.main(["report", str(folder), "--project", "5"]) == 0
        assert "this run (type: patience; steps: 3)" in capsys.readouterr().out

    @pytest.mark.parametrize("number", ["0", "-1", "1.5", "inf", "nan", "many", "1e300"])
    def test_a_corpus_of_no_number_of_documents_is_refused(
        self, number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["report", str(tmp_path), "--project", number]) == 2
        assert "--project" in capsys.readouterr().err


def write_empty(folder: Path) -> None:
    (folder / "_deebert").mkdir(parents=True)
    (folder / "_deebert" / "run.json").write_text(json.dumps(EMPTY.to_dict()))


class TestManyRuns:
    def test_they_are_summed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first, second = (
            write_run(tmp_path / "a"),
            write_run(tmp_path / "b", UNMEASURED, audit_prediction=[None] * 4),
        )
        page = tmp_path / "all.html"
        words = ["report", str(first), str(second), "--price-per-hour", "900", "--page", str(page)]
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        # 4 + 4 of 6.6 + 4 * 3040 / 1792 seconds.
        saved = f"{100 * (1 - 8 / (6.6 + 4 * 3040 / 1792)):.1f} %"
        for said in (saved, "of 1 of 2 runs expected from FLOPs", "in 2 runs", "(e)"):
            assert said in " ".join(text.split())
        # At $900 an hour a second costs a quarter.
        of_first, of_all = (
            next(x for x in text.splitlines() if x.startswith(n)) for n in (str(first), "all ")
        )
        assert of_first.split()[-2:] == ["$1.00", "$0.65"]
        assert of_all.split()[-2:] == ["$2.00", f"${(6.6 + 4 * 3040 / 1792 - 8) / 4:.2f}"]
        written = page.read_text(encoding="utf-8")
        assert saved in written
        assert written.count("<svg") == 1
        assert (first / "_deebert" / "report.html").exists()
        assert (second / "_deebert" / "report.html").exists()

    def test_a_fault_in_one_is_the_commands(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sound = write_run(tmp_path / "a")
        broken = write_run(tmp_path / "b", exit_layer=[2, 1, 1, 2])
        page = str(tmp_path / "all.html")
        assert cli.main(["report", str(sound), str(broken), "--page", page]) == 1
        assert "The parts disagree" in capsys.readouterr().out

    def test_hostile_names_stay_text(self, tmp_path: Path) -> None:
        record = dataclasses.replace(
            RECORD, status="failed", model=dataclasses.replace(RECORD.model, path=HOSTILE)
        )
        folder = write_run(tmp_path / "<b>x" / "$a_1$", record)
        report = write_report(str(folder), price_per_hour=None)
        page = summarise([report, report], price_per_hour=None, currency="$").page
        assert "<b>" not in page
        assert "<script" not in page
        plot = page[page.index("<svg") : page.index("</svg>")]
        assert "$a_1$" in plot  # money, or a name: no formula

    def test_runs_in_which_nothing_ran_are_listed(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "a", dataclasses.replace(RECORD, status="succeeded"))
        empty = tmp_path / "b"
        write_empty(empty)
        reports = [write_report(str(one), price_per_hour=1.0) for one in (folder, empty)]
        summary = summarise(reports, price_per_hour=1.0, currency="$")
        assert str(empty) in summary.text
        assert "39.4 %" in summary.text
        assert "not all finished" in summary.page
        only_empty = summarise(reports[1:], price_per_hour=1.0, currency="$")
        assert "<svg" not in only_empty.page
        assert "nothing ran yet" in only_empty.text
        assert "measured on control rows" not in only_empty.text
        assert "$0.00 at full depth" not in only_empty.text
        assert 'class="status succeeded"' in summarise(reports[:1], price_per_hour=None, currency="$").page

    def test_a_saving_that_is_bounded_by_flops_is_said_to_be(self, tmp_path: Path) -> None:
        measured, bounded = (
            write_report(str(write_run(tmp_path / name, record)), price_per_hour=None)
            for name, record in (("a", RECORD), ("b", slower(1.0)))
        )
        alone = " ".join(summarise([bounded], price_per_hour=None, currency="$").text.split())
        assert "bounded by the FLOPs saved, since the control rows ran in slower micro-batches" in alone
        assert "measured on control rows" not in alone
        both = " ".join(summarise([measured, bounded], price_per_hour=None, currency="$").text.split())
        assert "of 1 of 2 runs measured on control rows at full depth; of 1 of 2 runs bounded by" in both
        assert "1.7 s (b)" in both

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["a", "--page", "p.html"], "--page is of several outputs"),
            (["a", "b", "--project", "5"], "give one output"),
            (["a", "b", "--what-if", "t.parquet"], "give one output"),
        ],
    )
    def test_flags_that_do_not_go_together(
        self, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["report", *words]) == 2
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("spelled", ["a", "a/", "./a", "b/../a", "link"])
    def test_an_output_given_twice_is_not_summed_twice(
        self,
        spelled: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write_run(tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "link").symlink_to("a")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["report", "a", spelled]) == 2
        assert "given twice" in capsys.readouterr().err

    def test_an_output_that_is_none_is_refused_before_another_is_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_run(tmp_path / "a")
        assert cli.main(["report", str(folder), str(tmp_path / "none")]) == 2
        assert "holds no run" in capsys.readouterr().err
        assert not (folder / "_deebert" / "report.html").exists()

    def test_a_page_of_one_that_cannot_be_written_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        outputs = [write_run(tmp_path / name) for name in "ab"]
        (outputs[1] / "_deebert" / "report.html").mkdir()
        with caplog.at_level(logging.WARNING):
            words = ["report", *map(str, outputs), "--page", str(tmp_path / "p.html")]
            assert cli.main(words) == 0
        assert "no page beside the table" in caplog.text

    def test_a_page_that_was_asked_for_and_cannot_be_written_is_misuse(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        outputs = [str(write_run(tmp_path / name)) for name in "ab"]
        assert cli.main(["report", *outputs, "--page", str(tmp_path / "none" / "p.html")]) == 2
        out, err = capsys.readouterr()
        assert "Run by run" in out
        assert err.count("\n") == 1
        assert "cannot write the page" in err

    def test_the_page_may_be_a_url(self, tmp_path: Path) -> None:
        outputs = [str(write_run(tmp_path / name)) for name in "ab"]
        assert cli.main(["report", *outputs, "--page", f"file://{tmp_path}/p.html"]) == 0
        assert "<svg" in (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"type": "entropy", "thresholds": 0.25}, "entropy < 0.25 nats"),
        ({"type": "entropy", "thresholds": [None, 0.1, 0.2]}, "entropy < none, 0.1, 0.2 nats"),
        (
            {"type": "entropy", "thresholds": 0.1, "layer_0": 0.05},
            "entropy < 0.1 nats (0.05 on the embeddings)",
        ),
        ({"type": "entropy", "thresholds": None}, "full depth"),
        ({"type": "entropy", "thresholds": -1.0}, "full depth"),
        ({"type": "entropy", "thresholds": 1.609437}, "entropy < 1.609437 nats"),
        ({"type": "entropy", "thresholds": None, "layer_0": 0.3}, "entropy < 0.3 nats on the embeddings"),
        (
            {"type": "entropy", "thresholds": 0.2, "layer_0": -1.0},
            "entropy < 0.2 nats (none on the embeddings)",
        ),
        ({"type": "learning-to-exit", "thresholds": 0.9}, "certainty > 0.9"),
        ({"type": "learning-to-exit", "thresholds": 1.0}, "full depth"),
    ],
)
def test_a_policy_in_words(policy: dict[str, Any], said: str) -> None:
    assert str(policy_from_dict(policy)) == said
