"""The lease of a pool's creator: as long as it asks for news, the pool lives.

This module must not close anything; it only says when the lease is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class CreatorLease:
    """Renewed by the creator's own questions, and by nobody else's."""

    def __init__(self, creator: str, seconds: float, clock: Callable[[], float]) -> None:
        self._creator = creator
        self._seconds = seconds
        self._clock = clock
        self._until = 0.0

    def renew(self, client: str) -> None:
        if client == self._creator:
            self._until = self._clock() + self._seconds

    async def over(self) -> None:
        """Return when the lease has ended."""
        # Renewed far more often than it ends, so look only when it might have.
        while (left := self._until - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
