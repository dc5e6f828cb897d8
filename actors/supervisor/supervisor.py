"""The supervisor: creates, watches and replaces browsers. Nothing else may do so.

A thin shell around `recovery.control.decide`: every event is logged and applied (`journal`), and
the instructions that follow are carried out on hosts (`launches`, `stops`, `loads`). Operations do
not pass through it. When its process dies, the next incarnation begins a new term: it restores the
state from the log, queries the running workers, and finishes or repeats interrupted instructions
(`takeover`). A plain class; hosts, clock and log are arguments. It must not decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

from actors.messages import LaunchReport
from actors.supervisor.care import Care
from actors.supervisor.changes import Changes
from actors.supervisor.hosts import HostFactory, HostFinder, Hosts
from actors.supervisor.journal import EventLog, Journal, MemoryLog
from actors.supervisor.launches import Launches
from actors.supervisor.leases import CreatorLease
from actors.supervisor.loads import Loads
from actors.supervisor.models import Models
from actors.supervisor.orders import MemoryOrders, OrderStore
from actors.supervisor.records import ModelOrder, SupervisorConfig, Table
from actors.supervisor.repairs import Repairs
from actors.supervisor.stops import Stops
from actors.supervisor.tables import Tables
from actors.supervisor.takeover import Takeover
from actors.supervisor.tasks import Tasks
from actors.supervisor.watching import Watches
from recovery.control import (
    ALIVE,
    BrowserRecord,
    BrowserUnwanted,
    BrowserWanted,
    Drain,
    Instruction,
    Launch,
    Load,
    PoolClosing,
    PoolOpened,
    PoolState,
    Reconnect,
    Repair,
    Stop,
    TermBegan,
    Unload,
)
from recovery.errors import PoolClosed
from recovery.failures import Failure
from recovery.kinds import BrowserType, RecoveryLevel

_WATCH_SECONDS_MAX = 30.0


class Supervisor:
    """One term of a pool's supervisor."""

    def __init__(
        self,
        config: SupervisorConfig,
        factory: HostFactory,
        on_closed: Callable[[], None],
        log: EventLog | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        term: int = 1,
        state: PoolState | None = None,
        orders: OrderStore | None = None,
        on_repair: Callable[[BrowserRecord, Repair], None] | None = None,
        *,
        tasks: Tasks | None = None,
        changes: Changes | None = None,
    ) -> None:
        self._config = config
        self._on_closed = on_closed
        self._term = term
        self._tasks = tasks = tasks or Tasks()
        self._changes = changes = changes or Changes(term)
        self._journal = journal = Journal(
            log or MemoryLog(),
            state or PoolState(),
            term,
            wall,
            changes,
            self._carry_out,
            on_repair,
        )
        self._hosts = hosts = Hosts()
        watches = Watches(hosts, journal, tasks, term, config.lease_seconds, wall)
        self._launches = Launches(factory, hosts, watches, journal, term, wall)
        self._stops = Stops(hosts, watches, journal, tasks, term)
        self._takeover = Takeover(hosts, watches, journal, tasks, term, wall, self._carry_out)
        self._care = care = Care(config, hosts, journal, tasks, clock)
        self._models = models = Models(
            orders or MemoryOrders(),
            journal,
            changes,
            tasks,
            self._require_open,
            care.refuse_if_full,
        )
        self._loads = Loads(models.get, hosts, journal, term, wall)
        self._repairs = Repairs(journal, changes)
        self._lease = CreatorLease(config.creator, config.lease_seconds, clock)
        self._tables = Tables(hosts, journal, models, tasks, changes, term)

    # -- the term ----------------------------------------------------------------------------------

    async def open(self, browsers: Mapping[str, BrowserType]) -> None:
        """Open the pool: start every browser in `browsers` (id to type)."""
        config = self._config
        await self._journal.happen(
            PoolOpened(config.name, config.level, config.strategy, config.limit, self._term)
        )
        await self.want(browsers)
        self._lease.begin()
        self._begin_watching()

    async def resume(self, find: HostFinder, trouble: str = "") -> None:
        """Continue from the given state: reconcile it with the hosts that `find` returns.

        `trouble` says which events of the log were lost, if any.
        """
        self._journal.lost(trouble)
        await self._journal.happen(TermBegan(self._term))
        await self._models.restore()
        await self._takeover.run(find)
        await self._changes.announce()
        self._lease.renew(self._config.creator)
        self._begin_watching()

    def _begin_watching(self) -> None:
        config = self._config
        if self.state.closing:
            self._tasks.spawn(self._finish_closing, "close")
        elif not config.persistent:
            self._tasks.spawn(self._close_with_lease, "lease")
        if config.folder:
            work = partial(self._journal.checkpoint_every, config.checkpoint_seconds)
            self._tasks.spawn(work, "checkpoints")
        if config.care_seconds:
            self._tasks.spawn(self._care.run, "care")

    async def close(self) -> None:
        """Stop every browser; returns when all have stopped."""
        if not self.state.closing:
            await self._journal.happen(PoolClosing())
        await self._changes.until(
            lambda: not any(r.phase in ALIVE for r in self.state.browsers.values())
        )
        # A browser that failed meanwhile counts as stopped early; wait for its stop and its events.
        while under_way := {*self._stops.under_way, *self._journal.under_way}:
            await asyncio.wait(under_way)
        await self._journal.close()

    async def _finish_closing(self) -> None:
        await self.close()
        self._on_closed()

    async def _close_with_lease(self) -> None:
        await self._lease.over()
        await self._finish_closing()

    def _require_open(self) -> None:
        if self.state.closing:
            raise PoolClosed(f"pool {self._config.name} is closing")

    # -- orders from clients -----------------------------------------------------------------------

    async def want(self, browsers: Mapping[str, BrowserType]) -> None:
        """Start these browsers too (id to type). Existing ones are no error."""
        self._require_open()
        for browser_id, kind in browsers.items():
            known = self.state.browsers.get(browser_id)
            if known is None or known.phase not in ALIVE:
                await self._journal.happen(BrowserWanted(browser_id, kind), ordered=True)

    async def drain(self, browser_id: str) -> None:
        """Drain one browser; returns when it has stopped."""
        self._require_open()
        await self._journal.happen(BrowserUnwanted(browser_id), ordered=True)
        await self._changes.until(lambda: self.state.browsers[browser_id].phase not in ALIVE)

    async def load(self, order: ModelOrder) -> None:
        """Load a model on every browser, or on those that `placing` chooses.

        Returns when each has loaded it or failed to; the table has the results.
        """
        await self._models.load(order)

    async def reload(self, model: str) -> None:
        """Reload a parked model, without waiting for it. Does nothing for any other model.

        Raises `SetupError` while there is too little memory for it.
        """
        await self._models.reload(model)

    async def unload(self, model: str) -> None:
        await self._models.unload(model)

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None = None
    ) -> Repair:
        """Recover one browser from `failure` by the pool's strategy; returns the completed repair.

        `start` is the first rung, if not the usual one for the failure. For failures that the
        caller detected. Raises `BadInput`.
        """
        self._require_open()
        return await self._repairs.repair(browser_id, failure, start)

    # -- state for clients -------------------------------------------------------------------------

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        """The table as soon as it is newer than `version`, or after `seconds`.

        The call renews the client's lease.
        """
        self._lease.renew(client)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, _WATCH_SECONDS_MAX)):
                await self._changes.until(lambda: self._changes.version > version)
        self._lease.renew(client)
        return self._tables.table()

    @property
    def state(self) -> PoolState:
        """The state as the last event left it."""
        return self._journal.state

    @property
    def faults(self) -> deque[str]:
        """The supervisor's own latest errors."""
        return self._tasks.faults

    def trouble(self, text: str) -> None:
        """Report a problem of the log in the table, for the rest of this term."""
        self._journal.lost(text)

    def reports(self) -> Mapping[str, LaunchReport]:
        """The launch report of each browser's current incarnation."""
        return self._hosts.reports()

    async def memory(self) -> Mapping[str, int]:
        """Resident bytes of each browser's process tree."""
        return await self._care.memory()

    # -- instructions ------------------------------------------------------------------------------

    def _carry_out(self, instruction: Instruction) -> None:
        spawn = self._tasks.spawn
        match instruction:
            case Launch(browser_id):
                spawn(partial(self._launches.launch, instruction), f"launch {browser_id}")
            case Reconnect(browser_id):
                spawn(partial(self._launches.reconnect, instruction), f"reconnect {browser_id}")
            case Load():
                spawn(partial(self._loads.load, instruction), f"load {instruction.model}")
            case Unload():
                spawn(partial(self._loads.unload, instruction), f"unload {instruction.model}")
            case Drain(browser_id):
                spawn(partial(self._stops.drain, instruction), f"drain {browser_id}")
            case Stop():
                self._stops.begin(instruction)
