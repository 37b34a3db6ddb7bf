"""How the report spells numbers: counts, shares, durations, FLOPs, money; and names of others' choice.

Knows nothing of runs.
"""

from __future__ import annotations

NOT_MEASURED = "not measured"
MINUS = "\u2212"

_DURATIONS = (
    (86_400.0, "d", 3_600.0, "h", 60.0),
    (3_600.0, "h", 60.0, "min", 1.0),
    (60.0, "min", 1.0, "s", 0.1),
)
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def count(value: int) -> str:
    """``1234567`` -> ``1,234,567``."""
    return f"{value:,}"


def percent(share: float | None, digits: int = 1) -> str:
    """``0.4125`` -> ``41.2 %``; never rounds what is not all up to 100 %, nor what is not nothing to 0 %."""
    if share is None:
        return NOT_MEASURED
    text, finest = f"{abs(share) * 100:.{digits}f}", 10.0**-digits
    if float(text) == 100 and abs(share) != 1:
        text = f"{100 - finest:.{digits}f}" if abs(share) < 1 else f"{100 + finest:.{digits}f}"
    if float(text) == 0 and share != 0:
        return f"< {finest:.{digits}f} %" if share > 0 else f"> {MINUS}{finest:.{digits}f} %"
    return f"{MINUS if share < 0 else ''}{text} %"


def duration(seconds: float | None) -> str:
    """``5025`` -> ``1 h 24 min``; below a minute in seconds, ``8.31 s``."""
    if seconds is None:
        return NOT_MEASURED
    for large, large_name, small, small_name, smaller in _DURATIONS:
        # Rounded first: 59.99 minutes are an hour, not sixty minutes. As it would be spelled otherwise, that is in the
        # smaller units: 59 minutes and 31 seconds are not an hour.
        if round(seconds / smaller) * smaller >= large:
            rounded = round(seconds / small) * small
            rest = round((rounded % large) / small)
            return f"{int(rounded // large):,} {large_name} {rest} {small_name}"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.3g} s"


def hours(value: float) -> str:
    """Three significant digits, ``12.3``, or the whole hours of more: ``13,710``."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def flops(value: float) -> str:
    """``3.2e15`` -> ``3.20 PFLOP``."""
    scaled, index = value, 0
    while scaled >= 999.5 and index < len(_PREFIXES) - 1:
        scaled, index = scaled / 1000, index + 1
    return f"{scaled:.3g} {_PREFIXES[index]}FLOP"


def money(amount: float, currency: str) -> str:
    """``12.5, "$"`` -> ``$12.50``, ``12.5, "EUR"`` -> ``EUR 12.50``; below 1, three significant digits."""
    size = abs(amount)
    text = f"{size:,.2f}" if size >= 1 or size == 0 else f"{size:.3g}"
    space = "\u00a0" if currency[-1:].isalpha() else ""
    return f"{MINUS if amount < 0 else ''}{currency}{space}{text}"


def rate(rows_per_second: float | None) -> str:
    """Rows per second, with as many digits as mean something."""
    if rows_per_second is None:
        return NOT_MEASURED
    return f"{rows_per_second:,.0f}" if rows_per_second >= 100 else f"{rows_per_second:.3g}"


def printable(text: str, instead: str = "\ufffd") -> str:
    """User text with `instead` for each control character: they are not XML, and would steer a terminal."""
    return "".join(c if c.isprintable() else instead for c in text)


def shortened(text: str, most: int, *, keeps_end: bool = False) -> str:
    """User text in at most `most` printable characters: its beginning, or its end."""
    plain = printable(text)
    if len(plain) <= most:
        return plain
    return f"…{plain[1 - most :]}" if keeps_end else f"{plain[: most - 1]}…"


def decimal(value: float | None, digits: int = 2) -> str:
    """A plain number; None is not measured."""
    return NOT_MEASURED if value is None else f"{value:,.{digits}f}"
