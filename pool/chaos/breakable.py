"""Pools that may be broken on purpose: quick to call a browser hung, slow to give one up.

This module must not open one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool.pool import BrowserPool
from recovery.supervision import RestartLimit

_LEASE_SECONDS = 10.0
_HANG_SECONDS = 8.0  # with WASM these models take 0.5 s, and more while browsers restart ...
_HANG_SECONDS_ELSEWHERE = 30.0  # ... but a WebGPU in software may take long to compile its shaders
_LAUNCH_SECONDS = 30.0
_MESSAGE_BYTES = 16 << 20
_RESTARTS_MAX = 1000  # of one browser in two minutes: it is we who break it, so go on


def chaos_pool(counts: Mapping[str, int], **options: Any) -> BrowserPool:
    """A pool that may be broken on purpose. `options` as `BrowserPool` takes them win."""
    wasm = options.get("backend") == "wasm"
    defaults = {
        "faults": True,
        "simulation": False,
        "hang_seconds": _HANG_SECONDS if wasm else _HANG_SECONDS_ELSEWHERE,
        "launch_seconds": _LAUNCH_SECONDS,
        "lease": _LEASE_SECONDS,
        "message_bytes_max": _MESSAGE_BYTES,
        "restart_limit": RestartLimit(restarts_max=_RESTARTS_MAX),
    }
    return BrowserPool(dict(counts), **{**defaults, **options})
