"""The deployment files say what the program understands: manifests, job files, and the commands in the docs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import ray
import yaml

from jobs.cli import VERBS
from jobs.flags import parse_job
from pipeline.config import ClassifyConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCUMENTS = [path for path in (ROOT / "README.md", DEPLOY / "README.md") if path.exists()]
RAY_JOBS = ("rayjob.yaml", "raycronjob.yaml")

Mapping = dict[str, Any]


def documents(name: str) -> dict[str, Mapping]:
    """The documents of a manifest, by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((DEPLOY / name).read_text())}


def ray_job(name: str) -> Mapping:
    """The RayJob spec in a manifest."""
    found = documents(name)
    spec: Mapping = (
        found["RayJob"]["spec"] if "RayJob" in found else found["RayCronJob"]["spec"]["jobTemplate"]
    )
    return spec


def mounted(name: str, path: str) -> str:
    """The content of the file that a manifest mounts at `path` on the head, where the entrypoint runs."""
    pod = ray_job(name)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {m["mountPath"]: m["name"] for container in pod["containers"] for m in container["volumeMounts"]}
    volume = next(v for v in pod["volumes"] if v["name"] == mounts[str(Path(path).parent)])
    config_map = documents(name)["ConfigMap"]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    content: str = config_map["data"][Path(path).name]
    return content


def parse_classify(words: list[str]) -> ClassifyConfig:
    return parse_job(ClassifyConfig, words, prog="classify", description="")


def classify_flags(command: str) -> list[str]:
    """The words after ``python -m jobs.classify``."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "jobs.classify"]
    return words[3:]


def config_of(name: str, tmp_path: Path) -> ClassifyConfig:
    """What the entrypoint of a manifest means, with the file it mounts."""
    words = classify_flags(ray_job(name)["entrypoint"])
    at = words.index("--config") + 1
    local = tmp_path / "job.yaml"
    local.write_text(mounted(name, words[at]))
    return parse_classify([*words[:at], str(local), *words[at + 1 :]])


class TestManifests:
    @pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
    def test_every_file_is_yaml(self, path: Path) -> None:
        assert all(isinstance(found, dict) for found in yaml.safe_load_all(path.read_text()))

    @pytest.mark.parametrize("name", RAY_JOBS)
    def test_the_entrypoint_parses_with_the_file_it_mounts(self, name: str, tmp_path: Path) -> None:
        config = config_of(name, tmp_path)
        assert not config.overwrite
        # All are settled by the machines that happen to be up, unless the job says.
        assert config.precision != "auto"
        assert config.device != "auto"
        assert config.replicas is not None
        assert config.entropy_threshold is not None

    @pytest.mark.parametrize("name", RAY_JOBS)
    def test_workers_scale_as_far_as_replicas_do(self, name: str, tmp_path: Path) -> None:
        (workers,) = ray_job(name)["rayClusterSpec"]["workerGroupSpecs"]
        replicas = config_of(name, tmp_path).replicas
        assert replicas is not None
        assert 1 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
        assert (workers["minReplicas"], workers["maxReplicas"]) == (replicas.least, replicas.most)
        assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1

    @pytest.mark.parametrize("name", RAY_JOBS)
    def test_one_version_of_ray(self, name: str) -> None:
        base = re.search(r"^ARG BASE=rayproject/ray:([\d.]+)-", (DEPLOY / "Dockerfile").read_text(), re.M)
        assert base is not None
        spec = ray_job(name)
        assert spec["submitterConfig"]["backoffLimit"] == 0, "a lost head would hang the attempt"
        (submitter,) = spec["submitterPodTemplate"]["spec"]["containers"]
        assert spec["rayClusterSpec"]["rayVersion"] == base[1]
        assert submitter["image"].startswith(f"rayproject/ray:{base[1]}-")

    def test_clusters_do_not_outlive_their_jobs(self) -> None:
        for name in RAY_JOBS:
            spec = ray_job(name)
            assert spec["shutdownAfterJobFinishes"] is True
            assert spec["ttlSecondsAfterFinished"] <= 3600

    def test_a_scheduled_run_ends_before_the_next_one_starts(self) -> None:
        schedule = documents("raycronjob.yaml")["RayCronJob"]["spec"]["schedule"]
        assert re.fullmatch(r"\d+ \d+ \* \* \*", schedule)  # once a day
        spec = ray_job("raycronjob.yaml")
        assert spec["activeDeadlineSeconds"] + spec["ttlSecondsAfterFinished"] < 24 * 3600
        assert spec["backoffLimit"] == 0  # the deadline starts anew with each retry

    def test_the_scheduled_job_is_the_one_shown(self, tmp_path: Path) -> None:
        shown = parse_classify(["--config", str(DEPLOY / "job.scheduled.yaml")])
        assert config_of("raycronjob.yaml", tmp_path) == shown

    def test_the_plain_cron_job_runs_one_at_a_time(self) -> None:
        spec = documents("cronjob.yaml")["CronJob"]["spec"]
        (submit,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        assert spec["concurrencyPolicy"] == "Forbid"
        assert submit["command"][-1] == "--"
        assert classify_flags(shlex.join(submit["args"])) == ["--config", "/etc/deebert/job.yaml"]

    def test_the_cluster_file_is_what_ray_launches(self) -> None:
        schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
        jsonschema.validate(yaml.safe_load((DEPLOY / "cluster.yaml").read_text()), schema)


class TestJobFiles:
    @pytest.mark.parametrize("name", ["job.example.yaml", "job.scheduled.yaml"])
    def test_every_key_is_known_and_every_value_parses(self, name: str) -> None:
        config = parse_classify(["--config", str(DEPLOY / name)])
        assert config.model
        assert config.input
        assert config.output
        # Of a newly trained model, which stores no operating point yet: it would run at full depth.
        assert config.entropy_threshold is not None

    def test_every_key_of_the_example_has_a_comment(self) -> None:
        lines = (DEPLOY / "job.example.yaml").read_text().splitlines()
        bare = [line for line in lines if re.match(r"[a-z-]+:", line) and "#" not in line]
        assert bare == []


class TestImage:
    def test_what_it_copies_is_in_the_build_context(self) -> None:
        copies = re.findall(r"^COPY --chown=ray (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.M)
        allowed = {
            line.removeprefix("!")
            for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        assert {source for line in copies for source in line.split()} == allowed

    def test_it_does_not_run_as_root(self) -> None:
        users = re.findall(r"^USER (\S+)", (DEPLOY / "Dockerfile").read_text(), re.M)
        assert users == ["ray"]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each ``deebert`` or ``python -m jobs`` command in a document's code blocks."""
    for block in re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```", path.read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:\||&&|;|--)\s", line):
                words = shlex.split(re.split(r"\s\d?[<>]", part)[0], comments=True)
                if words[:2] == ["python", "-m"] and words[2].startswith("jobs."):
                    words = ["deebert", words[2].removeprefix("jobs."), *words[3:]]
                if words[:1] == ["deebert"]:
                    yield words[1:]


class Parsed(Exception):  # noqa: N818
    """Carries what a command line means out of a verb, before the verb does it."""


class TestDocuments:
    @pytest.mark.parametrize(
        ("document", "words"),
        [(path, words) for path in DOCUMENTS for words in commands(path)],
        ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value.parent.name,
    )
    def test_commands_parse(
        self, document: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def parse_and_stop(*args: Any, **kwargs: Any) -> None:
            raise Parsed(parse_job(*args, **kwargs))

        monkeypatch.chdir(ROOT)
        verb, *flags = words
        if verb.startswith("-") or verb == "demo":
            return
        assert verb in VERBS
        # Files of a cluster are shown on this machine's disk.
        flags = [str(DEPLOY / "job.scheduled.yaml") if f.startswith("/etc/deebert/") else f for f in flags]
        module = import_module(f"jobs.{verb}")
        monkeypatch.setattr(module, "parse_job", parse_and_stop)
        with pytest.raises((Parsed, SystemExit)) as end:
            module.execute(flags, prog=f"deebert {verb}")
        if isinstance(end.value, SystemExit):  # --help
            assert end.value.code == 0

    def test_there_are_commands(self) -> None:
        assert sum(1 for path in DOCUMENTS for _ in commands(path)) >= 2

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.parent.name)
    def test_links_lead_somewhere(self, document: Path) -> None:
        links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text())
        missing = [x for x in links if "://" not in x and not (document.parent / x).exists()]
        assert missing == []
