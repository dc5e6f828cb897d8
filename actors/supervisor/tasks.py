"""The supervisor's background tasks: referenced while they run, with their errors recorded.

Errors are added to `faults`, which clients see in the table. This module must not know what a
task is for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from recovery.errors import PoolError

_FAULTS_KEPT_MAX = 256


class Tasks:
    """The tasks of one term."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self.faults: deque[str] = deque(maxlen=_FAULTS_KEPT_MAX)

    @property
    def running(self) -> frozenset[asyncio.Task[None]]:
        return frozenset(self._running)

    def spawn(self, work: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(self.guarded(work, name), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def guarded(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        """Run a task and record its error, if any."""
        try:
            await work()
        except PoolError as error:
            self.report(name, error)

    def report(self, name: str, error: Exception) -> None:
        """Record an error of the task called `name`."""
        self.faults.append(f"{name}: {type(error).__name__}: {error}")
