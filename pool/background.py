"""Background tasks of a client, which end with the pool.

This module must not know what the tasks do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any, TypeVar

_AUDITS_MAX = 64  # late answers at `critical` that are still to be compared

T = TypeVar("T")


class BackgroundTasks:
    """Tasks of one client."""

    def __init__(self) -> None:
        self._audits: deque[asyncio.Task[None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` in the background; returns its task."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep_audit(self, audit: asyncio.Task[None]) -> None:
        """Keep the task that compares a late answer; beyond a limit the oldest are cancelled."""
        self._audits.append(audit)
        while self._audits and (self._audits[0].done() or len(self._audits) > _AUDITS_MAX):
            self._audits.popleft().cancel()

    async def finish(self) -> list[Exception]:
        """Wait for the running tasks; returns their exceptions."""
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        return [outcome for outcome in outcomes if isinstance(outcome, Exception)]

    async def cancel(self) -> None:
        """Cancel all tasks, and wait until they end."""
        tasks = (*self._audits, *self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._audits.clear()
