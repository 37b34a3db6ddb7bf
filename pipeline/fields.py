"""Fields of a dataclass that are also flags and keys of job files: described once, checked wherever they come from.

What text becomes which value, and which values from Python are refused. Knows nothing of what any field is for:
`pipeline.config` and the jobs do, and `jobs.flags` makes the command lines.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import UsageError


def flag(
    help: str,  # argparse's own word
    *,
    default: Any = dataclasses.MISSING,
    parse: Callable[[str], Any] = str,
    check: Callable[[Any], None] | None = None,
    metavar: str | None = None,
    several: bool = False,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag and a job-file key.

    Args:
        help: one line for ``--help``.
        default: value when neither flag nor file gives one; without it the flag is required. False makes a
            switch.
        parse: from text to the value; a ValueError's message is shown.
        check: refuses, by a ValueError, a value from Python that is neither a string nor a number, and that
            `parse` could not have made.
        metavar: placeholder in ``--help``.
        several: takes one or more values, as a tuple.
        choices: the only values allowed.
    """
    metadata = {
        "help": help,
        "parse": parse,
        "check": check,
        "metavar": metavar,
        "several": several,
        "choices": choices,
    }
    return dataclasses.field(default=default, metadata=metadata)


def comma_list(text: str) -> tuple[str, ...]:
    """``a,b`` -> ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def each(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Of a comma list, whose parts `parse` takes: ``0.1,0.2`` -> (0.1, 0.2)."""
    return lambda text: tuple(parse(part) for part in comma_list(text))


def integer(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number{_as_integer(text)}") from None


def _as_integer(text: str) -> str:
    """How to write what ``50,000`` and ``1e6`` mean."""
    try:
        value = float(text.replace(",", "") if re.fullmatch(r"\d{1,3}(,\d{3})+", text) else text)
    except ValueError:
        return ""
    return f": write {int(value)}" if value.is_integer() else ""


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number{_as_share(text)}") from None


def _as_share(text: str) -> str:
    """How to write what ``5%`` means."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        return ""
    return f": write {percent / 100:g} for {percent:g} %"


def positive(text: str) -> int:
    """A whole number above 0."""
    value = integer(text)
    if value < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return value


def whole(text: str) -> int:
    """A whole number from 0."""
    value = integer(text)
    if value < 0:
        raise ValueError(f"{text!r} is not a whole number from 0")
    return value


def random_seed(text: str) -> int:
    """A whole number that seeds every generator there is: numpy's take 32 bits."""
    value = whole(text)
    if value >= 2**32:
        raise ValueError(f"{text!r} is not a whole number below 2^32")
    return value


def positive_number(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{text!r} is not a share between 0 and 1")
    return value


def check_fields(job: Any) -> None:
    """Refuse values that no flag could have given, by the flags' own parsers: from Python, any value comes.

    Args:
        job: a dataclass whose fields were made by `flag`.

    Raises:
        UsageError: names the field.
    """
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if value is None and field.default is None:
            continue
        try:
            _check_value(field, value)
        except ValueError as error:
            raise UsageError(f"{field.name}: {error}") from error


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    parse, check, choices = (field.metadata[name] for name in ("parse", "check", "choices"))
    if field.default is False:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not a switch: give True or False")
    elif choices is not None:
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}")
    elif check is not None:
        check(value)
    elif parse is str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a str: give one")
    elif not is_number(value):
        raise ValueError(f"{value!r} is neither an int nor a float: give one of the two")
    else:
        parse(str(value))


def check_names(value: Any) -> None:
    """Of `comma_list`: a str, or several.

    Raises:
        ValueError: neither.
    """
    if not (isinstance(value, Sequence) and all(isinstance(item, str) for item in listed(value))):
        raise ValueError(f"{value!r} is neither a str nor a tuple of them: give one of the two")


def check_some_names(value: Any) -> None:
    """Of a flag that takes several values.

    Raises:
        ValueError: neither a str nor several, or none.
    """
    check_names(value)
    if not value:
        raise ValueError(f"{value!r} is empty: give at least one")


def is_number(value: object) -> bool:
    """A switch is none, though Python counts with it."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def listed(value: str | Sequence[str]) -> tuple[str, ...]:
    """Several, of which one alone may be a str."""
    return (value,) if isinstance(value, str) else tuple(value)
