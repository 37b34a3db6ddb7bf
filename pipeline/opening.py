"""Opening input files: local ones on the native path, URLs through fsspec, compressed or not.

Knows how to get at bytes and Arrow batches; not what the columns mean or which rows are good.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import BrokenFileError, PipelineError
from pipeline.inputs import InputFile, first_line, is_local, locate

PARQUET_BUFFER_BYTES = 4 << 20
# What is fetched beyond a read, of URLs that are read from front to back; where reads are large it would be wasted.
_AHEAD_BYTES = 8 << 20
_GZIP_PIECE_BYTES = 1 << 14
_MAX_HEAD_BYTES = 8 << 20  # of decompressed content, however well it is compressed

READ_FAILURES = (pa.ArrowException, OSError, EOFError, csv.Error, zlib.error, zstandard.ZstdError)
"""What the libraries below raise for a file that is missing, broken or not what its suffix says."""


def open_file(file: InputFile) -> Any:
    """The stored bytes as a seekable `pyarrow.NativeFile`; each read of a URL is a request, for no more than it."""
    # Some stores' drivers fetch 50 MB more with every read.
    return pa.OSFile(file.path) if is_local(file.path) else _open_url(file, cache_type="none")


def _open_reading_ahead(file: InputFile) -> Any:
    """The same for small reads, one after the other."""
    if is_local(file.path):
        return pa.OSFile(file.path)
    return _open_url(file, cache_type="readahead", block_size=_AHEAD_BYTES)


def _open_url(file: InputFile, **caching: Any) -> Any:
    filesystem, path = locate(file.path)
    return pa.PythonFile(filesystem.open(path, "rb", **caching), mode="r")


def open_stream(file: InputFile) -> Any:
    """The content, decompressed, as a `pyarrow.NativeFile` to read from front to back."""
    stored = _open_reading_ahead(file)
    return stored if file.compression is None else pa.CompressedInputStream(stored, file.compression)


def open_parquet(file: InputFile) -> Any:
    """A `pyarrow.parquet.ParquetFile` that holds a few buffers, not whole column chunks, in memory."""
    return pq.ParquetFile(open_file(file), buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)


def arrow_schema(file: InputFile) -> Any:
    """The schema of an Arrow file, of the stream or the file kind."""
    return _arrow_reader(file, None).schema


def arrow_batches(file: InputFile, *, columns: Sequence[str] | None = None, first: int = 0) -> Iterator[Any]:
    """The record batches of an Arrow file from number `first` on; local ones are memory-mapped, not read.

    Compressed ones are decoded: no column but `columns`, and what lies before `first` only in the stream kind.
    """
    reader = _arrow_reader(file, columns)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from map(reader.get_batch, range(first, reader.num_record_batches))
    else:
        yield from islice(reader, first, None)


def arrow_batch_rows(file: InputFile) -> tuple[int, ...]:
    """Rows of each record batch of an Arrow file, told by the column that takes least to decode."""
    schema = arrow_schema(file)
    cheapest = next((field.name for field in schema if pa.types.is_primitive(field.type)), schema[0].name)
    return tuple(batch.num_rows for batch in arrow_batches(file, columns=[cheapest]))


def _arrow_reader(file: InputFile, columns: Sequence[str] | None) -> Any:
    source = pa.memory_map(file.path) if is_local(file.path) else _open_reading_ahead(file)
    is_file_kind = source.read(6) == b"ARROW1"  # `datasets` writes the stream kind, which has no magic
    open_reader = pa.ipc.open_file if is_file_kind else pa.ipc.open_stream
    source.seek(0)
    if columns is None:
        return open_reader(source)
    fields = list(map(open_reader(source).schema.get_field_index, columns))
    source.seek(0)
    return open_reader(source, options=pa.ipc.IpcReadOptions(included_fields=fields))


def head(file: InputFile, num_bytes: int) -> tuple[bytes, int]:
    """The beginning of the content, and how many stored bytes it came from.

    At most `num_bytes` stored bytes are read, fewer only where the file ends. What they decompress to may
    end in mid-line.
    """
    with refusing(file), open_file(file) as stored:
        raw = stored.read(num_bytes)
        # A server's pieces may be short.
        while len(raw) < num_bytes and (more := stored.read(num_bytes - len(raw))):
            raw += more
        if file.compression == "gzip":
            return _gzip_head(raw)
        if file.compression == "zstd":
            return _zstd_head(raw)
        return raw, len(raw)


def _gzip_head(raw: bytes) -> tuple[bytes, int]:
    inflate, data, offset = zlib.decompressobj(wbits=31), bytearray(), 0
    while offset < len(raw) and len(data) < _MAX_HEAD_BYTES:
        if inflate.eof:  # a file may be several members, one after the other
            inflate = zlib.decompressobj(wbits=31)
        piece = raw[offset : offset + _GZIP_PIECE_BYTES]
        data += inflate.decompress(piece, _MAX_HEAD_BYTES - len(data))
        offset += len(piece) - len(inflate.unconsumed_tail) - len(inflate.unused_data)
    return bytes(data), offset


def _zstd_head(raw: bytes) -> tuple[bytes, int]:
    stored = io.BytesIO(raw)
    reader = zstandard.ZstdDecompressor().stream_reader(stored, read_size=1 << 16, read_across_frames=True)
    return reader.read(_MAX_HEAD_BYTES), stored.tell()


@contextmanager
def refusing(file: InputFile) -> Iterator[None]:
    """Turn failures to read a file before the run starts into one sentence."""
    try:
        yield
    except Exception as error:
        if not is_read_failure(file, error):
            raise
        raise BrokenFileError(f"{file.path} cannot be read as {file.format}: {first_line(error)}") from error


def is_read_failure(file: InputFile, error: Exception) -> bool:
    """Whether an exception says that the file cannot be read; stores have more kinds than can be listed."""
    if isinstance(error, MemoryError):  # one of Arrow's errors is both: the file is as good as it was
        return False
    return isinstance(error, READ_FAILURES) or not (is_local(file.path) or isinstance(error, PipelineError))
