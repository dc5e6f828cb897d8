"""The closed vocabularies of the field: browsers, models, levels, rungs, readiness.

Plain string enums, so that they print, compare and serialise as the words users write.
This module must not decide anything and must not import anything of the project
but the errors.
"""

from __future__ import annotations

import re
from enum import IntEnum, StrEnum

from recovery.errors import BadInput


class BrowserType(StrEnum):
    CHROME = "chrome"
    FIREFOX = "firefox"
    SAFARI = "safari"
    EDGE = "edge"


class ModelType(StrEnum):
    TEXT = "text"
    VISION = "vision"
    AUDIO = "audio"
    MULTIMODAL = "multimodal"
    UNKNOWN = "unknown"


class Backend(StrEnum):
    """What computes: an execution provider of onnxruntime-web, or the native runtime."""

    WASM = "wasm"
    WEBGPU = "webgpu"
    WEBNN = "webnn"
    NATIVE = "native"


class Level(StrEnum):
    """A level of fault tolerance: what is kept ready before anything fails."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


class Strategy(StrEnum):
    """An order of rungs."""

    PROGRESSIVE = "progressive"
    RECONNECT = "reconnect"
    RESTART = "restart"
    FAILOVER = "failover"
    PARALLEL = "parallel"
    COORDINATED = "coordinated"


class RecoveryLevel(IntEnum):
    """A rung: one recovery action, from the least to the most invasive."""

    MINIMAL = 1
    MODERATE = 2
    AGGRESSIVE = 3
    FALLBACK = 4
    SIMULATION = 5


class Readiness(StrEnum):
    """The state that a host reports."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


_BROWSER_ALIASES = {
    BrowserType.EDGE: ("edge", "msedge", "edg"),  # first: its user agent also says "chrome"
    BrowserType.FIREFOX: ("firefox", "gecko"),
    BrowserType.CHROME: ("chrome", "chromium", "headlesschrome"),
    BrowserType.SAFARI: ("safari", "webkit", "webkitgtk", "minibrowser", "epiphany"),
}


def detect_browser_type(name: str) -> BrowserType:
    """The browser type that a name or a product string means.

    Accepts the type's own name, the usual binaries' names, and product strings such as
    `"Mozilla Firefox 153.0esr"`. Raises `BadInput` when nothing fits.
    """
    lowered = name.strip().lower()
    for kind, aliases in _BROWSER_ALIASES.items():
        if any(re.search(rf"\b{alias}\b", lowered) for alias in aliases):
            return kind
    raise BadInput(
        f"{name!r} is not a supported browser: expected one of "
        f"{', '.join(BrowserType)} (or the name of one of their binaries).",
        expected=[str(kind) for kind in BrowserType],
        got=name,
    )
