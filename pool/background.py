"""What a client has running beside what its callers wait for; with the pool, it is ended.

This module must not know what the tasks do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

_AUDITS_MAX = 64  # late answers waited for at `critical`, only to be compared

T = TypeVar("T")


class BackgroundTasks:
    """Tasks of one client."""

    def __init__(self) -> None:
        self._audits: deque[asyncio.Task[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Have `work` done; whoever wants its outcome keeps the task."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep_audit(self, audit: asyncio.Task[None]) -> None:
        """Let a late answer be compared, the oldest ones only as long as they are not too many."""
        self._audits.append(audit)
        while self._audits and (self._audits[0].done() or len(self._audits) > _AUDITS_MAX):
            self._audits.popleft().cancel()

    async def finish(self) -> list[Exception]:
        """Wait for what was started and still runs; returns what it raised."""
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        return [outcome for outcome in outcomes if isinstance(outcome, Exception)]

    async def cancel(self) -> None:
        """End them all, and wait for that."""
        tasks = (*self._audits, *self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._audits.clear()
