"""Carries out drains and stops of browsers on their hosts.

A worker that does not stop in time is killed. This module must not launch anything.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

from actors.supervisor.hosts import Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.tasks import Tasks
from actors.supervisor.watching import Watches
from recovery.control import ALIVE, BrowserStopped, Drain, Stop
from recovery.errors import PoolError

_STOP_SECONDS = 10.0  # longer than a reaper takes; then the worker is killed
_DRAIN_SECONDS = 300.0  # operations in flight have their own deadlines


class Stops:
    """Stops browsers, and tracks the stops in progress."""

    def __init__(
        self, hosts: Hosts, watches: Watches, journal: Journal, tasks: Tasks, term: int
    ) -> None:
        self._hosts = hosts
        self._watches = watches
        self._journal = journal
        self._tasks = tasks
        self._term = term
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> frozenset[asyncio.Task[None]]:
        """The stops in progress, except those at the end of a drain."""
        return frozenset(self._under_way)

    def begin(self, order: Stop) -> None:
        work = partial(self._stop, order.browser_id, order.epoch)
        stop = self._tasks.spawn(work, f"stop {order.browser_id}")
        self._under_way.add(stop)
        stop.add_done_callback(self._under_way.discard)

    async def drain(self, order: Drain) -> None:
        host = self._hosts.get(order.browser_id)
        if host is not None:
            with contextlib.suppress(PoolError, TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await host.drain(self._term)
        await self._stop(order.browser_id, order.epoch)

    async def _stop(self, browser_id: str, epoch: int) -> None:
        if self._journal.state.browsers[browser_id].epoch != epoch:
            return  # its slot was restarted meanwhile
        host = self._hosts.get(browser_id)
        self._watches.let_go(browser_id)
        if host is not None:
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await host.stop()
            except (PoolError, TimeoutError) as error:
                self._tasks.report(f"stop {browser_id}", error)
            finally:
                host.kill()
        record = self._journal.state.browsers[browser_id]
        if record.epoch == epoch and record.phase in ALIVE:
            await self._journal.happen(BrowserStopped(browser_id))
