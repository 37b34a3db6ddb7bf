"""Where one attempt of the driver keeps its shard records, as shards are committed.

A record that dies with its driver is no loss: the part's footer has it too, a request each. `Output` reads both.
"""

from __future__ import annotations

from contextlib import suppress

from pipeline.errors import OutputError
from pipeline.records import ShardRecord
from pipeline.sink import SHARD_RECORDS, Output, json_line

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
