"""Pool settings for fault injection: short hang limits, and a high limit on restarts.

This module must not open a pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool.pool import BrowserPool
from recovery.supervision import RestartLimit

_LEASE_SECONDS = 10.0
_HANG_SECONDS = 8.0  # with WASM these models take 0.5 s, more while browsers restart
_HANG_SECONDS_WEBGPU = 30.0  # software WebGPU may take long to compile shaders
_LAUNCH_SECONDS = 30.0
_MESSAGE_BYTES = 16 << 20
_RESTARTS_MAX = 1000  # of one browser in two minutes: its failures are injected


def chaos_pool(counts: Mapping[str, int], **options: Any) -> BrowserPool:
    """A pool for fault injection. `options` of `BrowserPool` override the defaults here."""
    wasm = options.get("backend") == "wasm"
    defaults = {
        "faults": True,
        "simulation": False,
        "hang_seconds": _HANG_SECONDS if wasm else _HANG_SECONDS_WEBGPU,
        "launch_seconds": _LAUNCH_SECONDS,
        "lease": _LEASE_SECONDS,
        "message_bytes_max": _MESSAGE_BYTES,
        "restart_limit": RestartLimit(restarts_max=_RESTARTS_MAX),
    }
    return BrowserPool(dict(counts), **{**defaults, **options})
