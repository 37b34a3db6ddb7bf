"""A shard, the unit of work and of commit, and the name of its part, which tells a listing what is committed.

Knows nothing of how files are cut into shards (`pipeline.shards`) or of what becomes of them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from pipeline.inputs import InputFile

_PART_NAME = re.compile(r"part-([0-9a-f]{12})-(\d{12,})-([0-9a-f]{8})\.parquet")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A row range of one input file."""

    source: InputFile
    """The file the rows are in."""
    first_row: int
    """Number of the first row in the file, from 0; in JSON lines and text, the line number."""
    num_rows: int | None
    """Rows in the shard; None when that is unknown until it is read (it then ends where its bytes do)."""
    byte_range: tuple[int, int] | None
    """Start and end of the shard in a split file of lines; None for a whole file or Parquet and Arrow."""
    estimated_rows: int
    """`num_rows` where known, else a guess from the file's size and its first block."""
    flaw: str | None = None
    """Why the file cannot be read, where planning found that out: a shard that can only fail."""


@dataclass(frozen=True, kw_only=True)
class PartName:
    """What the name of a part says about the shard it holds."""

    source_key: str
    """Stands for the input file's path."""
    first_row: int
    """The shard's first row in the input file."""
    tag: str
    """Stands for the run's identity, the input's fingerprint and the shard's extent."""


def source_key(file: InputFile) -> str:
    """12 hex digits that stand for the input file's path in part names."""
    return hashlib.sha256(file.path.encode()).hexdigest()[:12]


def part_name(shard: Shard, identity_digest: str) -> str:
    """The file name of the shard's part.

    A listing of the output thus tells what is committed; a part of the same source with another tag
    was made from another state of the input, by another model, or with other shard sizes.
    """
    extent = f"{shard.first_row}:{shard.num_rows}:{shard.byte_range}{shard.flaw or ''}"
    state = "\n".join((identity_digest, shard.source.fingerprint, extent))
    tag = hashlib.sha256(state.encode()).hexdigest()[:8]
    return f"part-{source_key(shard.source)}-{shard.first_row:012d}-{tag}.parquet"


def parse_part_name(name: str) -> PartName | None:
    """The fields of a name made by `part_name`; None for any other file."""
    match = _PART_NAME.fullmatch(name)
    if match is None:
        return None
    return PartName(source_key=match[1], first_row=int(match[2]), tag=match[3])
