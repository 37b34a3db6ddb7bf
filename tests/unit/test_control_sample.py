"""Which rows also run at full depth: a fair share of them, the same ones each time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.replica import _control_sample


def sample(rows: int, share: float, source_file: str) -> npt.NDArray[np.bool_]:
    return _control_sample(np.arange(rows), share, source_file)


@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("rows", [1, 5, 50])
@pytest.mark.parametrize("path", ["/corpus/{}.jsonl", "s3://bucket/part-{:05d}-of-20000.parquet"])
def test_small_files_are_sampled_like_large_ones(path: str, rows: int, share: float) -> None:
    files = 20_000 // rows
    audited = np.stack([sample(rows, share, path.format(i)) for i in range(files)])
    spread = 4 * np.sqrt(share * (1 - share) / audited.size)  # 4 standard deviations, were they independent
    assert audited.mean() == pytest.approx(share, abs=spread)
    assert audited[:, 0].mean() == pytest.approx(share, abs=spread * np.sqrt(rows)), (
        "no favour for first rows"
    )


def test_about_one_in_a_hundred_of_1000_files_of_one_row() -> None:
    audited = sum(int(sample(1, 0.01, f"/corpus/{i}.txt").sum()) for i in range(1000))
    assert 3 <= audited <= 20


def test_a_file_is_sampled_evenly() -> None:
    for name in ("a", "b", "c"):
        audited = sample(100_000, 0.01, name)
        assert audited.sum() == pytest.approx(1000, abs=10)
        assert np.diff(np.flatnonzero(audited)).max() < 400


def test_every_attempt_takes_the_same_rows() -> None:
    whole = sample(4096, 0.1, "/corpus/a.parquet")
    assert whole.tolist() == sample(4096, 0.1, "/corpus/a.parquet").tolist()
    # And however the file is cut into batches; a longer sample has all of a shorter one's.
    assert whole[1000:].tolist() == _control_sample(np.arange(1000, 4096), 0.1, "/corpus/a.parquet").tolist()
    assert not (whole & ~sample(4096, 0.2, "/corpus/a.parquet")).any()


def test_none_and_all() -> None:
    assert not sample(1000, 0.0, "a").any()
    assert sample(1000, 1.0, "a").all()
