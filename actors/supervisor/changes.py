"""The version of the pool's table, and waiting for its changes.

This module must not know what has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """Counts the changes of one term, and notifies waiters."""

    def __init__(self, term: int) -> None:
        # Tables of a later term have higher versions.
        self._version = term << 32
        self._changed = asyncio.Condition()

    @property
    def version(self) -> int:
        return self._version

    async def announce(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; it is evaluated after every change."""
        async with self._changed:
            await self._changed.wait_for(condition)
