"""Reads files that somebody else may have written: bounded, and trusting nothing in them.

A path may lead to a device or a pipe, and a short text may become gigabytes when it is parsed. So
only regular files are read, never more than a bound, and JSON is measured before it is parsed.
Every refusal names the file and the bound. This module must not know what a file means.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from recovery.errors import BadInput, PoolError

_SHOWN = 40  # characters of what was found, in an error
_STRUCTURE = re.compile(r'\\.|["\[\]{},]', re.DOTALL)
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class JsonBounds:
    """What a JSON file may hold; `what` says in errors what it is to be.

    `items_max` bounds all values together, those within others included: an empty list of two
    bytes takes 56 in memory. `finite`: refuse NaN and Infinity, which are no JSON (but which
    Python's own writer writes, so that the configurations of some models have them).
    """

    what: str
    bytes_max: int
    items_max: int = 100_000
    depth_max: int = 32
    finite: bool = True
    error: type[PoolError] = BadInput


def refusal(
    name: str | Path, expected: str, got: object, error: type[PoolError] = BadInput
) -> PoolError:
    """The error that says what a file was expected to be, and what it is."""
    return error(
        f"{name}: expected {expected}, got {got}.", path=str(name), expected=expected, got=str(got)
    )


def unreadable(
    name: str | Path, what: str, cause: OSError, error: type[PoolError] = BadInput
) -> PoolError:
    """The error that says why a file can't be read."""
    why = cause.strerror or str(cause)
    return error(f"{name} can't be read: {why}.", path=str(name), expected=what, got=why)


def open_regular(path: str | Path) -> io.BufferedReader:
    """The file at `path`, open for reading. Raises `OSError` also for what is no regular file.

    A device may never end, and a pipe without a writer keeps whoever opens it waiting.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, "it is a folder", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bounded(
    path: str | Path,
    bytes_max: int,
    *,
    what: str = "a file",
    error: type[PoolError] = BadInput,
) -> bytes:
    """The content of a regular file of at most `bytes_max` bytes. Raises `error`."""
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > bytes_max:
                expected = f"{what} of at most {bytes_max:,} bytes"
                raise refusal(path, expected, f"{size:,} bytes", error)
            data = stream.read(size + 1)
    except OSError as cause:
        raise unreadable(path, what, cause, error) from cause
    if len(data) > size:
        raise refusal(path, what, "a file that grows while it is read", error)
    return data


def read_json(path: str | Path, bounds: JsonBounds) -> Any:
    """The value in a JSON file. Raises `bounds.error`: it can't be read, or as `json_from`."""
    data = read_bounded(path, bounds.bytes_max, what=bounds.what, error=bounds.error)
    return json_from(data, bounds, path)


def read_json_object(path: str | Path, bounds: JsonBounds) -> dict[str, Any]:
    """The same for a file that is to hold an object."""
    return _as_object(read_json(path, bounds), bounds, path)


def json_from(data: bytes | bytearray | str, bounds: JsonBounds, name: str | Path) -> Any:
    """The value in a JSON text; `name` says in errors where it is from.

    Raises `bounds.error` for a text that is longer, deeper or of more values than `bounds` allow,
    is not UTF-8, names a member of an object twice, or holds half a surrogate pair or (`finite`) a
    number that is none.
    """
    if len(data) > bounds.bytes_max:
        expected = f"{bounds.what} of at most {bounds.bytes_max:,} bytes"
        raise refusal(name, expected, f"{len(data):,} bytes", bounds.error)
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        expected, got = _measured(text, bounds)
        if got:
            raise refusal(name, f"{bounds.what} with {expected}", got, bounds.error)
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_finite if bounds.finite else None,
            parse_constant=_no_constant if bounds.finite else None,
        )
        if _HALF_A_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:
        got = f"{text_of(cause)} in it"
        raise refusal(name, f"{bounds.what} as JSON in UTF-8", got, bounds.error) from cause
    return value


def json_object_from(
    data: bytes | bytearray | str, bounds: JsonBounds, name: str | Path
) -> dict[str, Any]:
    """The same for a text that is to hold an object."""
    return _as_object(json_from(data, bounds, name), bounds, name)


def text_of(value: object, chars_max: int = 200) -> str:
    """`value` as text that is short, and can be shown: no control characters, no half pairs."""
    text = str(value)
    clipped = text if len(text) <= chars_max else f"{text[:chars_max]}..."
    if clipped.isprintable():
        return clipped
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in clipped)


def stays_inside(name: str) -> bool:
    """Whether a name from outside is one within the folder it is relative to, on any system."""
    plain = name.isprintable() and len(name) <= 255 and not set("\\:") & set(name)
    return plain and all(part not in ("", ".", "..") for part in name.split("/"))


def _as_object(value: Any, bounds: JsonBounds, name: str | Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        got = f"a JSON {_KINDS.get(type(value), 'number')}"
        raise refusal(name, f"{bounds.what} as a JSON object", got, bounds.error)
    return value


_KINDS = {list: "array", str: "string", bool: "boolean", type(None): "null"}


def _measured(text: str, bounds: JsonBounds) -> tuple[str, str]:
    """What was expected and what was found, if `text` goes beyond `bounds`; else empty."""
    depth, items, quoted = 0, 1, False
    for found in _STRUCTURE.finditer(text):
        mark = found[0]
        if mark == '"':
            quoted = not quoted
        elif quoted or mark[0] == "\\":
            continue
        elif mark in "]}":
            depth -= 1
        else:
            items += 1
            if mark != ",":
                depth += 1
                if depth > bounds.depth_max:
                    return f"at most {bounds.depth_max} levels", "more"
            if items > bounds.items_max:
                return f"at most {bounds.items_max:,} values", "more"
    return "", ""


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {text_of(name, _SHOWN)!r} twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text_of(text, _SHOWN)}, which no float64 holds,")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is no JSON,")
