"""The lease of a pool's creator: the pool closes when its creator stops polling.

This module must not close anything; it only reports the end of the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# From the supervisor's start to the creator's first poll: in between the history's worker starts,
# slowly on a busy machine.
_OPENING_SECONDS = 60.0


class CreatorLease:
    """Renewed by requests of the creator only."""

    def __init__(self, creator: str, seconds: float, clock: Callable[[], float]) -> None:
        self._creator = creator
        self._seconds = seconds
        self._clock = clock
        self._until = 0.0

    def begin(self) -> None:
        """Give the creator time to hear that its pool is open: then it polls."""
        self._until = self._clock() + max(self._seconds, _OPENING_SECONDS)

    def renew(self, client: str) -> None:
        if client == self._creator:
            self._until = self._clock() + self._seconds

    async def over(self) -> None:
        """Return when the lease has ended."""
        # It is renewed far more often than it ends: check only when it might have ended.
        while (left := self._until - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(left, self._seconds))  # the first poll may shorten it
