"""How much memory a model takes while it loads, and how much of one a host has room for.

An estimate by bytes alone. This module must not import onnx, nor ask a browser.
"""

from __future__ import annotations

PEAK_FACTOR = 2.0  # a page holds what it fetched, and the runtime's copy of it at the same time
LOAD_OVERHEAD_BYTES = 64 << 20  # the runtime's own memory, arenas and the parsed graph


def peak_bytes(weight_bytes: int) -> int:
    """An estimate of the memory that a model of so many bytes takes while it loads."""
    return int(PEAK_FACTOR * weight_bytes) + LOAD_OVERHEAD_BYTES


def room(capacity_bytes: int) -> int:
    """Bytes of weights whose peak is what a host holds; negative if it can load nothing."""
    return int((capacity_bytes - LOAD_OVERHEAD_BYTES) // PEAK_FACTOR)
