"""Shard records: kept by one attempt of the driver as shards are committed, found again by whoever reads an output.

A record that dies with its driver is no loss: the part's footer has it too, a request each.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pyarrow.parquet as pq

from pipeline.errors import OutputError, UsageError
from pipeline.records import ShardRecord
from pipeline.schema import RECORD_KEY
from pipeline.sink import MAX_CONNECTIONS, SHARD_RECORDS, Output, explaining, json_line

_RECORDS_PER_OBJECT = 64


class RecordLog:
    """Shard records of one attempt: appended to a file on a local disk, in several objects on an object store."""

    def __init__(self, output: Output, attempt: str) -> None:
        self._output, self._name = output, f"{SHARD_RECORDS}/{attempt}"
        self._lines: list[bytes] = []
        self._objects = 0

    def append(self, record: ShardRecord) -> None:
        """Add a committed shard's record.

        Raises:
            OutputError: it cannot be written to a local disk, for want of room or otherwise.
        """
        line = json_line(record.to_dict())
        if self._output.is_local:
            self._output.append(f"{self._name}.jsonl", line)
            return
        self._lines.append(line)
        if len(self._lines) % _RECORDS_PER_OBJECT == 0:
            self.close()

    def close(self) -> None:
        """Write what could not be appended; where that fails the parts' footers have it, as after a kill."""
        if self._lines:
            with suppress(OutputError):
                self._output.write(f"{self._name}-{self._objects:06d}.jsonl", b"".join(self._lines))
                self._lines.clear()
                self._objects += 1


def read_shard_records(
    output: Output, parts: set[str], *, redone: Collection[str] = ()
) -> dict[str, ShardRecord]:
    """The records of `parts`, by part name.

    From the attempts' files; a part whose record was lost with its driver gives it from its footer. Records of
    parts that are gone and will be `redone` are removed: another record in the new part would not be looked for.

    Raises:
        UsageError: one of them is not a part that `classify` wrote, or no longer.
        OutputError: an attempt's file can be neither read nor replaced.
    """
    records: dict[str, ShardRecord] = {}
    logs = [f"{SHARD_RECORDS}/{name}" for name in sorted(output.names(SHARD_RECORDS))]
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        contents = (content or b"" for content in pool.map(output.read, logs))
        for log, content in zip(logs, contents, strict=True):
            # A killed driver may leave half a last line; the part's footer has the record whole.
            lines = (line for line in content.splitlines() if line.endswith(b"}"))
            found = [record for line in lines if (record := _record(line)) is not None]
            records |= {record.part: record for record in found if record.part in parts}
            valid = [record for record in found if record.part not in redone]
            if len(valid) < len(found):
                output.write(log, b"".join(json_line(record.to_dict()) for record in valid))
        unknown = sorted(parts - records.keys())
        footers = pool.map(lambda part: _from_footer(output, part), unknown)
        return records | dict(zip(unknown, footers, strict=True))


def committed(output: Output, part: str) -> ShardRecord | None:
    """The record of a part, None where it does not exist; raises as `read_shard_records` does."""
    return _from_footer(output, part) if output.exists(part) else None


def _from_footer(output: Output, part: str) -> ShardRecord:
    with explaining("read", output.path(part)), output.open(part) as file:
        try:
            return ShardRecord.from_dict(json.loads(pq.read_metadata(file).metadata[RECORD_KEY]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the part {output.path(part)!r} is damaged, or `classify` did not write it "
                f"({type(error).__name__}: {error}): delete it and run the same command again"
            ) from error


def _record(line: bytes) -> ShardRecord | None:
    try:
        return ShardRecord.from_dict(json.loads(line))
    except ValueError:
        return None
