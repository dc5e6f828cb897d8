"""The meeting point of coordinated sequences: all wait between two tokens while one rebuilds.

This module must not know what is rebuilt, nor who waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator


class Barrier:
    """Where the sequences of one model wait while a stage is rebuilt, if they are coordinated.

    All stages then stand at one position of every sequence, between two tokens.
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
