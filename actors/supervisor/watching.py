"""Watches the workers: a long poll of each; its events and its silence are logged as events.

Each poll renews the host's lease; a host that does not answer within its lease is given up. This
module must not launch or stop browsers: a lost worker is killed and reported, and the journal
decides what follows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from actors.messages import HostEvent
from actors.supervisor.hosts import Host, Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.tasks import Tasks
from recovery.breaker import BreakerKey, CircuitState
from recovery.control import BreakersMoved, BrowserFailed, Phase
from recovery.errors import BrowserLost, PoolError, StaleTerm
from recovery.failures import categorize_browser_failure
from recovery.records import HostRef

# For the first answer of a new worker, whose process has yet to start: slowly on a busy machine.
_START_SECONDS = 60.0


class Watches:
    """One watch for each worker in `hosts`; adds and removes workers there."""

    def __init__(
        self,
        hosts: Hosts,
        journal: Journal,
        tasks: Tasks,
        term: int,
        lease_seconds: float,
        wall: Callable[[], float],
    ) -> None:
        self._hosts = hosts
        self._journal = journal
        self._tasks = tasks
        self._term = term
        self._lease_seconds = lease_seconds
        self._wall = wall
        self._seen: dict[str, int] = {}  # the last event handled of each host
        self._watches: dict[str, asyncio.Task[None]] = {}

    def take_on(self, browser_id: str, host: Host, seen: int = 0) -> None:
        """Register `host` as the browser's worker; `seen` is its last known event."""
        self._hosts.put(browser_id, host)
        self._seen[browser_id] = seen

    def begin(self, browser_id: str, host: Host, *, new: bool = False) -> None:
        """Start watching, unless it is being watched already. `new`: it has not answered yet."""
        if browser_id not in self._watches:
            self._watches[browser_id] = self._tasks.spawn(
                partial(self._watch, browser_id, host, new), f"watch {browser_id}"
            )

    def let_go(self, browser_id: str) -> None:
        """Remove the browser's worker, and stop watching it."""
        self._hosts.remove(browser_id)
        self._seen.pop(browser_id, None)
        watch = self._watches.pop(browser_id, None)
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()

    async def _watch(self, browser_id: str, host: Host, new: bool) -> None:
        """Poll a host for events, which renews its lease, for as long as it runs."""
        lease = self._lease_seconds
        patience = max(lease, _START_SECONDS) if new else lease
        while self._hosts.get(browser_id) is host:
            try:
                seen = self._seen.get(browser_id, 0)
                async with asyncio.timeout(patience):  # an answer is due after a third of a lease
                    event = await host.next_event(
                        self._term, lease / 3, seen, self._peers(browser_id)
                    )
            except StaleTerm:
                raise
            except TimeoutError:
                frozen = BrowserLost(f"the worker of {browser_id} does not answer")
                await self._worker_gone(browser_id, host, frozen)
                return
            except PoolError as error:  # also a worker whose answers are invalid
                await self._worker_gone(browser_id, host, error)
                return
            patience = lease
            if event is not None:
                self._seen[browser_id] = event.seq
                await self._take_in(browser_id, event)

    def _peers(self, browser_id: str) -> dict[BreakerKey, CircuitState]:
        """The circuits of the other browsers in service, for the cap on how many may be open."""
        return {
            BreakerKey(record.id, model): (
                record.breakers[model].breaker.state
                if model in record.breakers
                else CircuitState.CLOSED
            )
            for record in self._journal.state.browsers.values()
            if record.id != browser_id and record.phase is Phase.READY
            for model in ("", *record.models)
        }

    async def _take_in(self, browser_id: str, event: HostEvent) -> None:
        if event.breakers is not None:
            await self._journal.happen(BreakersMoved(browser_id, event.breakers))
        if event.failure is not None:
            await self._journal.happen(BrowserFailed(browser_id, event.ref.epoch, event.failure))

    async def _worker_gone(self, browser_id: str, host: Host, error: PoolError) -> None:
        if self._hosts.get(browser_id) is not host:
            return
        record = self._journal.state.browsers[browser_id]
        self.let_go(browser_id)
        host.kill()
        context = {
            "what": "worker_exited",
            "ref": HostRef(browser_id, record.epoch),
            "at": self._wall(),
            "browser": str(record.kind),
        }
        failure = categorize_browser_failure(error, context)
        self._hosts.died(browser_id, failure)
        await self._journal.happen(BrowserFailed(browser_id, record.epoch, failure))
