"""A supervisor over fake hosts, as a whole or in parts, for tests of either.

Time is virtual (`tests.fakes.in_virtual_time`). Nothing here is real but the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from functools import reduce
from typing import Any

from actors.messages import LaunchOrder
from actors.supervisor.changes import Changes
from actors.supervisor.hosts import Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.orders import MemoryOrders
from actors.supervisor.records import SupervisorConfig
from actors.supervisor.supervisor import Supervisor
from actors.supervisor.tasks import Tasks
from actors.supervisor.watching import Watches
from recovery.control import (
    Body,
    BrowserReady,
    BrowserRecord,
    BrowserWanted,
    Instruction,
    ModelPhase,
    Phase,
    PoolOpened,
    PoolState,
    Repair,
    apply,
)
from recovery.kinds import BrowserType, Level
from recovery.plan import STRATEGIES
from recovery.records import HostRef
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, FakeHost, FakeHosts, GatedLog

CHROME = BrowserType.CHROME
LIMIT = RestartLimit(restarts_max=3, period_seconds=600.0, delay_first_seconds=1.0)
LEASE_SECONDS = 15.0
CONFIG = SupervisorConfig(
    "p",
    Level.MEDIUM,
    STRATEGIES["progressive"],
    LIMIT,
    LEASE_SECONDS,
    persistent=True,
    creator="creator",
)


class Pool:
    """A supervisor over fake hosts, and what a test looks at."""

    def __init__(
        self,
        hosts: FakeHosts,
        *,
        term: int = 1,
        on_repair: Callable[[BrowserRecord, Repair], None] | None = None,
        **config: Any,
    ) -> None:
        self.hosts = hosts
        self.log = GatedLog()
        self.closed = 0
        self.orders = MemoryOrders()
        self.config = dataclasses.replace(CONFIG, **config)
        self._on_repair = on_repair
        self.supervisor = self.made(term, PoolState())

    def made(self, term: int, state: PoolState) -> Supervisor:
        loop = asyncio.get_running_loop()
        self.tasks, self.changes = Tasks(), Changes(term)
        return Supervisor(
            self.config,
            self.hosts,
            self._closed,
            self.log,
            loop.time,
            loop.time,
            term,
            state,
            self.orders,
            self._on_repair,
            tasks=self.tasks,
            changes=self.changes,
        )

    def die(self) -> None:
        """The supervisor's process is killed: nothing it was doing goes on."""
        for task in (*self.journal.under_way, *self.tasks.running):
            task.cancel()

    async def resume(self) -> None:
        """The next incarnation begins, with what the log holds."""
        state = reduce(apply, self.log.events, PoolState())
        self.supervisor = self.made(self.state.term + 1, state)
        await self.supervisor.resume(self.hosts.living)

    def _closed(self) -> None:
        self.closed += 1

    @property
    def journal(self) -> Journal:
        return self.supervisor._journal

    @property
    def state(self) -> PoolState:
        return self.supervisor.state

    def phase(self, browser_id: str) -> tuple[Phase, int]:
        record = self.state.browsers[browser_id]
        return record.phase, record.epoch

    async def until(self, browser_id: str, phase: Phase, epoch: int) -> None:
        await self.changes.until(lambda: self.phase(browser_id) == (phase, epoch))

    async def loaded(self, browser_id: str, epoch: int, model: str = "m") -> None:
        def holds() -> bool:
            record = self.state.browsers.get(browser_id)
            if record is None or record.epoch != epoch:
                return False
            return record.models.get(model) is ModelPhase.LOADED

        await self.changes.until(holds)


@contextlib.asynccontextmanager
async def opened(
    *browsers: str, hosts: FakeHosts | None = None, **options: Any
) -> AsyncIterator[Pool]:
    """A pool of these browsers; at the end its log must replay to its state."""
    pool = Pool(hosts or FakeHosts(), **options)
    await pool.supervisor.open(dict.fromkeys(browsers or ("b-0",), CHROME))
    yield pool
    assert reduce(apply, pool.log.events, PoolState()) == pool.state
    assert [event.seq for event in pool.log.events] == list(range(1, len(pool.log.events) + 1))
    pool.die()


class Parts:
    """The parts that the others stand on, over a pool of which nothing is carried out.

    What would be is in `instructions`.
    """

    def __init__(self, term: int = 1) -> None:
        self.term = term
        self.log = GatedLog()
        self.tasks, self.changes, self.hosts = Tasks(), Changes(term), Hosts()
        self.instructions: list[Instruction] = []
        self.journal = Journal(
            self.log, PoolState(), term, self.wall, self.changes, self.instructions.append
        )
        self.watches = Watches(self.hosts, self.journal, self.tasks, term, LEASE_SECONDS, self.wall)

    def wall(self) -> float:
        return asyncio.get_running_loop().time()

    async def happen(self, *bodies: Body) -> None:
        for body in bodies:
            await self.journal.happen(body)

    async def open(self, *browsers: str) -> None:
        """The pool is open, and these browsers are starting."""
        await self.happen(PoolOpened("p", Level.MEDIUM, CONFIG.strategy, LIMIT, self.term))
        await self.happen(*(BrowserWanted(browser_id, CHROME) for browser_id in browsers))

    async def serve(self, browser_id: str) -> FakeHost:
        """The browser is in service, in a fake worker that nobody watches yet."""
        host = FakeHost(browser_id)
        self.watches.take_on(browser_id, host)
        order = LaunchOrder(HostRef(browser_id, 0), self.term)
        self.hosts.launched(browser_id, await host.launch(order))
        await self.happen(BrowserReady(browser_id, 0, FACTS))
        return host

    @property
    def logged(self) -> list[Body]:
        return [event.body for event in self.log.events]

    def end(self) -> None:
        for task in self.tasks.running:
            task.cancel()
