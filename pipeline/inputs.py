"""Input paths -> input files: which files there are, in which format, and in which state.

A path is a file, a folder, a glob or any fsspec URL. Knows nothing of what is inside the files
(`pipeline.input_schema`), how they are cut into shards (`pipeline.shards`) or read (`pipeline.source`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import InputError, PipelineError

logger = logging.getLogger(__name__)

Format = Literal["parquet", "arrow", "jsonl", "csv", "text"]
Compression = Literal["gzip", "zstd"]

FORMATS: Mapping[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
}
COMPRESSIONS: Mapping[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
KNOWN_SUFFIXES = f"{', '.join(FORMATS)}; all but Parquet and Arrow also with {' or '.join(COMPRESSIONS)}"

_HIDDEN = ("_", ".")
_KINDS = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "link"))

# What stores call the mark that changes with a file's content, most trustworthy first.
_VERSION_KEYS = (
    "mtime_ns",
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "mtime",
    "modificationTime",
    "created",
)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of the input, as it was when it was discovered."""

    path: str
    """Absolute local path without ``..`` and the like, or URL."""
    format: Format
    """How the content is written, by suffix."""
    compression: Compression | None
    """How the whole file is compressed; None for Parquet and Arrow, which compress inside."""
    size_bytes: int | None
    """Size as stored (compressed); None where a server does not tell."""
    fingerprint: str
    """Size and modification time or etag: another fingerprint means that the content may have changed."""


def discover(paths: Sequence[str]) -> tuple[InputFile, ...]:
    """The files behind `paths`, each once, sorted by path.

    Folders are searched recursively; names that begin with ``_`` or ``.`` are ignored, as Spark and
    pyarrow do. Folders saved by `datasets` (one data set or a dict of splits) give their Arrow files.
    A file with several names keeps its own one, else the first that was given; only links of one folder
    to a file elsewhere are all kept.
    """
    if not all(paths) or not paths:
        raise InputError("an input path is missing; give a file, folder, glob or URL")
    found: dict[str, tuple[InputFile, int]] = {}
    for index, path in enumerate(paths):
        expanded = _expand(path)
        if not is_local(path):
            _check_name(expanded[0], path)
        for file in expanded:
            found.setdefault(file.path, (file, index))
    files = _without_second_names(found.values())
    if len(files) < len(found):
        logger.info("left out %d links to files that the input holds already", len(found) - len(files))
    return tuple(sorted(files, key=lambda file: file.path))


def _without_second_names(found: Iterable[tuple[InputFile, int]]) -> list[InputFile]:
    """The files without links to those that stay; each comes with the number of the path it was found by."""
    real_paths = [(file, index, real_path(file.path)) for file, index in found]
    own_names = {file.path for file, _, real in real_paths if file.path == real}
    first_index: dict[str, int] = {}
    return [
        file
        for file, index, real in real_paths
        if file.path == real or (real not in own_names and first_index.setdefault(real, index) == index)
    ]


def current_fingerprint(file: InputFile) -> str:
    """The fingerprint of the file as it is now; raises OSError when it is gone."""
    filesystem, path = locate(file.path)
    return _fingerprint(_info(filesystem, path))


def _check_name(file: InputFile, as_given: str) -> None:
    """Refuse a file whose URL leads elsewhere: fsspec spells it without the archive, host or account that was given.

    Where configuration gives these and the URL leads to such a file, it is a good name.
    """
    try:
        # Stores may tell times in one way in a listing and in another of a file; the size is the same.
        if knows(locate(as_given)[0], file.path) or _info(*locate(file.path))["size"] == file.size_bytes:
            return
    except Exception:  # each store has errors of its own
        logger.debug("%s cannot be found", file.path, exc_info=True)
    raise InputError(
        f"input {as_given} would be stored as {file.path}, which does not lead to it: name its host or account in "
        "fsspec's configuration instead of the URL, unpack it if it is an archive, or copy it"
    )


def knows(filesystem: Any, url: str) -> bool:
    """Whether the URL alone, without what else was given, leads to this file system."""
    try:
        return bool(file_system(url)[0] == filesystem)
    except Exception:  # each store has errors of its own, and so has one without its host
        return False


def locate(path: str) -> tuple[Any, str]:
    """The fsspec file system that holds the input `path`, and the path as that file system spells it."""
    try:
        return file_system(path)
    except (ValueError, ImportError) as error:
        raise InputError(f"input {path} cannot be opened: {first_line(error)}") from error


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path as that file system spells it.

    Listings are never cached, for others write there too.

    Raises:
        ValueError, ImportError: a protocol that is unknown or lacks its driver.
    """
    if is_local(path):  # fsspec itself takes `::` in a name for a chain of URLs
        return LocalFileSystem(), _normal(LocalFileSystem._strip_protocol(path))
    filesystem, inner_path = fsspec.core.url_to_fs(path, use_listings_cache=False)
    return filesystem, _normal(inner_path) if isinstance(filesystem, LocalFileSystem) else inner_path


def is_local(path: str) -> bool:
    """Whether an `InputFile.path` is on this machine's file system."""
    return "://" not in path


def real_path(path: str) -> str:
    """A local path without links; a URL as it is."""
    return os.path.realpath(path) if is_local(path) else path


def first_line(error: BaseException) -> str:
    """What an exception says, without the lines that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _normal(path: str) -> str:
    """One spelling for each absolute local path; links keep their names."""
    normal = os.path.normpath(path)
    if os.path.realpath(normal) != os.path.realpath(path):  # `link/..` is not the folder that holds the link
        normal = os.path.realpath(path)
    return "/" + normal.lstrip("/")  # POSIX lets two slashes mean something else


def _expand(path: str) -> list[InputFile]:
    try:
        filesystem, place = locate(path)
        if filesystem.isdir(place):
            return _input_files(filesystem, _visible(_walk(filesystem, place), place), place, path)
        if filesystem.exists(place):
            return [_explicit_file(filesystem, place)]
        if glob.has_magic(place):
            return _matching(filesystem, place, path)
    except PipelineError:
        raise
    except Exception as error:  # not only OSError: each store has errors of its own
        advice = "" if is_local(path) else "; check the credentials and the address"
        raise InputError(f"input {path} cannot be listed: {first_line(error)}{advice}") from error
    raise InputError(f"no such input: {path}; give an existing file, folder, glob or URL")


def _explicit_file(filesystem: Any, path: str) -> InputFile:
    file = _input_file(filesystem, path, _info(filesystem, path))
    if file is None:
        raise InputError(f"{path} has no suffix that names a format; known are {KNOWN_SUFFIXES}")
    return file


def _matching(filesystem: Any, pattern: str, as_given: str) -> list[InputFile]:
    files: dict[str, dict[str, Any]] = {}
    for match, info in filesystem.glob(pattern, detail=True).items():
        # A local link says of itself that it is one, and HTTP tells nothing; stores have said all in their listing.
        is_told = not isinstance(filesystem, LocalFileSystem) and info.get("size") is not None
        if info["type"] == "directory" if is_told else filesystem.isdir(match):
            files |= _walk(filesystem, match)
        else:
            files[match] = info if is_told else _info(filesystem, match)
    if not files:
        raise InputError(f"no file matches {as_given}; check the pattern")
    root, wild = _split_pattern(pattern)
    if any(part.startswith(_HIDDEN) for part in wild):  # then they are meant
        return _input_files(filesystem, files, root, as_given)
    return _input_files(filesystem, _visible(files, root), root, as_given)


def _split_pattern(pattern: str) -> tuple[str, list[str]]:
    """The folders before the first wildcard, as one path, and the parts from there on."""
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]), parts[first:]


def _visible(files: Mapping[str, dict[str, Any]], root: str) -> dict[str, dict[str, Any]]:
    """The files without those that have a hidden name on the way from `root`."""
    return {
        path: info
        for path, info in files.items()
        if not any(part.startswith(_HIDDEN) for part in path.removeprefix(root).split("/"))
    }


def _input_files(
    filesystem: Any, files: Mapping[str, dict[str, Any]], root: str, as_given: str
) -> list[InputFile]:
    """Those of the files found in a folder or by a glob that hold data in a known format."""
    data = _without_bookkeeping(filesystem, files)
    known = [file for path, info in data.items() if (file := _input_file(filesystem, path, info))]
    if not known:
        raise InputError(f"{as_given} holds no file with a known suffix; known are {KNOWN_SUFFIXES}")
    names = [path.removeprefix(root).lstrip("/") for path in data if _format_of(_name(path))[0] is None]
    if skipped := [name for name in names if not _name(name).startswith(_HIDDEN)]:
        logger.warning(
            "skipped %d files of unknown format, first %r: give them a suffix such as .jsonl, .csv, .parquet or .txt",
            len(skipped),
            min(skipped),
        )
    return known


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _without_bookkeeping(filesystem: Any, files: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Drop what `datasets` writes beside its data: JSON notes and cached transformations."""
    folders = [path.removesuffix("/state.json") for path in files if path.endswith("/state.json")]
    data_files = {
        folder: _saved_data_files(filesystem, f"{folder}/state.json")
        for folder in folders
        if f"{folder}/dataset_info.json" in files
    }
    wanted = {}
    for path, info in files.items():
        folder, _, name = path.rpartition("/")
        if name in data_files.get(folder, {name}) and name != "dataset_dict.json":
            wanted[path] = info
    return wanted


def _saved_data_files(filesystem: Any, state_path: str) -> set[str]:
    try:
        state = json.loads(filesystem.cat_file(state_path))
        return {entry["filename"] for entry in state["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{state_path} is not the state of a saved data set; save it again") from error


def _walk(filesystem: Any, folder: str) -> dict[str, dict[str, Any]]:
    if isinstance(filesystem, LocalFileSystem):
        return _walk_local(folder)
    found = filesystem.find(folder, detail=True).items()
    # HTTP lists names only; what else is known of a file takes a request of its own.
    return {
        path: info if info["size"] is not None else _info(filesystem, path)
        for path, info in found
        if info["type"] == "file"
    }


def _walk_local(folder: str) -> dict[str, dict[str, Any]]:
    """Like `find`, but into linked folders too, each real folder once (so that loops end), by its own name if any."""
    files: dict[str, dict[str, Any]] = {}
    entered: set[Path] = set()
    waiting = [Path(folder)]  # links wait until all that is here by its own name has been entered
    for top in waiting:
        for here, subfolders, names in os.walk(top, onerror=_raise):
            if (real := Path(here).resolve()) in entered:
                subfolders.clear()
                continue
            entered.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(_HIDDEN))
            waiting += [link for name in subfolders if (link := Path(here, name)).is_symlink()]
            paths = [Path(here, name) for name in names]
            # A link to nothing is input that is missing; a socket or a pipe never was input.
            files |= {str(path): _local_info(path) for path in paths if path.is_file() or not path.exists()}
    return files


def _raise(error: OSError) -> None:
    raise error


def _info(filesystem: Any, path: str) -> dict[str, Any]:
    if isinstance(filesystem, LocalFileSystem):
        return _local_info(Path(path))
    info: dict[str, Any] = filesystem.info(path)
    return info


def _local_info(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
    except OSError:
        status = path.lstat()  # a link to nothing, or into a folder that is closed to us
    kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "other")
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "type": kind}


def _input_file(filesystem: Any, path: str, info: dict[str, Any]) -> InputFile | None:
    format_, compression = _format_of(_name(path))
    if format_ is None:
        return None
    if info.get("type") == "other":  # reading a pipe would wait for whoever writes to it
        raise InputError(f"{path} is a pipe, socket or device, not a file: write what it gives to a file")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise InputError(
            f"the name of {shown} is not UTF-8, which answers are stored in: rename it"
        ) from error
    return InputFile(
        path=path if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(path),
        format=format_,
        compression=compression,
        size_bytes=None if info["size"] is None else int(info["size"]),
        fingerprint=_fingerprint(info),
    )


def _format_of(name: str) -> tuple[Format | None, Compression | None]:
    suffixes = PurePosixPath(name.lower()).suffixes or [""]
    compression = COMPRESSIONS.get(suffixes[-1])
    format_ = FORMATS.get(suffixes[-1] if compression is None else "".join(suffixes[-2:-1]))
    if compression and format_ in ("parquet", "arrow"):
        return None, None
    return format_, compression


def _fingerprint(info: Mapping[str, Any]) -> str:
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")
    return f"{info['size']}-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
