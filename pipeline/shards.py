"""Input files -> shards: the row ranges of files that are the units of work and of commit.

Planning is deterministic: the same files and `shard_rows` give the same shards, so a later run can
tell by part names alone what is done. Reads footers and counts newlines; decodes no row
(`pipeline.source` does) and knows nothing of what has been committed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from pipeline.catalog import Catalog
from pipeline.errors import BrokenFileError, UsageError
from pipeline.inputs import InputFile, is_local
from pipeline.opening import arrow_batch_rows, arrow_batches, head, open_file, open_parquet, refusing
from pipeline.shard import Shard

LEAST_SHARD_ROWS = 4096
MOST_SHARD_ROWS = 65_536
# Each costs the driver tens of milliseconds and every reader of the output a file to open.
ENOUGH_SHARDS = 16_384
SPLIT_ABOVE_BYTES = 8 << 20
SCAN_BLOCK_BYTES = 8 << 20
ESTIMATE_BYTES = 1 << 16
_MAX_CONNECTIONS = 16
_FILES_TO_ESTIMATE_BY = 32
_MAY_NOT_SEEK = ("http://", "https://")
_NEWLINE = 10


def plan(
    files: Sequence[InputFile],
    *,
    shard_rows: int,
    split_above_bytes: int = SPLIT_ABOVE_BYTES,
    catalog: Catalog | None = None,
) -> tuple[Shard, ...]:
    """Cut files into shards of about `shard_rows` rows, in the order of the files and their rows.

    Parquet is cut at row groups (and inside those that are larger), Arrow at rows, uncompressed lines
    at newlines. CSV (whose quoted values may contain newlines), compressed files and remote Arrow files
    (which have no index) are one shard each, and so are lines from a server that may not seek: one that
    tells no size, and any HTTP server up to `split_above_bytes`.
    Files without rows give none; files that cannot be read give one, with the `flaw`.
    Files that `catalog` knows are not opened.
    """
    if shard_rows < 1:
        raise UsageError(f"a shard must have at least 1 row, not {shard_rows}")

    def plan_file(file: InputFile) -> list[Shard]:
        cut = partial(_cut, file, shard_rows, split_above_bytes)
        try:
            return cut() if catalog is None else catalog.shards(file, cut)
        except BrokenFileError as error:
            return [_flawed(file, str(error))]

    with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
        return tuple(itertools.chain.from_iterable(pool.map(plan_file, files)))


def suitable_shard_rows(files: Sequence[InputFile]) -> int:
    """4,096, or as many (a power of two, at most 65,536) as cut a very large corpus into 16,384 shards.

    Its rows are estimated from some of the files.
    """
    sized = [file for file in files if file.size_bytes]
    total_bytes = sum(file.size_bytes or 0 for file in sized)
    if total_bytes <= ENOUGH_SHARDS * LEAST_SHARD_ROWS:  # a row takes a byte at least
        return LEAST_SHARD_ROWS
    some = sized[:: math.ceil(len(sized) / _FILES_TO_ESTIMATE_BY)]
    with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
        estimates = dict(zip(some, pool.map(_rows_if_readable, some), strict=True))
    known = {file: rows for file, rows in estimates.items() if rows is not None}
    rows = total_bytes * sum(known.values()) / max(1, sum(file.size_bytes or 0 for file in known))
    wanted = 1 << max(0, math.ceil(rows / ENOUGH_SHARDS) - 1).bit_length()
    return min(MOST_SHARD_ROWS, max(LEAST_SHARD_ROWS, wanted))


def _rows_if_readable(file: InputFile) -> int | None:
    try:
        with refusing(file):
            return _estimate_rows(file)
    except BrokenFileError:  # its shard will say so
        return None


def _flawed(file: InputFile, reason: str) -> Shard:
    return Shard(source=file, first_row=0, num_rows=None, byte_range=None, estimated_rows=0, flaw=reason)


def _cut(file: InputFile, shard_rows: int, split_above_bytes: int) -> list[Shard]:
    with refusing(file):
        if file.format == "parquet":
            return _exact_shards(file, _parquet_ranges(file, shard_rows))
        if file.format == "arrow" and is_local(file.path):
            num_rows = sum(arrow_batch_rows(file))
            return _exact_shards(file, _pieces(0, num_rows, shard_rows))
        if not file.size_bytes and head(file, 1)[1] == 0:  # proves too that it can be opened
            return []
        if file.format in ("jsonl", "text") and file.compression is None and file.size_bytes:
            is_large = file.size_bytes > split_above_bytes
            if is_large or not file.path.startswith(_MAY_NOT_SEEK):
                shards = _line_shards(file, shard_rows)
                if is_large or len(shards) > 1:
                    return shards
        return [_whole_file(file)]


def _exact_shards(file: InputFile, ranges: Iterator[tuple[int, int]]) -> list[Shard]:
    return [
        Shard(source=file, first_row=first, num_rows=count, byte_range=None, estimated_rows=count)
        for first, count in ranges
    ]


def _whole_file(file: InputFile) -> Shard:
    return Shard(
        source=file, first_row=0, num_rows=None, byte_range=None, estimated_rows=_estimate_rows(file)
    )


def _pieces(first: int, count: int, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Cut `count` rows from `first` on into (first row, number of rows) of at most `shard_rows`."""
    for start in range(first, first + count, shard_rows):
        yield start, min(shard_rows, first + count - start)


def _parquet_ranges(file: InputFile, shard_rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges that are neighbouring whole row groups, or pieces of one large row group."""
    with open_parquet(file) as parquet:
        footer = parquet.metadata
        group_sizes = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    first = pending = 0
    for size in group_sizes:
        if pending and pending + size > shard_rows:
            yield first, pending
            first, pending = first + pending, 0
        pending += size
        if pending > shard_rows:
            yield from _pieces(first, pending, shard_rows)
            first, pending = first + pending, 0
    if pending:
        yield first, pending


def _line_shards(file: InputFile, shard_rows: int) -> list[Shard]:
    bounds, num_lines = _scan_lines(file, shard_rows)
    shards = []
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        first = index * shard_rows
        lines = min(shard_rows, num_lines - first)
        shards.append(
            Shard(
                source=file,
                first_row=first,
                num_rows=lines if file.format == "text" else None,  # blank lines of JSON are not rows
                byte_range=(start, end),
                estimated_rows=lines,
            )
        )
    return shards


def _scan_lines(file: InputFile, shard_rows: int) -> tuple[list[int], int]:
    """Where every `shard_rows`-th line starts and the last ends, and the number of lines, in one pass."""
    starts, num_newlines, offset, last_byte = [0], 0, 0, _NEWLINE
    with open_file(file) as stored:
        while block := stored.read(SCAN_BLOCK_BYTES):
            newlines = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _NEWLINE)
            # Newline i of the block ends line num_newlines + i; every shard_rows-th of those ends a shard.
            first = -(num_newlines + 1) % shard_rows
            starts.extend((newlines[first::shard_rows] + (offset + 1)).tolist())
            num_newlines, offset, last_byte = num_newlines + len(newlines), offset + len(block), block[-1]
    if starts[-1] == offset:  # the last newline ends the file; no line follows it
        starts.pop()
    return [*starts, offset], num_newlines + (last_byte != _NEWLINE)


def _estimate_rows(file: InputFile) -> int:
    if file.format == "parquet":
        with open_parquet(file) as parquet:
            return int(parquet.metadata.num_rows)
    if file.format == "arrow":
        batch = next(arrow_batches(file), None)
        return round((file.size_bytes or 0) * batch.num_rows / max(1, batch.nbytes)) if batch else 0
    content, stored_bytes = head(file, ESTIMATE_BYTES)
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    header_lines = 1 if file.format == "csv" else 0
    size_bytes = stored_bytes if file.size_bytes is None else file.size_bytes
    return max(1, round(lines * size_bytes / max(1, stored_bytes)) - header_lines)
