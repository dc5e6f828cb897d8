"""What a host has to tell its supervisor: numbered, and kept until it is acknowledged.

So no news is lost with a supervisor. This module must not know what an event means.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping

from actors.messages import HostEvent
from recovery.breaker import Snapshot
from recovery.failures import Failure
from recovery.records import HostRef

_EVENTS_MAX = 256  # not yet acknowledged


class HostEvents:
    """The events of one worker, from 1 on. The oldest are dropped where they are too many."""

    def __init__(self) -> None:
        self.seq = 0  # of the newest
        self._events: deque[HostEvent] = deque(maxlen=_EVENTS_MAX)
        self._news = asyncio.Event()  # set, and replaced, with every event

    def put(
        self,
        ref: HostRef,
        *,
        failure: Failure | None = None,
        breakers: Mapping[str, Snapshot] | None = None,
    ) -> None:
        self.seq += 1
        self._events.append(HostEvent(ref, self.seq, failure, breakers))
        self._news.set()
        self._news = asyncio.Event()

    async def next(self, after: int, seconds: float) -> HostEvent | None:
        """The first event that is newer than `after`, or None when there was none for `seconds`.

        Events up to `after` are acknowledged and forgotten. A number that this worker has not
        reached is another worker's, and acknowledges nothing.
        """
        if after > self.seq:
            after = 0
        while self._events and self._events[0].seq <= after:
            self._events.popleft()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    for event in self._events:
                        if event.seq > after:
                            return event
                    await self._news.wait()
        return None
