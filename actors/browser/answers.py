"""Cache of a browser's answers: a repeated operation id gets the same answer.

Bounded by number and by bytes. This module must not run anything.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.messages import RunReply


class AnswerCache:
    """The latest answers, by operation key."""

    def __init__(self, answers_max: int, bytes_max: int) -> None:
        self._answers_max = answers_max
        self._bytes_max = bytes_max
        self._answers: OrderedDict[str, RunReply] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> RunReply | None:
        return self._answers.get(key)

    def put(self, key: str, reply: RunReply) -> None:
        """Cache an answer, unless it alone exceeds the limit; evicts the oldest ones."""
        if reply.bytes > self._bytes_max:
            return
        self._answers[key] = reply
        self._bytes += reply.bytes
        while len(self._answers) > self._answers_max or self._bytes > self._bytes_max:
            self._bytes -= self._answers.popitem(last=False)[1].bytes


def fingerprint(tensors: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """CRC-32 of names and values, to tell apart different inputs with one operation id."""
    total = 0
    for name, array in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, total)
    return total
