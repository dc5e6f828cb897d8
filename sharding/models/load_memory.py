"""How much memory a model takes while it loads, and how large a model a host can load.

Estimated from bytes alone. This module must not import onnx, nor contact a browser.
"""

from __future__ import annotations

PEAK_FACTOR = 2.0  # a page holds what it fetched, and the runtime's copy of it at the same time
LOAD_OVERHEAD_BYTES = 64 << 20  # the runtime's own memory, arenas and the parsed graph


def peak_bytes(weight_bytes: int) -> int:
    """An estimate of the memory that a model of so many bytes takes while it loads."""
    return int(PEAK_FACTOR * weight_bytes) + LOAD_OVERHEAD_BYTES


def room(capacity_bytes: int) -> int:
    """Bytes of weights that a host of this capacity can load; negative if it can load nothing."""
    return int((capacity_bytes - LOAD_OVERHEAD_BYTES) // PEAK_FACTOR)
