"""Whom a host obeys, and for how long without hearing from it.

A supervisor's term that is older than one that was heard is refused; any order of the newest
extends the lease. This module must not stop anything itself: it says that the lease is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from recovery.errors import StaleTerm


class Lease:
    """`on_over` is awaited when nobody extended the lease for `seconds`."""

    def __init__(
        self, seconds: float, clock: Callable[[], float], on_over: Callable[[], Awaitable[None]]
    ) -> None:
        self.term = 0
        self._seconds = seconds
        self._clock = clock
        self._on_over = on_over
        self._until = 0.0
        self._task: asyncio.Task[None] | None = None

    def accept(self, term: int) -> None:
        """Obey the newest supervisor only. Raises `StaleTerm` for an older one."""
        if term < self.term:
            raise StaleTerm(f"term {term} was superseded by {self.term}")
        self.term = term
        self._until = self._clock() + self._seconds
        if self._task is None:
            self._task = asyncio.create_task(self._wait(), name="lease")

    async def _wait(self) -> None:
        # The lease is renewed far more often than it ends, so look only when it might have.
        while (left := self._until - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        self._task = None
        await self._on_over()
