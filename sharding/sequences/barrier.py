"""A barrier for coordinated sequences: all wait between two tokens while one rebuilds a stage.

This module must not know what is rebuilt, nor which sequences wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Barrier:
    """Where coordinated sequences of one model wait while a stage is rebuilt.

    All stages are then at the same position of every sequence, between two tokens.
    """

    def __init__(self) -> None:
        self._rebuilding = 0
        self._free = asyncio.Event()
        self._free.set()

    @contextlib.contextmanager
    def rebuilding(self) -> Iterator[None]:
        self._rebuilding += 1
        self._free.clear()
        try:
            yield
        finally:
            self._rebuilding -= 1
            if not self._rebuilding:
                self._free.set()

    async def passable(self) -> None:
        await self._free.wait()
