"""A sample of `fuzz_readers`, the same files every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuzz_readers import checks


@pytest.mark.parametrize("fuzzer", [0, 1], ids=["JSON lines", "CSV"])
def test_readers_account_for_every_row(tmp_path: Path, fuzzer: int) -> None:
    checks(tmp_path, examples=400)[fuzzer]()
