"""Input that is wrong in every way that we know of, and what `deebert classify` makes of it.

`python -m tests.faults.bad_input` runs every case and prints the table of `BAD_INPUT.md`;
`test_bad_input` holds every case to what is expected here. Every folder holds a good file too, with `GOOD`
rows: whatever is wrong beside it, its rows are classified.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import logging
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from jobs.cli import main

GOOD = 10
DONE, FAILED, MISUSE = 0, 1, 2
DEADLINE_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to be wrong."""

    name: str
    write: Callable[[Path], None]
    """Adds it to the input folder, where ``good.parquet`` is already."""
    exit_code: int = DONE
    kept: int = 0
    """Rows classified, those of the good file aside."""
    dead: Sequence[str] = ()
    """What the reasons of the dead letters match, in the order of file and row."""
    says: str = ""
    """What the last line printed matches."""
    meanwhile: Callable[[Path], None] | None = None
    """Done to the input folder once the run has been planned."""
    output_inside: bool = False
    flags: tuple[str, ...] = ()


def lines(name: str, *content: bytes) -> Callable[[Path], None]:
    return lambda folder: _write(folder / name, b"\n".join(content) + b"\n")


def parquet(name: str, texts: pa.Array, **columns: pa.Array) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table({"text": texts, **columns}), folder / name)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def broken_strings(*values: bytes) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


def spoilt(name: str, spoil: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        good = (folder / "good.parquet").read_bytes()
        _write(folder / name, spoil(good))

    return write


def linked(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    pq.write_table(pa.table({"text": ["very good"] * 3}), elsewhere / "a.parquet")
    (folder / "file.parquet").symlink_to(elsewhere / "a.parquet")
    (folder / "folder").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)


def unreadable(folder: Path) -> None:
    """A file that is there and gives an input/output error when it is read, to the superuser too."""
    (folder / "unreadable.txt").symlink_to("/proc/self/mem")


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"text": "one more"}\n')


CASES = (
    Case(
        name="null text",
        write=lines("a.jsonl", b'{"text": "good"}', b'{"text": null}', b"{}"),
        kept=1,
        dead=["'text' is null", "'text' is null"],
    ),
    Case(
        name="text that is a number, in one row",
        write=lines("a.jsonl", b'{"text": "good"}', b'{"text": 5}'),
        kept=1,
        dead=["'text' is a number, not text"],
    ),
    Case(
        name="a text column of numbers",
        write=parquet("a.parquet", pa.array([1, 2])),
        exit_code=MISUSE,
        says=r"column 'text' of .*a\.parquet is int64; a text column must hold strings",
    ),
    Case(
        name="invalid UTF-8 in Parquet",
        write=parquet("a.parquet", broken_strings(b"good", b"\xff\xfe", b"bad")),
        kept=2,
        dead=["not valid UTF-8"],
    ),
    Case(
        name="invalid UTF-8 in CSV",
        write=lines("a.csv", b"text,n", b"good,1", b"\xff\xfe,2", b"bad,3"),
        kept=2,
        dead=["not valid UTF-8"],
    ),
    Case(
        name="invalid UTF-8 in JSON lines",
        write=lines("a.jsonl", b'{"text": "good"}', b'{"text": "\xff"}'),
        kept=1,
        dead=["not valid UTF-8"],
    ),
    Case(
        name="invalid UTF-8 in text",
        write=lines("a.txt", b"good", b"\xff\xfe", b"bad"),
        kept=2,
        dead=["not valid UTF-8"],
    ),
    Case(name="NUL bytes", write=parquet("a.parquet", pa.array(["\0", "go\0od", "bad"])), kept=3),
    Case(
        name="half a surrogate pair",
        write=lines("a.jsonl", rb'{"text": "\ud800"}', rb'{"text": "\ud83d\ude00"}'),
        kept=1,
        dead=["surrogate"],
    ),
    Case(name="a document of 5 MB", write=parquet("a.parquet", pa.array(["very good " * 500_000])), kept=1),
    Case(name="100,000 empty strings", write=parquet("a.parquet", pa.array([""] * 100_000)), kept=100_000),
    Case(name="a Parquet file without rows", write=parquet("a.parquet", pa.array([], pa.string()))),
    Case(name="an empty file", write=lambda folder: _write(folder / "a.jsonl", b"")),
    Case(
        name="a Parquet file cut short",
        write=spoilt("a.parquet", lambda content: content[: len(content) // 2]),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*a\.parquet cannot be read as parquet",
    ),
    Case(
        name="a Parquet file with a wrong footer",
        write=spoilt("a.parquet", lambda content: content[:-100] + bytes(92) + content[-8:]),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*a\.parquet cannot be read as parquet",
    ),
    Case(
        name="a Parquet file with damaged pages",
        write=spoilt("a.parquet", lambda content: content[:8] + b"\xff" * 60 + content[68:]),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*a\.parquet could not be read as parquet",
    ),
    Case(
        name="a gzip file cut short",
        write=lambda folder: _write(
            folder / "a.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * 50_000, mtime=0)[:-20]
        ),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*a\.jsonl\.gz could not be read as jsonl",
    ),
    Case(
        name="a CSV row with too many columns",
        write=lines("a.csv", b"text,n", b"good,1", b"bad,2,3", b"dull,4"),
        kept=2,
        dead=["the row has 3 columns, not 2"],
    ),
    Case(
        name="a broken line of JSON",
        write=lines("a.jsonl", b'{"text": "good"}', b'{"text": "ba', b"[1]", b'{"text": "dull"}'),
        kept=2,
        dead=["the line is not JSON", "the line is an array"],
    ),
    Case(
        name="a file without the text column",
        write=lambda folder: pq.write_table(pa.table({"body": ["good"]}), folder / "a.parquet"),
        exit_code=MISUSE,
        says=r"a\.parquet has no column 'text'; its columns are: body",
    ),
    Case(
        name="a kept column of two types",
        write=parquet("a.parquet", pa.array(["good"]), n=pa.array(["one"])),
        flags=("--keep-columns", "n"),
        exit_code=MISUSE,
        says=r"column 'n' is (string|int64) in .* but (string|int64) in ",
    ),
    Case(
        name="columns that nobody asked for, of any type",
        write=parquet("a.parquet", pa.array(["good"]), other=pa.array([[1]])),
        kept=1,
    ),
    Case(
        name="the same id twice",
        write=parquet("a.parquet", pa.array(["good", "bad"]), n=pa.array([1, 1])),
        flags=("--id-column", "n"),
        kept=2,
    ),
    Case(
        name="names with spaces and unicode",
        write=parquet("grüße an 世界 #1 %41.parquet", pa.array(["good", "bad"])),
        kept=2,
    ),
    Case(name="links to a file, to a folder, and in a loop", write=linked, kept=6),
    Case(
        name="a link to nothing",
        write=lambda folder: (folder / "gone.parquet").symlink_to(folder / "nothing"),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*gone\.parquet cannot be read as parquet.*No such file",
    ),
    Case(
        name="a file that cannot be read",
        write=unreadable,
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*unreadable\.txt cannot be read as text.*Input/output error",
    ),
    Case(
        name="a file that vanishes during the run",
        write=lines("a.jsonl", b'{"text": "good"}'),
        meanwhile=lambda folder: (folder / "a.jsonl").unlink(),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*a\.jsonl could not be read as jsonl.*No such file",
    ),
    Case(
        name="a file that changes during the run",
        write=lines("a.jsonl", b'{"text": "good"}'),
        meanwhile=lambda folder: touch(folder / "a.jsonl"),
        exit_code=FAILED,
        says=r"1 of 2 shards are not committed.*a\.jsonl has changed since the run was planned; run again",
    ),
    Case(name="the output inside the input folder", write=lambda folder: None, output_inside=True),
    Case(
        name="more bad rows than allowed",
        write=parquet("a.parquet", pa.array([None] * 200, pa.string())),
        exit_code=FAILED,
        says=r"200 rows cannot be classified, more than --max-bad-rows 100",
        dead=["'text' is null"] * 200,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a case."""

    exit_code: int
    said: str
    """The last line that is no progress."""
    kept: int
    reasons: tuple[str, ...]
    has_success: bool


def run_case(case: Case, model: Path, folder: Path) -> Result:
    """Classify the case's folder by the command line's own entry."""
    source = folder / "in"
    source.mkdir(parents=True)
    numbers = pa.array(range(GOOD), pa.int64())
    pq.write_table(pa.table({"text": ["the film is good"] * GOOD, "n": numbers}), source / "good.parquet")
    case.write(source)
    output = source / "out" if case.output_inside else folder / "out"
    words = ["classify", "--model", str(model), "--input", str(source), "--output", str(output)]
    words += ["--precision", "float32", "--replicas", "1", "--threads", "1", *case.flags]
    with _captured() as said, _meanwhile(case, source, output):
        exit_code = main(words)
    letters = sorted((output / "_deebert" / "dead_letters").glob("*.jsonl"))
    found = [json.loads(line) for path in letters for line in path.read_text().splitlines()]
    found.sort(key=lambda letter: (letter["source_file"], letter["source_row"]))
    return Result(
        exit_code=exit_code,
        said=said.getvalue().strip().splitlines()[-1].replace(str(folder), "…"),
        kept=_rows(output) - GOOD if exit_code != MISUSE else 0,
        reasons=tuple(letter["reason"] for letter in found),
        has_success=(output / "_SUCCESS").exists(),
    )


def check(case: Case, result: Result) -> None:
    """Hold the result to what the case expects."""
    assert result.exit_code == case.exit_code, result.said
    assert re.search(case.says, result.said), result.said
    assert "Traceback" not in result.said
    assert result.has_success == (case.exit_code == DONE)
    assert len(result.reasons) == len(case.dead)
    for found, expected in zip(result.reasons, case.dead, strict=True):
        assert re.search(re.escape(expected), found), found
    assert result.kept == case.kept


def _rows(output: Path) -> int:
    if not list(output.glob("part-*.parquet")):
        return 0
    rows: int = pyarrow.dataset.dataset(sorted(map(str, output.glob("part-*.parquet")))).count_rows()
    return rows


@contextlib.contextmanager
def _captured() -> Iterator[io.StringIO]:
    """Python's stderr and logging, as the terminal would show them."""
    said, before = io.StringIO(), sys.stderr
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    sys.stderr = said
    try:
        yield said
    finally:
        sys.stderr = before
        root.handlers[:], root.level = handlers, level


@contextlib.contextmanager
def _meanwhile(case: Case, source: Path, output: Path) -> Iterator[None]:
    """Change the input once the run is planned: before its replica, which takes seconds to start, can read."""
    if case.meanwhile is None:
        yield
        return

    def change() -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (output / "_deebert" / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        case.meanwhile(source)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def table(results: Sequence[tuple[Case, Result]]) -> str:
    """Markdown."""
    rows = ["| input | exit code | rows kept | dead letters | says |", "|---|---|---|---|---|"]
    for case, result in results:
        reasons = dict.fromkeys(result.reasons)
        letters = f"{len(result.reasons)}: {'; '.join(reasons)}" if reasons else "none"
        said = re.sub(r"^[\d-]+ [\d:,]+ (INFO|ERROR) ", "", result.said)
        cells = (case.name, result.exit_code, f"{result.kept:,}", letters, said)
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def report() -> int:
    """Run every case on a tiny model; print the table."""
    from tests.conftest import local_ray, save_tiny_model

    results = []
    with tempfile.TemporaryDirectory() as name, local_ray():
        folder = Path(name)
        model = save_tiny_model(folder / "model")
        for number, case in enumerate(CASES):
            result = run_case(case, model, folder / str(number))
            check(case, result)
            results.append((case, result))
            print(case.name, file=sys.stderr)
    print(
        __doc__.split("\n\n")[0]
        + f" The good file's {GOOD} rows, kept in every case but misuse, are not counted.\n"
    )
    print("Generated by `make test-bad-input`; each case is also a test.\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(report())
