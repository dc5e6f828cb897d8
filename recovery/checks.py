"""Checks of what callers pass: each returns the value as plain Python, or raises one `BadInput`.

The sentence is always "NAME: expected WHAT, got VALUE." A number may be one of numpy's; nothing
else is converted, so text is never a number, nor a number a switch. This module must not know who
asks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

from recovery.errors import BadInput

_T = TypeVar("_T")
_SHOWN_MAX = 200  # characters of a value in a message


def refusal(name: str, expected: str, value: Any) -> BadInput:
    """The error for a value that is not what was expected."""
    return BadInput(
        f"{name}: expected {expected}, got {shown(value)}.", expected=expected, got=value
    )


def shown(value: Any) -> str:
    """A value in a message; of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


def whole(name: str, value: Any, least: int, most: int, what: str = "a whole number") -> int:
    """A whole number in the range, its ends included."""
    # As Python's: one of numpy's would make the range one of its own type.
    if _is_number(value, Integral) and least <= int(value) <= most:
        return int(value)
    raise refusal(name, f"{what} from {_plain(least)} to {_plain(most)}", value)


def number(
    name: str,
    value: Any,
    least: float,
    most: float,
    what: str = "a number",
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """A number in the range, its ends included; without the first (`above`) or last (`below`)."""
    plain = _as_float(value) if _is_number(value, Real) else math.nan
    if (
        least <= plain <= most  # which NaN is not
        and not (above and plain == least)
        and not (below and plain == most)
    ):
        return value if type(value) in (int, float) else plain
    first = f"above {_plain(least)} up" if above else f"from {_plain(least)}"
    last = f"below {_plain(most)}" if below else _plain(most)
    raise refusal(name, f"{what} {first} to {last}", value)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float
        return math.inf


def _plain(limit: float) -> str:
    return f"{limit:g}" if abs(limit) < 1e6 else f"{limit:,.0f}"


def seconds(name: str, value: Any, least: float, most: float) -> float:
    """A duration."""
    return number(name, value, least, most, "seconds")


def flag(name: str, value: Any) -> bool:
    """True or False, numpy's too."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise refusal(name, "True or False", value)


def text(name: str, value: Any, most: int, what: str = "text") -> str:
    """1 to `most` characters that can be written as Unicode."""
    if isinstance(value, str) and 0 < len(value) <= most and _is_unicode(value):
        return str(value)
    raise refusal(name, f"{what} of 1 to {most} characters", value)


def word(name: str, value: Any, words: Iterable[str]) -> str:
    """One of these words."""
    known = [str(each) for each in words]
    if isinstance(value, str) and value in known:
        return str(value)
    raise refusal(name, f"one of {', '.join(known)}", value)


def path(name: str, value: Any) -> str:
    """A path, as text or as `os.PathLike` gives it."""
    if isinstance(value, str | os.PathLike):
        plain = os.fspath(value)
        if isinstance(plain, str) and plain and "\0" not in plain:
            return plain
    raise refusal(name, "a path (a str or a pathlib.Path)", value)


def mapping(name: str, value: Any, what: str) -> dict[Any, Any]:
    """A mapping, as a dict of its own."""
    if isinstance(value, Mapping):
        return dict(value)
    raise refusal(name, what, value)


def instance(name: str, value: Any, kind: type[_T], what: str) -> _T:
    """An object of this class."""
    if isinstance(value, kind):
        return value
    raise refusal(name, what, value)


def function(name: str, value: Any) -> None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise refusal(name, "a function or None", value)


def optional(check: Callable[..., _T], name: str, value: Any, *more: Any) -> _T | None:
    """None, or what the check allows."""
    return None if value is None else check(name, value, *more)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
