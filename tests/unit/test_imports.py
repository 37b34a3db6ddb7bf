"""Imports point one way: jobs → pipeline → pipeline.engine → deebert."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STREAMING = {"ray", "pyarrow", "fastparquet", "fsspec", "datasets"}


def imported_modules(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names that a module imports, anywhere in its source; relative ones resolved."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports of `module` that point the wrong way."""
    return sorted(
        name
        for name in imported_modules(source, module, is_package=is_package)
        if _points_the_wrong_way(module, name)
    )


def _points_the_wrong_way(module: str, name: str) -> bool:
    if within(module, "deebert"):
        return within(name, "pipeline", "jobs", *STREAMING - {"fsspec"})
    if within(module, "pipeline.engine"):
        inside = within(name, "pipeline.engine", "pipeline.errors") or name == "pipeline"
        return within(name, "jobs", *STREAMING) or (within(name, "pipeline") and not inside)
    if within(module, "pipeline"):
        return within(name, "jobs")
    return False


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in ("deebert", "pipeline", "jobs"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


MODULES = modules()


def test_all_packages_are_looked_at() -> None:
    names = {name for name, _ in MODULES}

    assert {
        "deebert",
        "deebert.encoder",
        "pipeline",
        "pipeline.engine.engine",
        "pipeline.run",
        "jobs",
    } <= names


@pytest.mark.parametrize(("module", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_one_way(module: str, path: Path) -> None:
    assert violations(path.read_text(), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("deebert.encoder", "import ray", ["ray"]),
        ("deebert.encoder", "def f():\n    from pyarrow import parquet", ["pyarrow", "pyarrow.parquet"]),
        ("deebert.encoder", "import fastparquet, datasets", ["datasets", "fastparquet"]),
        (
            "deebert.encoder",
            "from pipeline.engine import Engine",
            ["pipeline.engine", "pipeline.engine.Engine"],
        ),
        ("deebert.encoder", "from jobs import cli", ["jobs", "jobs.cli"]),
        ("deebert.encoder", "import torch\nfrom deebert.packing import PackedTokens\nimport rayon", []),
        ("pipeline.engine.engine", "import fsspec", ["fsspec"]),
        ("pipeline.engine.engine", "import pyarrow as pa", ["pyarrow"]),
        ("pipeline.engine.engine", "from pipeline import schema", ["pipeline.schema"]),
        (
            "pipeline.engine.engine",
            "from ..schema import Answers",
            ["pipeline.schema", "pipeline.schema.Answers"],
        ),
        ("pipeline.engine.engine", "from pipeline.errors import InvariantError\nimport deebert.packing", []),
        ("pipeline.engine.engine", "from .stats import EngineStats", []),
        ("pipeline.sink", "from jobs.flags import f", ["jobs.flags", "jobs.flags.f"]),
        ("pipeline.sink", "import ray\nfrom pipeline.engine import Engine\nfrom deebert import entropy", []),
        ("jobs.classify", "from pipeline.run import classify\nimport ray", []),
    ],
)
def test_the_checker_catches_violations(module: str, source: str, caught: list[str]) -> None:
    assert violations(source, module) == caught


def test_a_packages_own_relative_imports_resolve_inside_it() -> None:
    source = "from . import stats\nfrom .. import lanes"

    assert violations(source, "pipeline.engine", is_package=True) == ["pipeline.lanes"]


def test_importing_deebert_costs_no_torch() -> None:
    code = "import deebert, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"

    output = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )

    assert output.stdout.split() == ["False", "False"]
