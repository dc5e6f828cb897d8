"""Part of a tensor as plain data: what is kept of a known answer.

Needs numpy only, so that the process of `sharding.models.reference` starts quickly. This module
must not compare tensors (`sharding.models.known_answers` does).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sharding.models.frames import Array

ELEMENTS_MAX = 16_384  # kept of one output; of a longer one, every n-th
ALL_ELEMENTS_MAX = 1 << 18  # kept of all outputs together: they are sent with every order to load


@dataclass(frozen=True)
class KnownTensor:
    """One tensor: every `stride`-th of its elements, as little-endian bytes in base64."""

    dtype: str
    shape: tuple[int, ...]
    stride: int
    data: str

    def values(self) -> Array:
        return np.frombuffer(base64.b64decode(self.data), np.dtype(self.dtype))


def whole(tensors: Mapping[str, Array]) -> dict[str, KnownTensor]:
    """All elements of each."""
    return {name: _kept(array, array.size) for name, array in tensors.items()}


def sampled(tensors: Mapping[str, Array]) -> dict[str, KnownTensor]:
    """At most `ELEMENTS_MAX` elements of each, and `ALL_ELEMENTS_MAX` of all (one of each, at
    least)."""
    share = min(ELEMENTS_MAX, ALL_ELEMENTS_MAX // max(len(tensors), 1))
    return {name: _kept(array, share) for name, array in tensors.items()}


def _kept(array: Array, elements_max: int) -> KnownTensor:
    stride = max(-(-array.size // max(elements_max, 1)), 1)
    kept = np.ascontiguousarray(array.ravel()[::stride])
    kept = kept.astype(kept.dtype.newbyteorder("<"))
    data = base64.b64encode(kept.tobytes()).decode()
    return KnownTensor(array.dtype.name, tuple(array.shape), stride, data)
