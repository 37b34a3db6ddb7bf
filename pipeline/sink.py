"""Where a run's files go, and how they become visible: the commit protocol.

A file appears whole or not at all. On a local disk it is written under a temporary name, fsynced, renamed,
and its folder fsynced; on an object store it is one PUT. A part's name derives from its shard, so that a
retry replaces it. Knows nothing of engines, shards or Ray.

    OUT/part-*.parquet                 one per committed shard
    OUT/_SUCCESS                       planned = committed
    OUT/_deebert/run.json              the run record
    OUT/_deebert/shards/*.jsonl        shard records, one file per attempt
    OUT/_deebert/inputs.arrow          what planning found in the input files (`pipeline.catalog`)
    OUT/_deebert/dead_letters/*.jsonl  rows that could not be classified, one file per shard
    OUT/_deebert/report.html           what `deebert report` wrote
    OUT/_deebert/lock                  who writes here (`pipeline.lock`)
    OUT/_deebert/tmp/                  files not yet renamed
    OUT/_deebert/aside/                a run that is being overwritten, until the new one is complete
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from pipeline import sabotage
from pipeline.errors import OutputError, OutputFullError, PipelineError, UsageError
from pipeline.inputs import file_system, is_local, knows
from pipeline.records import READABLE_VERSIONS, RunRecord

META = "_deebert"
SUCCESS = "_SUCCESS"
LOCK = f"{META}/lock"
# Not Parquet: some readers of a folder take all files of that suffix, whatever the names of the folders.
CATALOG = f"{META}/inputs.arrow"
_TMP = f"{META}/tmp"
_RUN = f"{META}/run.json"
SHARD_RECORDS = f"{META}/shards"
_DEAD = f"{META}/dead_letters"
_ASIDE = f"{META}/aside"
MAX_CONNECTIONS = 16


@dataclass(frozen=True)
class Output:
    """An output folder or URL, the same in every process. Cheap to make and to send to another one.

    Raises:
        UsageError: a URL whose protocol is unknown or lacks its driver.
    """

    url: str
    _is_whole: bool = field(init=False, repr=False, compare=False)
    """Whether protocol and path alone lead here, without the host or account that a URL may name."""

    def __post_init__(self) -> None:
        try:
            files, path = file_system(self.url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"the output {self.url!r} cannot be opened: {error}") from error
        if isinstance(files, LocalFileSystem):
            # Replicas on a cluster have working directories of their own.
            object.__setattr__(self, "url", path)
            object.__setattr__(self, "_is_whole", True)
            return
        if has_magic(path):
            raise UsageError(
                f"the output {self.url!r} has one of * ? [ in its name, which may remove other files from a store: "
                "choose another output"
            )
        object.__setattr__(self, "_is_whole", knows(files, files.unstrip_protocol(path)))

    @property
    def _fs(self) -> Any:
        return LocalFileSystem() if self.is_local else file_system(self.url)[0]

    def _at(self, name: str) -> str:
        """Full path of `name`, as the file system spells it."""
        root = self.url if self.is_local else file_system(self.url)[1]
        return f"{root.rstrip('/')}/{name}"

    @property
    def is_local(self) -> bool:
        """Whether files can be renamed and fsynced here."""
        return is_local(self.url)  # whose path is settled: to ask the disk for each name would take 30 calls

    def path(self, name: str) -> str:
        """Full path or URL of `name`, for others to open."""
        if self._is_whole:
            return self.as_input + name
        return f"{self.url.rstrip('/')}/{name}"

    @property
    def as_input(self) -> str:
        """The folder as `pipeline.inputs` spells the paths of files in it, up to their names."""
        return self._at("") if self.is_local else str(self._fs.unstrip_protocol(self._at("")))

    def prepare(self) -> None:
        """Make the folder and prove that it can be written to.

        Raises:
            UsageError: it cannot be made or written to, or nothing can be removed from it.
        """
        probe = f"{META}/writable"
        try:
            self.write(probe, b"")
        except OutputFullError:
            raise
        except OutputError as error:
            raise UsageError(
                f"cannot write to the output {self.url!r}: {_reason(error.__cause__)}"
            ) from error
        try:
            with suppress(FileNotFoundError):  # another driver that is not at the lock yet removed it
                self._fs.rm(self._at(probe))
        except Exception as error:  # not only OSError: each store has errors of its own
            raise UsageError(
                f"cannot remove files from the output {self.url!r}, which runs do: {_reason(error)}; allow it, or "
                "choose another output"
            ) from error

    def sweep(self) -> None:
        """Remove files that were never renamed, because their writer was killed."""
        if self.is_local and (tmp := Path(self._at(_TMP))).is_dir():
            for leftover in tmp.iterdir():
                leftover.unlink(missing_ok=True)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write the file `name`, whole or not at all.

        Raises:
            OutputError: it cannot be written, for want of room or otherwise.
        """
        with explaining("write", self.path(name)):
            if not self.is_local:
                self._fs.pipe_file(self._at(name), bytes(data))
                return
            try:
                self._write_and_rename(name, data)
            except FileNotFoundError:
                # A driver that starts or ends took the temporary file of a report or of another driver for a leftover.
                # A part that goes so is one: its own driver sweeps while no replica works.
                if not name.startswith(META):
                    raise
                self._write_and_rename(name, data)

    def _write_and_rename(self, name: str, data: bytes | pa.Buffer) -> None:
        final = Path(self._at(name))
        temporary = Path(self._at(_TMP)) / f"{final.name}.{uuid.uuid4().hex}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sabotage.reach("file-written")
            temporary.replace(final)
            _fsync_folder(final.parent)
        finally:
            temporary.unlink(missing_ok=True)  # what could not be written whole takes no room

    def append(self, name: str, line: bytes) -> None:
        """Add to a file on a local disk, which may then end in half a line.

        Raises:
            OutputError: it cannot be written, for want of room or otherwise.
        """
        path = Path(self._at(name))
        with explaining("write", str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(line)

    def read(self, name: str, **span: int) -> bytes | None:
        """The content of a file, or of it the bytes from `start` to `end`; None where there is none.

        Raises:
            OutputError: there may be one, but it cannot be read.
        """
        with explaining("read", self.path(name)), suppress(FileNotFoundError, NotADirectoryError):
            return bytes(self._fs.cat_file(self._at(name), **span))
        return None

    def open(self, name: str) -> Any:
        """A file, to read parts of it; raises what the store raises."""
        return self._fs.open(self._at(name), "rb")

    def exists(self, name: str) -> bool:
        """Whether there is a file that is not empty.

        Raises:
            OutputError: there may be one, but it cannot be read.
        """
        # One request: the store's own `exists` also looks for a folder of that name. And no removal of what may not be
        # there, which leaves a mark in a bucket that keeps versions.
        return self.read(name, start=0, end=1) is not None

    def commit_part(self, name: str, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
        """Write a part: with this, its shard is committed."""
        stream = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), stream, compression="zstd")
        self.write(name, stream.getvalue())
        sabotage.reach("part-renamed")

    def write_dead_letters(self, part: str, letters: Iterable[dict[str, Any]]) -> None:
        """Write one shard's bad rows, replacing those of an earlier try; no rows, no file."""
        lines = b"".join(json_line(letter) for letter in letters)
        name = _letters_of(part)
        if lines:
            self.write(name, lines)
        elif self.exists(name):
            self.remove([name])

    def parts(self) -> set[str]:
        """Names of the parts that exist: one listing, no file is opened.

        Raises:
            OutputError: the folder cannot be listed.
        """
        return {n for n in self.names("") if n.startswith("part-") and n.endswith(".parquet")}

    def names(self, folder: str) -> list[str]:
        """Names of what lies in a folder that may exist.

        Raises:
            OutputError: it cannot be listed.
        """
        found: list[Any] = []
        with explaining("list", self.path(folder)), suppress(FileNotFoundError):
            found = self._fs.ls(self._at(folder), detail=False)
        return [str(f).rstrip("/").rsplit("/", 1)[-1] for f in found]

    def remove(self, names: Iterable[str]) -> None:
        """Remove files or folders that may exist.

        Raises:
            OutputError: one of them cannot be removed.
        """
        for name in names:
            with explaining("remove", self.path(name)):
                if self._fs.exists(self._at(name)):
                    self._fs.rm(self._at(name), recursive=True)

    def remove_parts(self, parts: Collection[str]) -> None:
        """Remove parts that exist, and first their dead letters: without its part nobody would look for one."""
        letters = {_letters_of(part) for part in parts} & {f"{_DEAD}/{name}" for name in self.names(_DEAD)}
        for names in (letters, parts):
            with explaining("remove parts from", self.url):
                if names:
                    self._fs.rm([self._at(name) for name in sorted(names)])

    def keep_dead_letters(self, parts: Collection[str]) -> None:
        """Remove the dead letters of all but these parts: of shards that failed and are planned no more."""
        kept = {_letters_of(part) for part in parts}
        others = {f"{_DEAD}/{name}" for name in self.names(_DEAD) if name.startswith("part-")} - kept
        if others:
            with explaining("remove dead letters from", self.url):
                self._fs.rm([self._at(name) for name in sorted(others)])

    def set_aside(self) -> None:
        """Hide a whole run from readers, so that another can take its place.

        `_SUCCESS` goes first and the run record last: killed in between, the folder is still the old run's,
        incomplete, and never a mixture. The catalog stays: what it says of input files is true of either run.
        """
        self.remove([SUCCESS])
        kept = {LOCK, CATALOG, _ASIDE, _TMP}
        records = [name for entry in self.names(META) if (name := f"{META}/{entry}") not in kept]
        with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
            for _ in pool.map(self._move_aside, sorted(self.parts())):
                pass
        for name in sorted(records, key=lambda name: (name == _RUN, name)):
            self._move_aside(name)

    def discard_aside(self) -> None:
        """Remove what was set aside: the new run is complete."""
        self.remove([_ASIDE])

    def _move_aside(self, name: str) -> None:
        new_name = f"{_ASIDE}/{name}"
        source, target = self._at(name), self._at(new_name)
        with explaining("set aside", self.path(name)):
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                self.remove([new_name])
                Path(source).replace(target)
            elif name.startswith(META):
                self._fs.mv(source, target, recursive=True)
            else:  # a part, of which there may be very many: fewer requests than `mv` makes
                self._fs.cp_file(source, target)
                self._fs.rm(source)
        sabotage.reach("driver-set-aside")

    def read_run(self) -> RunRecord | None:
        """The run record, None where no run has been.

        Raises:
            UsageError: there is one that this version cannot read.
        """
        content = self.read(_RUN)
        if content is None:
            return None
        try:
            values = json.loads(content)
        except ValueError as error:
            raise UsageError(f"{self.path(_RUN)!r} is not JSON ({error}): the file is damaged") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version not in READABLE_VERSIONS:
            raise UsageError(
                f"{self.path(_RUN)!r} has format version {version}, this software reads {READABLE_VERSIONS[-1]}: "
                "use the version that wrote it, or choose another output"
            )
        try:
            return RunRecord.from_dict(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{self.path(_RUN)!r} is not a complete run record ({error}): the file is damaged"
            ) from error

    def write_run(self, record: RunRecord) -> None:
        """Replace the run record."""
        self.write(_RUN, json.dumps(record.to_dict(), indent=1).encode())

    def mark_success(self) -> None:
        """Say that planned = committed; idempotent."""
        if self.read(SUCCESS) is None:
            self.write(SUCCESS, b"")


def _letters_of(part: str) -> str:
    return f"{_DEAD}/{Path(part).stem}.jsonl"


@contextmanager
def explaining(action: str, path: str) -> Iterator[None]:
    """Turn a failure to do something with a file or folder of an output into one sentence."""
    try:
        yield
    except PipelineError:  # which is one already
        raise
    except Exception as error:  # not only OSError: each store has errors of its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputFullError(
                f"no room for {path}: {_reason(error)}; make room, the same command resumes"
            ) from error
        raise OutputError(f"cannot {action} {path}: {_reason(error)}") from error


def _reason(error: BaseException | None) -> str:
    return str(getattr(error, "strerror", None) or error)


def json_line(value: dict[str, Any]) -> bytes:
    """An object as a line of ASCII."""
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
