"""The connections of an open pool: Ray, the supervisor, the routes to browsers, the history.

They are opened and closed together. A pool that this client created is stopped with them; one that
it joined, or a persistent one, keeps running. This module must not know models or operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from actors.ray.connection import RaySession, connect, disconnect, this_node
from actors.ray.handles import RayHistory, RayNative
from actors.ray.supervisor_handle import RaySupervisor
from actors.supervisor.records import SupervisorConfig, Table
from pool.config import PoolConfig
from pool.routing import Routing
from pool.state_folders import hold, new_folder, state_root
from recovery.control import COMING, BrowserRecord, Phase
from recovery.errors import LaunchFailed, PoolClosed, SetupError, named_error
from recovery.kinds import BrowserType, Level
from recovery.maintenance import first_names
from recovery.plan import strategy_order

_WATCH_SECONDS_MAX = 5.0
_CARE_SECONDS = 5.0  # between the supervisor's checks of memory and usage
_SCALING_SECONDS = 0.5  # the same, with adaptive scaling


class Connection:
    """One client's connection to one pool. `owner`: whether this client creates the pool."""

    def __init__(self, config: PoolConfig, client: str, *, owner: bool) -> None:
        self.config = config  # after `open`, with the running pool's settings
        self.level = config.level_effective  # the pool's
        self.client = client
        self.log_folder: Path | None = None  # of the control log, if this client created the pool
        self.history: RayHistory | None = None
        self.native: RayNative | None = None
        self._owner = owner
        self._ray: RaySession | None = None
        self._supervisor: RaySupervisor | None = None
        self._routing: Routing | None = None
        self._folder_lock: int | None = None

    @property
    def is_open(self) -> bool:
        return self._supervisor is not None

    @property
    def known_routing(self) -> Routing | None:
        """The routes, or None before `open`."""
        return self._routing

    @property
    def routing(self) -> Routing:
        return self.require()[1]

    @property
    def supervisor(self) -> RaySupervisor:
        return self.require()[0]

    @property
    def dashboard_url(self) -> str:
        return self._ray.dashboard_url if self._ray else ""

    def require(self) -> tuple[RaySupervisor, Routing]:
        """Supervisor and routes. Raises `PoolClosed` if the pool is not open, or gone."""
        if self._supervisor is None or self._routing is None:
            raise PoolClosed(
                "this pool is not open: use `async with BrowserPool(...)`, or call open()"
            )
        if self._routing.gone is not None:
            raise self._routing.gone
        return self._supervisor, self._routing

    async def open(self) -> None:
        """Start every browser, or join the running pool; see `BrowserPool.open`.

        The caller must `leave` if it raises.
        """
        config = self.config
        self._ray = await asyncio.to_thread(connect, config.address, config.dashboard)
        if self._owner:
            supervisor = RaySupervisor.create(await self._supervisor_config(), config.hosts())
            self._supervisor = supervisor
            await supervisor.open(browser_ids(config.kinds(), ()))
        else:
            self._supervisor = supervisor = RaySupervisor.find(config.name)
            self.config = config = await self._joined_config(supervisor)
        self._routing = Routing(
            supervisor,
            self.client,
            min(config.lease / 3, _WATCH_SECONDS_MAX),
            this_node(),
            config.message_bytes_max,
            config.queue_max,
        )
        await self._routing.start()
        await self._started()

    async def open_stores(self) -> SupervisorConfig:
        """Find the history, and create the native host if allowed; returns the pool's settings."""
        theirs, _ = await self.supervisor.config()
        if self.config.simulation:
            self.native = RayNative(theirs)
        if theirs.history:
            with contextlib.suppress(PoolClosed):  # it could not be opened: `state()` says why
                self.history = RayHistory.find(theirs)
        return theirs

    async def leave(self, *, stop: bool) -> None:
        """Disconnect from the pool, and with `stop` end it for all clients."""
        self.history = None
        routing, self._routing = self._routing, None
        if routing is not None:
            await routing.stop()
        lock, self._folder_lock = self._folder_lock, None
        if lock is not None:
            os.close(lock)
        supervisor, self._supervisor = self._supervisor, None
        native, self.native = self.native, None
        if supervisor is not None and stop:
            await supervisor.close()
            if native is not None:
                native.end()
        session, self._ray = self._ray, None
        if session is not None:
            await asyncio.to_thread(disconnect, session)

    @property
    def ends_the_pool(self) -> bool:
        """Whether the pool ends when this client leaves."""
        return self._owner and not self.config.persistent

    async def table_when(self, condition: Callable[[Table], bool], seconds: float) -> Table:
        """The first table for which `condition` holds. Raises `LaunchFailed` after `seconds`."""
        routing = self.routing
        try:
            return await routing.until(condition, seconds)
        except TimeoutError as error:
            phases = ", ".join(f"{count} {phase}" for phase, count in self.phases().items())
            raise LaunchFailed(
                f"the pool was not ready within {seconds:.0f} s: {self.config.name} has "
                f"{phases or 'no browser'}. The machine may be overloaded; `tabpool doctor` shows "
                "its browsers."
            ) from error

    def phases(self) -> dict[Phase, int]:
        """Number of browsers by phase, as last known to this client."""
        counts: dict[Phase, int] = {}
        table = self._routing.table if self._routing is not None else None
        for record in table.state.browsers.values() if table is not None else ():
            counts[record.phase] = counts.get(record.phase, 0) + 1
        return counts

    async def _supervisor_config(self) -> SupervisorConfig:
        config, run = self.config, secrets.token_hex(2)
        root, folder = state_root(config.state_dir), ""
        logged = config.level_effective not in (Level.NONE, Level.LOW)
        if logged or config.history:
            try:
                made = await asyncio.to_thread(new_folder, root, config.name, run)
                folder, self._folder_lock = str(made), hold(made)
            except OSError as error:
                what = f"level {config.level} keeps a log" if logged else "history is kept"
                raise SetupError(
                    f"{what}, and {root} can't be written ({error}): pass state_dir= or set "
                    "TABPOOL_STATE to a folder that can."
                ) from error
        self.log_folder = Path(folder) / "log" if logged else None
        return SupervisorConfig(
            config.name,
            config.level_effective,
            strategy_order(config.strategy),
            config.restart_limit,
            config.lease,
            config.persistent,
            config.max_connections,
            creator=self.client,
            run=run,
            folder=folder if logged else "",
            checkpoint_seconds=config.checkpoint_interval,
            resources=config.resources,
            scaling=config.scaling(),
            care_seconds=_SCALING_SECONDS if config.adaptive_scaling else _CARE_SECONDS,
            history=str(root / "history.duckdb") if config.history else "",
            history_limits=config.history_limits,
            history_spare=str(Path(folder) / "history.duckdb") if config.history else "",
        )

    async def _joined_config(self, supervisor: RaySupervisor) -> PoolConfig:
        """This client's configuration, with the running pool's settings."""
        theirs, hosts = await supervisor.config()
        self.level = theirs.level
        return replace(
            self.config,
            level=str(theirs.level),
            strategy=theirs.strategy.name,
            restart_limit=theirs.limit,
            lease=theirs.lease_seconds,
            message_bytes_max=hosts.message_bytes_max,
            queue_max=hosts.queue_max,
            launch_seconds=hosts.launch_seconds,
            load_seconds=hosts.load_seconds,
            hang_seconds=hosts.hang_seconds,
            max_connections=theirs.browsers_max,
        )

    async def _started(self) -> None:
        """Wait until every browser is ready or given up."""
        limit = self.config.restart_limit
        patience = (self.config.launch_seconds + limit.delay_max_seconds) * (
            limit.launches_failed_max
        )
        table = await self.table_when(
            lambda table: all(
                record.phase not in COMING for record in table.state.browsers.values()
            ),
            patience,
        )
        records = table.state.browsers.values()
        lost = [record for record in records if record.phase is Phase.GIVEN_UP]
        ready = [record for record in records if record.phase is Phase.READY]
        if lost and (self.config.strict or not ready):
            raise why_lost(lost[0])


def browser_ids(kinds: Mapping[BrowserType, int], taken: tuple[str, ...]) -> dict[str, BrowserType]:
    """Names for new slots: the type and the first unused numbers."""
    return {name: kind for kind, count in kinds.items() for name in first_names(kind, count, taken)}


def why_lost(record: BrowserRecord) -> Exception:
    """The error for a browser that could not be started, from its recorded failure."""
    failure = record.failure
    message = failure.message if failure else f"{record.id} could not be started"
    name = str(failure.evidence.get("error_type", "")) if failure else ""
    kind = named_error(name) or LaunchFailed
    return kind(message, browser=record.id, failure=failure)
