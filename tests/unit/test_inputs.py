"""One name for each file however it is spelled, and stores that tell less than a disk: real links, a real server."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import InputError
from pipeline.input_schema import check_columns
from pipeline.inputs import current_fingerprint, discover
from pipeline.shards import plan
from pipeline.source import read_shard

pytest.importorskip("aiohttp")

Serve = Callable[..., str]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(*paths: Path | str) -> list[str]:
    return [file.path for file in discover([str(path) for path in paths])]


def texts(url: str, *, shard_rows: int = 1000) -> list[str]:
    """All good rows of an input, through every step of a run."""
    files = discover([url])
    schema = check_columns(files, ["text"], [])
    return [
        text
        for shard in plan(files, shard_rows=shard_rows)
        for batch in read_shard(
            shard, text_columns=["text"], other_columns=[], schema=schema, batch_rows=1000
        )
        for text in batch.texts[0].to_pylist()
    ]


class TestSpelling:
    def test_a_file_has_one_name_however_its_path_is_spelled(self, tmp_path, monkeypatch):
        file = write(tmp_path / "data" / "x.jsonl", "{}")
        (tmp_path / "jobs").mkdir()
        monkeypatch.chdir(tmp_path / "jobs")
        spellings = [
            "../data/x.jsonl",
            "./../data//x.jsonl",
            "../data/./x.jsonl",
            f"/{file}",
            f"file://{tmp_path}/jobs/../data/x.jsonl",
            "file:../data/x.jsonl",
            "../data",
            "../data/",
            "../jobs/../data/*.jsonl",
        ]
        for spelling in spellings:
            assert found(spelling) == [str(file)], spelling
        assert found(*spellings) == [str(file)]

    def test_what_follows_a_link_upwards_is_where_the_system_finds_it(self, tmp_path):
        write(tmp_path / "x.txt", "beside the link")
        file = write(tmp_path / "far" / "x.txt", "beside the folder that it leads to")
        (tmp_path / "far" / "folder").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
        assert found(f"{tmp_path}/link/../x.txt") == [str(file)]


class TestLinks:
    def test_a_link_to_a_file_of_the_input_is_left_out_and_counted(self, tmp_path, caplog):
        file = write(tmp_path / "in" / "b.txt", "x")
        (tmp_path / "in" / "a.txt").symlink_to(file)
        (tmp_path / "in" / "z").symlink_to(file.parent)
        (tmp_path / "elsewhere.txt").symlink_to(file)
        with caplog.at_level(logging.INFO, logger="pipeline.inputs"):
            assert found(tmp_path / "elsewhere.txt", tmp_path / "in") == [str(file)]
        assert [record.getMessage() for record in caplog.records] == [
            "left out 2 links to files that the input holds already"
        ]

    def test_of_two_links_that_are_given_the_first_is_kept(self, tmp_path):
        file = write(tmp_path / "far" / "x.txt", "x")
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).symlink_to(file)
        assert found(tmp_path / "b.txt", tmp_path / "a.txt") == [str(tmp_path / "b.txt")]
        (tmp_path / "folder").symlink_to(file.parent)
        assert found(tmp_path / "folder", tmp_path / "a.txt") == [str(tmp_path / "folder" / "x.txt")]

    def test_a_link_alone_keeps_its_own_name(self, tmp_path, caplog):
        file = write(tmp_path / "far" / "x.txt", "x")
        (tmp_path / "a.txt").symlink_to(file)
        with caplog.at_level(logging.INFO, logger="pipeline.inputs"):
            assert found(tmp_path / "a.txt") == [str(tmp_path / "a.txt")]
        assert not caplog.records

    def test_a_linked_folder_does_not_take_over_the_names_in_the_one_that_it_leads_to(self, tmp_path):
        file = write(tmp_path / "in" / "v1" / "x.txt", "x")
        before = found(tmp_path / "in")
        (tmp_path / "in" / "latest").symlink_to("v1")
        assert found(tmp_path / "in") == before == [str(file)]

    def test_a_folder_that_only_links_lead_to_has_the_first_ones_name(self, tmp_path):
        write(tmp_path / "far" / "x.txt", "x")
        (tmp_path / "in" / "z").mkdir(parents=True)
        for link in ("in/b", "in/z/a"):
            (tmp_path / link).symlink_to(tmp_path / "far")
        (tmp_path / "far" / "loop").symlink_to(tmp_path / "in")
        assert found(tmp_path / "in") == [str(tmp_path / "in" / "b" / "x.txt")]


class TestWhatIsNoFile:
    def test_a_pipe_that_is_named_or_matched_is_refused_and_not_waited_for(self, tmp_path):
        file = write(tmp_path / "y.txt", "one")
        os.mkfifo(tmp_path / "x.txt")
        for path in (tmp_path / "x.txt", tmp_path / "*.txt"):
            with pytest.raises(InputError, match=r"x\.txt is a pipe, socket or device, not a file: "):
                found(path)
        assert found(tmp_path) == [str(file)]

    def test_a_name_that_is_not_utf_8_is_shown_and_refused(self, tmp_path):
        write(tmp_path / os.fsdecode(b"caf\xe9.txt"), "one")
        with pytest.raises(InputError) as caught:
            found(tmp_path)
        assert str(caught.value) == (
            f"the name of {tmp_path}/caf\\xe9.txt is not UTF-8, which answers are stored in: rename it"
        )


class TestUnknownFormats:
    def test_skipped_files_are_counted_and_the_first_is_named(self, tmp_path, caplog):
        for name in ["a.txt", "part-00001", "part-00000", "x/part-00002", "_SUCCESS", ".part.crc"]:
            write(tmp_path / name, "x")
        assert found(tmp_path) == [str(tmp_path / "a.txt")]
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            (
                "WARNING",
                "skipped 3 files of unknown format, first 'part-00000': give them a suffix such as .jsonl, "
                ".csv, .parquet or .txt",
            )
        ]

    def test_hidden_files_are_skipped_in_silence_even_where_such_are_meant(self, tmp_path, caplog):
        for name in ["_a.txt", "_SUCCESS"]:
            write(tmp_path / name, "x")
        assert found(tmp_path / "_*") == [str(tmp_path / "_a.txt")]
        assert not caplog.records


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts an HTTP server for a folder and gives its URL; ``sized=False`` tells no size, no date, no ranges."""
    servers = []

    def start(folder: Path, *, sized: bool = True) -> str:
        class Files(SimpleHTTPRequestHandler):
            def __init__(self, *args: object) -> None:
                super().__init__(*args, directory=str(folder))

            def log_message(self, *args: object) -> None:
                pass

        class Chunks(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                is_file = (folder / self.path.lstrip("/")).is_file()
                self.send_response(200 if is_file else 404)
                if is_file:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.send_header("Content-Type", "application/octet-stream")
                else:
                    self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                if (file := folder / self.path.lstrip("/")).is_file():
                    content = file.read_bytes()
                    for start in range(0, len(content), 1000):
                        chunk = content[start : start + 1000]
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                    self.wfile.write(b"0\r\n\r\n")

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Files if sized else Chunks)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class TestHttp:
    @pytest.mark.parametrize("sized", [True, False])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.jsonl.gz"])
    def test_every_row_is_read_whether_or_not_the_server_tells_the_size(self, tmp_path, serve, name, sized):
        expected = [f"row {row}" for row in range(20_000)]
        lines = [json.dumps({"text": text}) for text in expected] if "json" in name else expected
        content = "\n".join(["text", *lines] if name == "a.csv" else lines).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
        assert texts(f"{serve(tmp_path, sized=sized)}/{name}", shard_rows=500) == expected

    @pytest.mark.parametrize("sized", [True, False])
    def test_an_empty_file_has_no_shard(self, tmp_path, serve, sized):
        write(tmp_path / "a.jsonl", "")
        assert plan(discover([f"{serve(tmp_path, sized=sized)}/a.jsonl"]), shard_rows=10) == ()

    def test_columns_are_checked_in_a_file_of_unknown_size(self, tmp_path, serve):
        write(tmp_path / "a.jsonl", '{"body": "no newline at the end"}')
        with pytest.raises(InputError, match="no column 'text'; its columns are: body"):
            texts(f"{serve(tmp_path, sized=False)}/a.jsonl")

    def test_a_format_that_needs_the_end_first_is_a_broken_file(self, tmp_path, serve):
        write(tmp_path / "a.parquet", b"PAR1" * 10)
        (shard,) = plan(discover([f"{serve(tmp_path, sized=False)}/a.parquet"]), shard_rows=10)
        assert "a.parquet cannot be read as parquet: " in shard.flaw

    def test_the_fingerprint_follows_the_date(self, tmp_path, serve):
        url = f"{serve(tmp_path)}/a.jsonl"
        path = write(tmp_path / "a.jsonl", '{"text": "one"}')
        os.utime(path, (1_000_000_000, 1_000_000_000))
        (before,) = discover([url])
        assert current_fingerprint(before) == before.fingerprint
        write(path, '{"text": "two"}')
        os.utime(path, (1_000_000_060, 1_000_000_060))
        assert current_fingerprint(before) != before.fingerprint

    def test_a_listed_file_is_known_as_well_as_one_that_is_named(self, tmp_path, serve):
        write(tmp_path / "in" / "a.jsonl", '{"text": "one"}')
        url = f"{serve(tmp_path)}/in"
        assert discover([f"{url}/"]) == discover([f"{url}/a.jsonl"])
        assert texts(f"{url}/") == ["one"]


class NoCredentialsError(Exception):
    """As botocore's: not an OSError."""


class TestStores:
    @pytest.mark.parametrize("call", ["isdir", "exists", "info", "find", "glob", "__init__"])
    def test_whatever_a_store_raises_is_one_sentence(self, monkeypatch, call):
        fsspec.filesystem("memory").pipe("/refused/a.txt", b"x")

        def refuse(*args: object, **kwargs: object) -> None:
            raise NoCredentialsError("Unable to locate credentials\nin ten places")

        monkeypatch.setattr(MemoryFileSystem, call, refuse)
        MemoryFileSystem.clear_instance_cache()
        path = {"find": "memory://refused", "glob": "memory://refused/*"}.get(call, "memory://refused/a.txt")
        with pytest.raises(InputError) as caught:
            discover([path])
        assert str(caught.value) == (
            f"input {path} cannot be listed: Unable to locate credentials; check the credentials and the address"
        )

    def test_a_file_in_an_archive_is_refused_for_its_stored_name_would_not_lead_to_it(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("a.csv", "text\none\n")
        path = f"zip://a.csv::{tmp_path}/x.zip"
        with pytest.raises(InputError) as caught:
            discover([path])
        assert str(caught.value).startswith(
            f"input {path} would be stored as zip://a.csv, which does not lead to it: "
        )

    def test_a_host_that_a_url_names_must_lead_to_the_file_without_it_too(self):
        """As configuration may: then the name is good, and the same as ever."""
        fsspec.filesystem("memory").pipe("/hosted/a.txt", b"x")

        class Hosted(MemoryFileSystem):
            protocol = "hosted"

            def __init__(self, host: str = "", **options: object) -> None:
                super().__init__(**options)
                self.store = MemoryFileSystem.store if host or configured else {}

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return "/" + path.removeprefix("hosted://").partition("/")[2] if "://" in path else path

            @staticmethod
            def _get_kwargs_from_urls(path: str) -> dict[str, str]:
                return {"host": path.removeprefix("hosted://").partition("/")[0]}

        fsspec.register_implementation("hosted", Hosted, clobber=True)
        for configured in (True, False):
            Hosted.clear_instance_cache()
            if configured:
                assert found("hosted://here/hosted") == ["hosted:///hosted/a.txt"]
            else:
                with pytest.raises(InputError, match="name its host or account in fsspec's configuration"):
                    found("hosted://here/hosted")

    def test_a_store_without_credentials_is_named(self, monkeypatch, tmp_path):
        pytest.importorskip("s3fs")
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        with pytest.raises(
            InputError, match=r"s3://some-bucket/a\.jsonl .*check the credentials and the address"
        ):
            discover(["s3://some-bucket/a.jsonl"])

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_an_interruption_stays_one(self, monkeypatch, error):
        def interrupt(*args: object) -> None:
            raise error

        monkeypatch.setattr(MemoryFileSystem, "isdir", interrupt)
        with pytest.raises(error):
            discover(["memory://refused"])

    def test_a_read_that_a_store_refuses_spoils_only_that_file(self, monkeypatch):
        fsspec.filesystem("memory").pipe({"/half/a.txt": b"x\n", "/half/b.txt": b"x\n"})
        files, opened = discover(["memory://half"]), MemoryFileSystem.open

        def refuse(self: MemoryFileSystem, path: str, *args: object, **kwargs: object) -> object:
            if path.endswith("b.txt"):
                raise NoCredentialsError("Unable to locate credentials")
            return opened(self, path, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "open", refuse)
        assert check_columns(files, ["text"], []).text_columns == ("text",)
        assert [shard.flaw is None for shard in plan(files, shard_rows=10)] == [True, False]
