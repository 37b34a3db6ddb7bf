"""What columns the input has: checked before anything runs, so that every shard decodes alike.

Reads footers, headers and the first block of files; never a whole file. Knows nothing of shards.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.catalog import Catalog, Columns
from pipeline.errors import BrokenFileError, InputError
from pipeline.inputs import InputFile
from pipeline.opening import arrow_schema, head, open_parquet, refusing

FIRST_BLOCK_BYTES = 1 << 20
OTHER_BLOCK_BYTES = 1 << 16
_MAX_BLOCK_BYTES = 1 << 26
_MAX_CONNECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class InputSchema:
    """The columns that every shard of a run decodes to."""

    text_columns: tuple[str, ...]
    """The columns that are classified: strings in every file."""
    kept: pa.Schema
    """Id and kept columns with one type each, in the order asked for, whichever file a row is from."""


def check_columns(
    files: Sequence[InputFile],
    text_columns: Sequence[str],
    other_columns: Sequence[str],
    *,
    catalog: Catalog | None = None,
    begun: Mapping[str, Any] | None = None,
) -> InputSchema:
    """Check that every file has the columns, with one type; `other_columns` are ids and kept columns.

    Types of JSON lines come from the first block of each file (a column without values there is a string),
    and one of them at least must show each column; CSV columns are strings; a text file has the one column
    ``text``. Dictionaries, views and large strings are kept as plain strings. A file that cannot be read is
    left out here and named by its shard. What `catalog` knows is not looked up again. Columns have the types that
    `begun` says an output has them with already, and each file must fit those.

    Raises InputError, also when no file at all can be read.
    """
    first_jsonl = next((file for file in files if file.format == "jsonl" and file.size_bytes != 0), None)

    def probe(file: InputFile) -> Columns | BrokenFileError | None:
        block_bytes = FIRST_BLOCK_BYTES if file is first_jsonl else OTHER_BLOCK_BYTES
        look = partial(_columns, file, block_bytes)
        try:
            with refusing(file):
                return look() if catalog is None else catalog.columns(file, block_bytes, look)
        except BrokenFileError as error:
            return error

    with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
        probes = list(zip(files, pool.map(probe, files), strict=True))
    broken = [found for _, found in probes if isinstance(found, BrokenFileError)]
    if broken and len(broken) == len(files):
        raise broken[0]
    known = [(file, found) for file, found in probes if isinstance(found, Mapping)]
    for file, columns in known:
        _require(file.path, columns, text_columns)
        if file.format != "jsonl":
            _require(file.path, columns, other_columns)
        for name in text_columns:
            _require_text(file, name, columns[name])
    if lines := [(file.path, columns) for file, columns in known if file.format == "jsonl"]:
        # A field that one of these lacks is a null; one that all lack is a mistake.
        first, more = lines[0][0], len(lines) - 1
        shown = dict.fromkeys(name for _, columns in lines for name in columns)
        _require(f"{first} (like {more} more of JSON lines)" if more else first, shown, other_columns)
    fixed = begun or {}
    kept = [
        pa.field(name, _fitted(known, name, fixed[name]) if name in fixed else _agreed_type(known, name))
        for name in dict.fromkeys(other_columns)
    ]
    return InputSchema(text_columns=tuple(text_columns), kept=pa.schema(kept))


def _require(where: str, columns: Collection[str], names: Sequence[str]) -> None:
    for name in names:
        if name not in columns:
            existing = ", ".join(columns) or "none"
            raise InputError(f"{where} has no column {name!r}; its columns are: {existing}")


def _require_text(file: InputFile, name: str, type_: Any) -> None:
    if not (pa.types.is_string(plain_type(type_)) or pa.types.is_null(type_)):  # each null is a bad row
        raise InputError(f"column {name!r} of {file.path} is {type_}; a text column must hold strings")


def _agreed_type(probes: Sequence[tuple[InputFile, Columns]], name: str) -> Any:
    """The type of a kept column: what files declare, else the one that holds what all JSON lines show."""
    types = [(file, plain_type(columns[name])) for file, columns in probes if name in columns]
    shown = [(file, type_) for file, type_ in types if not pa.types.is_null(type_)]
    if not shown:
        return pa.string()
    # A block may not show the whole type, so what is declared comes first, whatever the order of the files.
    shown.sort(key=lambda each: each[0].format == "jsonl")
    first_file, agreed = shown[0]
    for file, type_ in shown[1:]:
        if first_file.format == "jsonl":
            both = _holding_both(agreed, type_)
        else:
            both = agreed if type_ == agreed or (file.format == "jsonl" and _widens(type_, agreed)) else None
        if both is None:
            of_csv = " (CSV columns are strings)" if "csv" in (first_file.format, file.format) else ""
            raise InputError(
                f"column {name!r} is {agreed} in {first_file.path} but {type_} in {file.path}{of_csv}: classify them "
                "into separate outputs, or leave the column out of --id-column and --keep-columns"
            )
        agreed = both
    return _settled(agreed)


def _fitted(probes: Sequence[tuple[InputFile, Columns]], name: str, begun: Any) -> Any:
    """The type that the output's column was begun with: rows of other files are there already, whatever these show."""
    for file, columns in probes:
        type_ = plain_type(columns.get(name, pa.null()))
        if pa.types.is_null(type_) or _settled(type_) == begun:
            continue
        # What JSON shows, a column of strings takes as text: nothing is lost.
        if file.format != "jsonl" or not _widens(type_, begun, to_text=True):
            raise InputError(
                f"column {name!r} is {type_} in {file.path}, but the output was begun with {begun}: convert the file, "
                "classify it into another output, or start over with --overwrite"
            )
    return begun


def spelled_type(text: str) -> Any:
    """The type that is written so, of those that JSON values have; None for another."""
    if text.startswith("list<item: ") and text.endswith(">"):
        values = spelled_type(text.removeprefix("list<item: ")[:-1])
        return None if values is None else pa.list_(values)
    if text.startswith("struct<") and text.endswith(">"):
        fields: list[str] = []
        depth = 0
        for piece in text.removeprefix("struct<")[:-1].split(", "):
            if depth:
                fields[-1] += f", {piece}"
            else:
                fields.append(piece)
            depth += piece.count("<") - piece.count(">")
        types = {name: spelled_type(type_) for name, _, type_ in (field.partition(": ") for field in fields)}
        return None if None in types.values() else pa.struct(list(types.items()))
    try:
        return pa.type_for_alias(text)
    except ValueError:
        return None


def _holding_both(one: Any, other: Any) -> Any:
    """The type of values that JSON blocks showed as `one` and as `other`; None where there is none."""
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one.fields}
        for field in other.fields:
            fields[field.name] = _holding_both(fields.get(field.name, pa.null()), field.type)
        return None if None in fields.values() else pa.struct(list(fields.items()))
    if pa.types.is_list(one) and pa.types.is_list(other):
        values = _holding_both(one.value_type, other.value_type)
        return None if values is None else pa.list_(values)
    if _widens(one, other):
        return other
    return one if _widens(other, one) else None


def _settled(type_: Any) -> Any:
    """The type with strings where no value told a type."""
    if pa.types.is_null(type_):
        return pa.string()
    if pa.types.is_list(type_):
        return pa.list_(_settled(type_.value_type))
    if pa.types.is_struct(type_):
        fields = [type_.field(index) for index in range(type_.num_fields)]
        # Parquet has no struct without fields; its JSON text is kept.
        return (
            pa.struct([field.with_type(_settled(field.type)) for field in fields]) if fields else pa.string()
        )
    return type_


def without_views(type_: Any) -> Any:
    """The type with strings and bytes for views of them, at any depth: Arrow filters and takes no views."""
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_dictionary(type_):
        return pa.dictionary(type_.index_type, without_views(type_.value_type), type_.ordered)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        make = pa.list_ if pa.types.is_list(type_) else pa.large_list
        return make(type_.value_field.with_type(without_views(type_.value_type)))
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(without_views(field.type)) for field in type_.fields])
    return type_


def plain_type(type_: Any) -> Any:
    """The type a column is decoded to: no dictionary, view, large string or extension."""
    type_ = without_views(type_)
    if pa.types.is_dictionary(type_):
        return plain_type(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return plain_type(type_.storage_type)
    if pa.types.is_large_string(type_):
        return pa.string()
    if pa.types.is_large_binary(type_):
        return pa.binary()
    return type_


def _widens(inferred: Any, agreed: Any, *, to_text: bool = False) -> bool:
    """Whether values that a JSON block showed as `inferred` can be read as `agreed`; `to_text`: as JSON text too."""
    if inferred == agreed or pa.types.is_null(inferred) or (to_text and pa.types.is_string(agreed)):
        return True
    if pa.types.is_struct(inferred) and pa.types.is_struct(agreed):
        shared = [agreed.field(i).name for i in range(agreed.num_fields)]
        pairs = [
            (inferred.field(n).type, agreed.field(n).type) for n in shared if inferred.get_field_index(n) >= 0
        ]
        return all(_widens(one, other, to_text=to_text) for one, other in pairs)
    if pa.types.is_list(inferred) and pa.types.is_list(agreed):
        return _widens(inferred.value_type, agreed.value_type, to_text=to_text)
    return bool(pa.types.is_integer(inferred) and pa.types.is_floating(agreed))


def _columns(file: InputFile, block_bytes: int) -> Columns | None:
    """The columns of a file; None for one without rows to tell them from."""
    match file.format:
        case "parquet":
            with open_parquet(file) as parquet:
                return _named_once(file, parquet.schema_arrow)
        case "arrow":
            return _named_once(file, arrow_schema(file))
        case "csv":
            return csv_columns(file, block_bytes)
        case "jsonl":
            return _jsonl_columns(file, block_bytes)
        case "text":
            head(file, 1)  # proves that it can be opened
            return {"text": pa.string()}


def _named_once(file: InputFile, schema: Any) -> Columns:
    columns = {field.name: field.type for field in schema}
    if len(columns) < len(schema):
        raise InputError(f"{file.path} has two columns of one name among: {', '.join(schema.names)}")
    return columns


def csv_columns(file: InputFile, block_bytes: int = OTHER_BLOCK_BYTES) -> Columns | None:
    """The columns that the header of a CSV or TSV file names, all strings; None where it is empty."""
    while True:
        block, is_whole = _block(file, block_bytes)
        text = io.StringIO(block.decode("utf-8-sig", errors="replace"), newline="")
        header = next((row for row in csv.reader(text, delimiter=csv_delimiter(file)) if row), None)
        # What ends with the block may go on behind it.
        if is_whole or text.read(1) or block_bytes >= _MAX_BLOCK_BYTES:
            break
        block_bytes *= 4
    if header is None:
        return None
    return _named_once(file, pa.schema([(name, pa.string()) for name in header]))


def csv_delimiter(file: InputFile) -> str:
    """A tab for ``.tsv`` (compressed or not), else a comma."""
    suffixes = PurePosixPath(file.path.lower()).suffixes
    return "\t" if suffixes[-1 if file.compression is None else -2] == ".tsv" else ","


def _jsonl_columns(file: InputFile, block_bytes: int) -> Columns | None:
    block = _whole_lines(file, block_bytes).removeprefix(b"\xef\xbb\xbf")
    opening = block.lstrip()[:1].decode(errors="replace")
    if opening == "[" or block.lstrip().split(b"\n", 1)[0].strip() == b"{":
        kind = "one JSON array" if opening == "[" else "JSON over several lines"
        raise InputError(f"{file.path} holds {kind}; write one JSON object per line")
    records = [record for line in block.split(b"\n") if (record := _json_object(line)) is not None]
    if not records:
        return None
    names = dict.fromkeys(name for record in records for name in record)
    return {name: _inferred([record.get(name) for record in records]) for name in names}


def _whole_lines(file: InputFile, block_bytes: int) -> bytes:
    """The first block, cut after its last whole line, however long the first line is."""
    while True:
        block, is_whole = _block(file, block_bytes)
        if is_whole:
            return block
        if b"\n" in block or block_bytes >= _MAX_BLOCK_BYTES:
            return block[: block.rfind(b"\n") + 1]
        block_bytes *= 4


def _block(file: InputFile, block_bytes: int) -> tuple[bytes, bool]:
    """The beginning of the content, and whether it is all of it."""
    block, stored_bytes = head(file, block_bytes)
    if file.size_bytes is None:
        return block, stored_bytes < block_bytes
    return block, stored_bytes >= file.size_bytes


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _inferred(values: list[Any]) -> Any:
    """The Arrow type of JSON values; values of several kinds are kept as their JSON text."""
    try:
        return pa.array(values).type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.string()
