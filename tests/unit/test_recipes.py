"""What a folder of `jobs.recipes` is bound to, and which data it refuses.

No variant is asked for, so nothing trains.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deebert.errors import DataError
from jobs.recipes import RecipesJob, check_study, compare
from pipeline.errors import UsageError


@pytest.fixture
def job(tmp_path: Path) -> RecipesJob:
    """One whose folder has its rows already."""
    (tmp_path / "data.csv").write_text("text,label\n" + "it is good,good\nit is bad,bad\n" * 20)
    data, output = (str(tmp_path / name) for name in ("data.csv", "out"))
    job = RecipesJob(backbone="b", data=data, evaluation_data=data, output=output, variants=())
    compare(job)
    return job


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize(
    ("setting", "theirs", "ours"),
    [
        ("held_out", 0.03, 0.3),
        ("epochs", 1.0, 2.0),
        ("learning_rate", 5e-05, 1e-05),
        ("max_rows", None, 5),
        ("precision", "auto", "float32"),
        ("backbone", "b", "c"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    job: RecipesJob, setting: str, theirs: object, ours: object
) -> None:
    before = files(job.output)

    says = (
        f"the folder {job.output!r} is of other settings ({setting.replace('_', ' ')} {theirs}, not {ours}): go on "
        "with its own, or choose another --output"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(says)}$"):
        compare(replace(job, **{setting: ours}))

    assert files(job.output) == before
    assert sorted(before) == ["study.json", "train.parquet"]


def test_a_folder_of_other_rows_is_refused(job: RecipesJob, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_bytes((tmp_path / "data.csv").read_bytes())

    with pytest.raises(UsageError, match=r"\(data \S+data\.csv, not \S+other\.csv\): "):
        compare(replace(job, data=str(tmp_path / "other.csv")))


def test_a_folder_takes_its_own_settings_and_what_adds_to_it(job: RecipesJob) -> None:
    adding: dict[str, Any] = {"seeds": (1, 2), "speed_ups": (2.5,), "checkpoint_steps": 7}
    named = replace(job, labels=("bad", "good"), output=f"{job.output}-named")

    for one in (replace(job, **adding), named, named):
        assert compare(one) == {}

    assert set(adding).isdisjoint(json.loads(files(job.output)["study.json"]))


def test_a_folder_of_an_earlier_version_is_adopted(job: RecipesJob) -> None:
    (Path(job.output) / "study.json").unlink()

    compare(replace(job, held_out=0.3))

    with pytest.raises(UsageError, match=r"\(held out 0\.3, not 0\.03\): "):
        compare(job)


def test_a_setting_that_fails_on_the_data_binds_no_folder(job: RecipesJob, tmp_path: Path) -> None:
    fresh = replace(job, output=str(tmp_path / "fresh"))

    with pytest.raises(DataError, match="'tone'"):
        compare(replace(fresh, label_column="tone"))

    assert compare(fresh) == {}


def test_of_processes_that_start_together_one_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first has written is whole and never replaced: the others compare with it."""
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # threads stand for processes
    starts, folders = 4, [tmp_path / str(i) for i in range(200)]
    together = threading.Barrier(starts, timeout=60)

    def taken(epochs: int) -> list[Path]:
        mine = []
        for folder in folders:
            together.wait()
            with suppress(UsageError):
                check_study(folder, {"epochs": epochs}, flag="--output")
                mine.append(folder)
        return mine

    with ThreadPoolExecutor(starts) as pool:
        found = list(pool.map(taken, range(starts)))

    assert sorted(folder for mine in found for folder in mine) == sorted(folders)
    for epochs, mine in enumerate(found):
        for folder in mine:
            assert {name: json.loads(text) for name, text in files(str(folder)).items()} == {
                "study.json": {"epochs": epochs}
            }


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    for _ in range(2):
        check_study(tmp_path, {"epochs": 1.0}, flag="--output")

    with pytest.raises(UsageError, match=r"\(epochs 1\.0, not 2\.0\): "):
        check_study(tmp_path, {"epochs": 2.0}, flag="--output")
    assert list(files(str(tmp_path))) == ["study.json"]


def test_labels_that_have_no_entropy_over_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "STS-B").mkdir()
    rows = "sentence1\tsentence2\tscore\n" + "it is good\tis it good\t2.5\n" * 9
    for split in ("train", "dev"):
        (tmp_path / "STS-B" / f"{split}.tsv").write_text(rows)
    job = RecipesJob(backbone="b", glue_dir=str(tmp_path), task="sts-b", output=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="the labels are of a regression, and recipes are compared by"):
        compare(job)

    (tmp_path / "data.jsonl").write_text('{"text": "x", "label": ["good"]}\n' * 9)
    of_sets = replace(job, glue_dir=None, task=None, data=str(tmp_path / "data.jsonl"))
    with pytest.raises(UsageError, match="the labels are of a multi_label_classification, and recipes are"):
        compare(of_sets)

    assert not (tmp_path / "out").exists()
