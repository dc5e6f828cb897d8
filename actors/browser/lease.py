"""The lease of a host: which supervisor it accepts orders of, and for how long without any.

Orders of an older term than the newest known are refused; any order of the newest extends the
lease. This module must not stop anything itself: it reports the end of the lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from recovery.errors import StaleTerm


class Lease:
    """`on_over` is awaited when the lease was not extended for `seconds`."""

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
        """Extend the lease for an order of `term`. Raises `StaleTerm` for an old term."""
        if term < self.term:
            raise StaleTerm(f"term {term} was superseded by {self.term}")
        self.term = term
        self._until = self._clock() + self._seconds
        if self._task is None:
            self._task = asyncio.create_task(self._wait(), name="lease")

    async def _wait(self) -> None:
        # The lease is renewed far more often than it ends: check only when it might have ended.
        while (left := self._until - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        self._task = None
        await self._on_over()
