"""A result as people and programs read it: Markdown tables, and a dated JSON file that is never replaced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def write(result: Row, folder: Path) -> Path:
    """Write ``DATE-SUITE-MODEL-DEVICE-PRECISION[-N].json``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = result["settings"]
    stem = "-".join(
        (
            datetime.now(UTC).date().isoformat(),
            "bench",
            result["suite"],
            result["workload"]["model"],
            settings["device"],
            settings["precision"],
        )
    )
    path = next(p for p in _names(folder, stem) if not p.exists())
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _names(folder: Path, stem: str) -> Iterator[Path]:
    yield folder / f"{stem}.json"
    number = 2
    while True:
        yield folder / f"{stem}-{number}.json"
        number += 1


def tables(result: Row) -> str:
    """All suites' tables, as Markdown."""
    makers = {
        "engine": _engine_tables,
        "pipeline": _pipeline_tables,
        "scaling": _scaling_tables,
        "training": _training_tables,
    }
    parts = [part for name, suite in result["suites"].items() for part in makers[name](suite)]
    return "\n\n".join(parts)


def _engine_tables(suite: Row) -> Iterator[str]:
    yield _table(
        ("contender", "samples/s", "tokens/s", "spread %", "×", "layer-tokens", "GFLOPs", "agree %"),
        (
            (
                row["name"],
                f"{row['samples_per_second']:.1f}",
                f"{row['tokens_per_second']:.0f}",
                _percent(row["seconds"]["spread"]),
                f"{row['speed_up']['median']:.2f}",
                row["work"]["layer_tokens"],
                f"{row['work']['flops'] / 1e9:.0f}",
                _percent(row["label_agreement"], 2),
            )
            for row in suite["contenders"]
        ),
    )
    if suite["skipped"]:
        yield "\n".join(f"left out: {row['name']} ({row['reason']})" for row in suite["skipped"])
    yield _savings_table(suite["savings"])
    yield _roofline_table(suite["roofline"])


def _savings_table(savings: Sequence[Row]) -> str:
    return _table(
        (
            "who leaves",
            "how",
            "micro-batch",
            "mean exit",
            "× fewer layer-tokens",
            "× faster",
            "realised",
            "spread %",
            "steps",
        ),
        (
            (
                row["profile"],
                row["kind"],
                row["micro_batch_tokens"],
                f"{row['mean_exit_layer']:.2f}",
                f"{row['times_fewer_layer_tokens']:.2f}",
                f"{row['times_faster']['median']:.2f}",
                f"{row['savings_realised']['median']:.3f}",
                _percent(row["savings_realised"]["spread"]),
                row["steps"],
            )
            for row in savings
        ),
    )


def _roofline_table(roofline: Row) -> str:
    lines = [
        f"GEMM: {roofline['layer_gemm_gflops']:.0f} GFLOP/s on the layer's shapes, "
        f"{roofline['large_gemm_gflops']:.0f} on a large product"
    ]
    lines += [
        f"full depth @{row['micro_batch_tokens']}: {row['encoder_gflops']:.0f} GFLOP/s, "
        f"{_percent(row['of_layer_gemm'])} % and {_percent(row['of_large_gemm'])} % of that"
        for row in roofline["full_depth"]
    ]
    return "\n".join(lines)


def _pipeline_tables(suite: Row) -> Iterator[str]:
    yield _table(
        (
            "contender",
            "rows",
            "seconds",
            "spread %",
            "rows/s",
            "tokens/s",
            "of engine %",
            "rows/s after start-up",
            "of engine %",
        ),
        (
            (
                row["name"],
                row["rows"],
                f"{row['seconds']['median']:.2f}",
                _percent(row["seconds"]["spread"]),
                f"{row['rows_per_second']:.1f}",
                f"{row['tokens_per_second']:.0f}",
                _percent(row["of_engine_alone"]["median"]),
                _rate(row["rows_per_second_after_start"]),
                _percent(row["of_engine_alone_after_start"]),
            )
            for row in suite["contenders"]
        ),
    )


def _scaling_tables(suite: Row) -> Iterator[str]:
    yield _table(
        ("replicas", "seconds", "spread %", "rows/s", "rows/s after start-up", "efficiency %"),
        (
            (
                row["replicas"],
                f"{row['seconds']['median']:.2f}",
                _percent(row["seconds"]["spread"]),
                f"{row['rows_per_second']:.1f}",
                _rate(row["rows_per_second_after_start"]),
                _percent(row["efficiency"]),
            )
            for row in suite["replicas"]
        ),
    )
    yield _table(
        ("shards", "rows", "seconds", "spread %", "ms per shard"),
        (
            (
                row["shards"],
                row["rows"],
                f"{row['seconds']['median']:.2f}",
                _percent(row["seconds"]["spread"]),
                f"{row['milliseconds_per_shard']:.2f}",
            )
            for row in suite["shards"]
        ),
    )
    yield _table(
        ("rows", "largest replica, MiB", "driver, MiB"),
        ((row["rows"], row["largest_replica_mib"], row["driver_mib"]) for row in suite["memory"]),
    )


def _training_tables(suite: Row) -> Iterator[str]:
    yield _table(
        (f"{suite['rows']} rows", "seconds", "spread %", "of a Trainer's epoch %", "of stage 1 %"),
        (
            (
                row["name"],
                f"{row['seconds']['median']:.2f}",
                _percent(row["seconds"]["spread"]),
                _percent(row["of_trainer"]["median"]),
                _percent(row["of_stage_1"]["median"]),
            )
            for row in suite["contenders"]
        ),
    )


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def _rate(rows_per_second: float | None) -> str:
    return "" if rows_per_second is None else f"{rows_per_second:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = [tuple(header), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|", *lines[1:]])
