"""The output folder as the report sees it: one run record, the parts, and the page it writes.

Local paths and URLs alike, through fsspec. Knows nothing of what the files mean.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import fsspec

from pipeline.errors import UsageError
from pipeline.records import FORMAT_VERSION, RunRecord

RUN_RECORD = "_deebert/run.json"
PAGE = "_deebert/report.html"
PARTS = "part-*.parquet"


@dataclass(frozen=True)
class RunFolder:
    """An output folder."""

    output: str
    """As the user gave it: a local path or a URL."""

    def run_record(self) -> RunRecord:
        """The run that the folder belongs to.

        Raises:
            UsageError: There is none, or it is not one that this version reads.
        """
        try:
            with fsspec.open(self.url(RUN_RECORD), "r", encoding="utf-8") as file:
                values = json.load(file)
        except FileNotFoundError:
            raise UsageError(
                f"{self.output} holds no run (it has no {RUN_RECORD}): "
                "give the folder that `deebert classify` wrote."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.url(RUN_RECORD)} is not JSON ({error}): the file is damaged.") from error
        return _run_record(values, self.url(RUN_RECORD))

    def parts(self) -> tuple[str, ...]:
        """Paths of the parts, in order of name."""
        fs, root = fsspec.core.url_to_fs(self.output)
        found = fs.glob(f"{_escape(root.rstrip('/'))}/{PARTS}")
        return tuple(fs.unstrip_protocol(path) for path in sorted(found))

    def write_page(self, html: str) -> str:
        """Writes the page, replacing an older one; returns its path or URL."""
        url = self.url(PAGE)
        try:
            with fsspec.open(url, "w", encoding="utf-8") as file:
                file.write(html)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"the report {url} cannot be written ({reason}): make it writable.") from error
        return url

    def url(self, name: str) -> str:
        """The path or URL of a file of the folder."""
        return f"{self.output.rstrip('/')}/{name}"


def _run_record(values: Any, url: str) -> RunRecord:
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UsageError(
            f"{url} has format version {version}, this software reads {FORMAT_VERSION}: "
            "use the version of the software that wrote it."
        )
    try:
        return RunRecord.from_dict(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{url} is not a complete run record ({error}): the file is damaged.") from error


def _escape(root: str) -> str:
    """A folder's own name may hold characters that mean something to glob."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in root)
