"""Takes secrets out of what is written for others, such as a failure bundle.

tabpool logs no token, but texts of drivers, pages and Ray are not tabpool's: a browser that can't
open its page says the address, and that of a proxy may hold a password. So texts are searched for
what looks like a secret, and for those of this process's environment. This module must not read
files.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN = "***"
_DEPTH_MAX = 24
_SECRET_MIN = 8  # characters; shorter values would be found by chance
_SECRET_NAME = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE
)
_NAME_OF_A_PLACE = re.compile(r"_(FILE|PATH|DIR|SOCK|URL)$", re.IGNORECASE)
_PATTERNS = (
    # user:password@ in an address
    (re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)"), HIDDEN),
    # a page's ticket, also where a browser quotes the address
    (re.compile(r"(enter(?:/|%2F))[\w-]{16,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # token=..., "password": "...", Authorization: Bearer ...
    (
        re.compile(
            r"((?:token|secret|password|passwd|api[_-]?key|authorization)[\"']?\s*[:=]\s*[\"']?"
            r"(?:bearer\s+|basic\s+)?)[^\s\"',;&}]{8,}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # what `secrets.token_urlsafe(32)` makes: the tokens of pages and data planes
    (
        re.compile(
            r"(?<![\w-])(?=[\w-]*\d)(?=[\w-]*[A-Z])(?=[\w-]*[a-z])[\w-]{43}(?![\w-])", re.ASCII
        ),
        HIDDEN,
    ),
)


class Redaction:
    """Texts without secrets. `environment`: whose values are secrets where the name says so."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        found = {
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name)
            and not _NAME_OF_A_PLACE.search(name)
            and len(value) >= _SECRET_MIN
        }
        self._secrets = sorted(found, key=len, reverse=True)  # one may hold another

    def text(self, text: str) -> str:
        """`text` with `***` in place of each secret."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text

    def plain(self, value: Any) -> Any:
        """`value` as strict JSON can carry it, and without secrets in any text, names included."""
        return as_plain(value, self.text)


def as_plain(value: Any, text: Callable[[str], str] = str, depth: int = _DEPTH_MAX) -> Any:
    """`value` as strict JSON can carry it; `text` is applied to each string.

    Numbers that JSON has no word for, half surrogate pairs and everything else become text.
    """
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return text(value.encode(errors="replace").decode())
        case Mapping() if depth:
            return {
                as_plain(str(name), text): as_plain(item, text, depth - 1)
                for name, item in value.items()
            }
        case list() | tuple() | set() | frozenset() if depth:
            return [as_plain(item, text, depth - 1) for item in value]
        case _:
            return as_plain(str(value), text)
