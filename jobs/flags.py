"""Command lines from dataclasses: each `pipeline.fields.flag` field is a flag and a ``--config`` key.

Flags given on the command line win over the file, the file over the defaults. Misuse raises `UsageError`
(one sentence); nothing here knows what a verb does.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from pipeline.errors import UsageError
from pipeline.fields import comma_list, flag

__all__ = ["comma_list", "flag", "label_names", "parse_job"]

Job = TypeVar("Job")
_REQUIRED = dataclasses.MISSING
_LEFT_OUT = ("", "~", "null")
"""What YAML writes for "no value": the default holds."""
_SWITCH = {"true": True, "false": False}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def label_names(text: str) -> tuple[str, ...]:
    """``a,b`` -> ("a", "b"), each once: of two labels with one name, only one would ever be learnt."""
    names = comma_list(text)
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"{twice[0]!r} is named twice, give each label once")
    return names


def parse_job(job: type[Job], argv: Sequence[str], *, prog: str, description: str) -> Job:
    """Build `job` from a command line.

    Args:
        job: a dataclass whose fields were made by `flag`.
        argv: the words after the verb.
        prog: how the command calls itself.
        description: first paragraph of ``--help``.

    Raises:
        UsageError: an unknown flag or key, a value that does not parse, a required flag that is missing.
    """
    given = vars(_parser(job, prog, description).parse_args(argv))
    config = given.pop("config", None)
    values = {**(_read_config(job, config) if config else {}), **given}
    fields = dataclasses.fields(job)  # type: ignore[arg-type]
    missing = [f.name for f in fields if f.default is _REQUIRED and f.name not in values]
    if missing:
        flags, verb = ", ".join(map(_flag_name, missing)), "is" if len(missing) == 1 else "are"
        raise UsageError(f"{flags} {verb} missing; see `{prog} --help`")
    return job(**values)


def _flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def _parser(job: type[Any], prog: str, description: str) -> _Parser:
    parser = _Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="JOB.YAML", help="read flags from a YAML file; flags given win")
    for f in dataclasses.fields(job):
        meta, text = f.metadata, f.metadata["help"]
        if f.default is _REQUIRED:
            text += " (required)"
        elif f.default is not None and f.default is not False and f.default != ():
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
            text += f" (default: {shown})"
        text = text.replace("%", "%%")
        if f.default is False:
            parser.add_argument(_flag_name(f.name), action="store_true", help=text)
            continue
        extra: dict[str, Any] = {"nargs": "+", "action": _ExtendTuple} if meta["several"] else {}
        parser.add_argument(
            _flag_name(f.name),
            type=_showing_errors(meta["parse"]),
            metavar=meta["metavar"],
            choices=meta["choices"],
            help=text,
            **extra,
        )
    return parser


class _ExtendTuple(argparse.Action):
    """``--input a b --input c`` -> ("a", "b", "c")."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _showing_errors(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _read_config(job: type[Any], path: str) -> dict[str, Any]:
    content = _load_yaml(path)
    if not isinstance(content, dict):
        raise UsageError(f"--config {path!r} is not a mapping of flags to values: write `flag: value` lines")
    fields = {f.name: f for f in dataclasses.fields(job)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0].replace('_', '-')!r}?" if close else f"known: {', '.join(fields)}"
            raise UsageError(f"--config {path!r} has an unknown key {key!r}: {hint}")
        if value not in _LEFT_OUT:
            values[name] = _config_value(fields[name], value, path)
    return values


def _load_yaml(path: str) -> Any:
    """The file with every scalar as its text, as on a command line: YAML itself would read ``1:4`` as 64."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read --config {path!r}: {' '.join(str(error).split())}") from error


def _config_value(field: dataclasses.Field[Any], value: Any, path: str) -> Any:
    """A YAML value goes through the flag's own parser, so that both mean the same."""
    if field.default is False:
        switch = _SWITCH.get(str(value).lower())
        if switch is None:
            raise UsageError(f"--config {path!r}: {field.name} is a switch, write true or false")
        return switch
    parse, choices = field.metadata["parse"], field.metadata["choices"]
    items = value if isinstance(value, list) else [value]
    # A list is for flags that take several values, or one of several parts.
    if not all(isinstance(item, str) for item in items) or (
        parse is str and isinstance(value, list) and not field.metadata["several"]
    ):
        raise UsageError(f"--config {path!r}: {field.name} is not a single value")
    try:
        if field.metadata["several"]:
            return tuple(parse(item) for item in items)
        parsed = parse(",".join(items))
    except ValueError as error:
        raise UsageError(f"--config {path!r}: {field.name}: {error}") from error
    if choices and parsed not in choices:
        raise UsageError(f"--config {path!r}: {field.name} is {parsed!r}, choose from {', '.join(choices)}")
    return parsed
