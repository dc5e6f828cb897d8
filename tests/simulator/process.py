"""The process of the supervisor: it dies, begins again beside its log, and is called by clients.

This module must not decide when it dies (`tests.simulator.faults` does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from actors.supervisor.orders import MemoryOrders
from actors.supervisor.records import SupervisorConfig, Table
from actors.supervisor.supervisor import Supervisor
from recovery.control import PoolState
from recovery.errors import BrowserLost
from tests.simulator.checks import StateChecks
from tests.simulator.clocks import Clocks
from tests.simulator.log import SimLog, Store
from tests.simulator.plans import Fault
from tests.simulator.supervisor import Incarnation, SimSupervisor
from tests.simulator.verdict import Verdict


class SupervisorProcess:
    """One incarnation after the other. What is on disk, log and orders, outlives them."""

    def __init__(
        self,
        config: SupervisorConfig,
        store: Store,
        clocks: Clocks,
        loop: asyncio.AbstractEventLoop,
        checks: StateChecks,
        verdict: Verdict,
        make_host: Callable[..., Any],
        find_hosts: Callable[[], Any],
        dies_at: Callable[[int], Fault | None],
    ) -> None:
        self._config = config
        self._store = store
        self._orders = MemoryOrders()
        self._clocks = clocks
        self._loop = loop
        self._checks = checks
        self._verdict = verdict
        self._make_host = make_host
        self._find_hosts = find_hosts
        self._dies_at = dies_at
        self._chores: set[asyncio.Task[None]] = set()
        self.incarnation: Incarnation | None = None
        self.terms = 0
        self.closing = False

    @property
    def state(self) -> PoolState:
        assert self.incarnation is not None
        return self.incarnation.supervisor.state

    def begin(self) -> Incarnation:
        self.terms += 1
        state = self._store.recovered()
        same = state == self._store.replayed
        self._verdict.require(same, "checkpoint and events replay to another state")
        self._checks.begin(state)
        supervisor = SimSupervisor(
            self._look,
            self._verdict,
            state.term + 1,
            self._config,
            self._make_host,
            self._closed,
            SimLog(self._store, self._verdict, self._dies_at),
            self._clocks.wall,
            self._loop.time,
            state=state,
            orders=self._orders,
        )
        self.incarnation = Incarnation(supervisor)
        return self.incarnation

    def _closed(self) -> None:
        self._verdict.require(self.closing, "the pool closed itself")

    def kill(self, seconds: float) -> bool:
        old = self.incarnation
        if old is None or not old.lives:
            return False
        if old.supervisor.has_unlogged:
            self._checks.events_lost()
        old.kill()
        chore = asyncio.create_task(self._resume_after(seconds), name="resume")
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)
        return True

    async def _resume_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        new = self.begin()
        resuming = asyncio.create_task(new.supervisor.resume(self._find_hosts), name="resuming")
        new.calls[resuming] = None
        try:
            await resuming
        except asyncio.CancelledError:
            self._verdict.require(not new.lives or self.closing, "the resumption was cancelled")
            return
        except Exception as error:
            self._verdict.violated(f"the supervisor could not resume: {error!r}")
            return
        new.calls.pop(resuming, None)
        new.open = True

    async def call(self, method: Callable[[Supervisor], Coroutine[Any, Any, Any]]) -> Any:
        """What a client asks of the supervisor, whose process may die meanwhile."""
        asked = self.incarnation
        if asked is None or not asked.open or not asked.lives:
            raise BrowserLost("the supervisor can't be reached now", what="socket_closed")
        task = asyncio.create_task(method(asked.supervisor))
        asked.calls[task] = None
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if asked.lives or (me is not None and me.cancelling()):
                raise
            raise BrowserLost("the supervisor is gone", what="worker_exited") from None
        finally:
            asked.calls.pop(task, None)

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        table: Table = await self.call(lambda asked: asked.watch(client, version, seconds))
        return table

    async def close(self) -> None:
        """Have the pool closed, as a client does."""
        self.closing = True
        await self.call(lambda asked: asked.close())

    def _look(self, supervisor: SimSupervisor) -> None:
        """An event was applied."""
        if self.incarnation is None or supervisor is not self.incarnation.supervisor:
            self._verdict.violated("a dead supervisor goes on")
            return
        self._checks.after_event(supervisor)
