"""Every kind of bad input that we know of, through the command line's own entry, on real files and real Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.bad_input import CASES, Case, check, run_case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_well(case: Case, saved_model: Path, tmp_path: Path, ray_session: None) -> None:
    check(case, run_case(case, saved_model, tmp_path))
