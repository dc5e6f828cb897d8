"""A host's events for its supervisor: numbered, and kept until acknowledged.

So no event is lost when a supervisor dies. This module must not interpret events.
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
    """The events of one worker, numbered from 1. Beyond a limit the oldest are dropped."""

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
        """The first event newer than `after`, or None after `seconds` without one.

        Events up to `after` are acknowledged and dropped. A number that this worker has not
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
