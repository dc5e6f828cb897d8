"""Reads the supervisor's log during a run: failures that it detected, and its clock.

The log is read while the supervisor writes it. This module must not write to the log; it may have
the supervisor log an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pool.chaos.clock import SupervisorClock
from pool.chaos.evidence import Noticed
from pool.pool import BrowserPool
from recovery.errors import PoolError
from recovery.log import log

_EVENTS_MAX = 200_000  # of the control log that are kept


class ControlLogReader:
    """The control log of a pool, read from where the last reading ended."""

    def __init__(self, pool: BrowserPool, clock: SupervisorClock) -> None:
        self._pool = pool
        self._clock = clock
        self._noticed: deque[Noticed] = deque(maxlen=_EVENTS_MAX)
        self._last_seq = 0
        self._last_logged: tuple[float, float] = (0.0, 0.0)  # by its clock and the client's
        self._reading = asyncio.Lock()  # two reads at once would take the same events twice

    @property
    def noticed(self) -> Sequence[Noticed]:
        """The failures that the supervisor detected, with times of the client's clock."""
        return self._noticed

    @property
    def last_seq(self) -> int:
        """The number of the last event read."""
        return self._last_seq

    async def read(self) -> None:
        """Read new events. If the log can't be read now, the next call reads them."""
        folder = self._pool.log_folder
        if folder is None:
            return
        async with self._reading:
            await self._read(folder)

    async def _read(self, folder: Path) -> None:
        with contextlib.suppress(PoolError, OSError):
            events = await asyncio.to_thread(lambda: list(log.show(folder, self._last_seq + 1)))
            for event in events:
                if event.get("type") == "unreadable":
                    continue
                self._last_seq = max(self._last_seq, int(event["seq"]))
                self._last_logged = (float(event["at"]), time.time())
                if (failure := noticed_in(event)) is not None:
                    self._noticed.append(replace(failure, at=self._clock.ours(failure.at)))

    async def log_an_event(self) -> None:
        """Repeat the order for a loaded model: it changes nothing, but must be logged."""
        for name in self._pool.models()[:1]:
            with contextlib.suppress(PoolError):
                await self._pool.order_again(name)

    async def skew(self) -> float:
        """How far the supervisor's clock is ahead of the client's, by an event that it logs now."""
        await self.log_an_event()
        await self.read()
        return self._last_logged[0] - self._last_logged[1]


def noticed_in(event: Mapping[str, Any]) -> Noticed | None:
    """The failure in a logged event, if it has one; times of the supervisor's clock."""
    body = event["body"]
    failure = body.get("failure") if isinstance(body, Mapping) else None
    if not isinstance(failure, Mapping) or "browser_id" not in body:
        return None
    return Noticed(
        str(body["browser_id"]),
        int(body.get("epoch", -1)),
        str(failure["category"]),
        str(failure.get("evidence", {}).get("what", "")),
        float(failure["at"]),
        str(body.get("model", "")),
        int(event["seq"]),
    )
