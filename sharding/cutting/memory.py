"""How much memory a shard takes while it loads, and how much of a model a host has room for.

An estimate by bytes alone. This module must not import onnx, nor ask a browser.
"""

from __future__ import annotations

# What loading takes: the estimate of `load_peak_bytes` in sharding/models/signature.py, twice the
# bytes (a page holds what it fetched and the runtime's copy of it at the same time) plus its
# LOAD_OVERHEAD_BYTES. Repeated here, because that module imports onnx.
PEAK_FACTOR = 2.0
LOAD_OVERHEAD_BYTES = 64 << 20


def peak_bytes(weight_bytes: int) -> int:
    """An estimate of the memory that a shard of so many bytes takes while it loads."""
    return int(PEAK_FACTOR * weight_bytes) + LOAD_OVERHEAD_BYTES


def room(capacity_bytes: int) -> int:
    """Bytes of weights whose peak is what a host holds; negative if it can load nothing."""
    return int((capacity_bytes - LOAD_OVERHEAD_BYTES) // PEAK_FACTOR)
