"""An output is one place, whoever writes to it from wherever."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UsageError
from pipeline.sink import Output


@pytest.mark.parametrize("url", ["out", "./out", "../here/out", "file://out", "out/"])
def test_a_relative_folder_is_the_drivers_in_every_process(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sent = pickle.dumps(Output(url))
    monkeypatch.chdir(tmp_path)

    output = pickle.loads(sent)
    output.write("part-0.parquet", b"rows")

    assert output.url == str(tmp_path / "here" / "out")
    assert output.path("part-0.parquet") == str(tmp_path / "here" / "out" / "part-0.parquet")
    assert (tmp_path / "here" / "out" / "part-0.parquet").read_bytes() == b"rows"


def test_links_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node may have something else behind them, and an input below one is spelled with it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    assert Output("link/out").url == str(tmp_path / "link" / "out")


def test_above_a_link_is_above_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    assert Output(f"{tmp_path}/link/../out").url == str(tmp_path / "disk" / "out")


def test_a_home_folder_is_found() -> None:
    assert Output("~/out").url == str(Path.home() / "out")


def test_urls_of_stores_are_left_alone() -> None:
    assert Output("memory://bucket/out").url == "memory://bucket/out"


@pytest.mark.parametrize("kind", ["foreign", "not Parquet"])
def test_a_part_that_is_none_is_named(kind: str, tmp_path: Path) -> None:
    part = tmp_path / "part-0.parquet"
    part.write_bytes(os.urandom(100))
    if kind == "foreign":
        pq.write_table(pa.table({"a": [1]}), part)
    output = Output(str(tmp_path))
    with pytest.raises(UsageError, match=rf"the part '{part}' is damaged, or `classify` did not write it \("):
        output.read_shard_records(output.parts())
