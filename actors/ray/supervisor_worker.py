"""The supervisor as an actor: made with its log, started again by Ray, and reported on.

Everything that it decides and does is in `actors.supervisor`. This module must not be asked for
anything but by `actors.ray.supervisor_handle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import RayError
from tenacity import AsyncRetrying, retry_if_exception_type

from actors.injection.supervisor import SupervisorFailureInjector
from actors.injection.target import refused
from actors.messages import HostConfig, LaunchReport
from actors.ray.connection import NAMESPACE, this_node
from actors.ray.handles import RayHistory, RayHost
from actors.ray.metrics import PoolMetrics
from actors.ray.own_process import call_myself, end_this_actor, end_unless_claimed, was_restarted
from actors.ray.starting import browser_name, start_actor, where_browsers_go
from actors.ray.workers import Browser
from actors.supervisor.hosts import Host
from actors.supervisor.orders import DiskOrders
from actors.supervisor.records import ModelOrder, SupervisorConfig, Table
from actors.supervisor.supervisor import Supervisor
from recovery.control import BrowserRecord, PoolState, Repair
from recovery.errors import LaunchFailed, PoolClosed, PoolError
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.history.samples import recovery_samples
from recovery.kinds import BrowserType, RecoveryLevel
from recovery.log.log import Log, LogInUse, LogUnavailable
from recovery.policies import SUPERVISOR_RETURNS

_REPORT_SECONDS = 5.0  # between two updates of the gauges


class PoolSupervisor:
    """A `Supervisor` in a worker process of its own.

    Ray starts the process again when it dies (if the pool keeps a log), with the same arguments:
    then the supervisor resumes from that log in the next term.
    """

    def __init__(self, config: SupervisorConfig, hosts: HostConfig) -> None:
        self._config = config
        self._hosts = hosts
        self._supervisor: Supervisor | None = None
        self._resuming = asyncio.Lock()
        self._metrics: PoolMetrics | None = None
        self._history: RayHistory | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._memory: Mapping[str, int] = {}  # of each browser, when last looked at
        self._injector = SupervisorFailureInjector()
        self._unclaimed = end_unless_claimed(config.lease_seconds)
        self._again = was_restarted()
        if self._again:
            call_myself("resume")  # nobody else may call for a while

    def __repr__(self) -> str:
        return f"supervisor of {self._config.name}"

    async def open(self, browsers: Mapping[str, BrowserType]) -> None:
        if self._supervisor is None and not self._again:
            self._unclaimed.cancel()
            await self._begin(browsers)
        else:  # a repeat of a call whose answer was lost
            await (await self._open()).want(browsers)

    async def _begin(self, browsers: Mapping[str, BrowserType]) -> None:
        log, trouble = None, ""
        if self._config.folder:
            log = Log(Path(self._config.folder) / "log")
            try:
                await log.open()
            except LogUnavailable as error:  # the pool answers all the same, and says so
                log, trouble = None, f"the log can't be written: {error}"
        self._supervisor = supervisor = self._made(log, 1, None)
        supervisor.trouble(trouble)
        await supervisor.open(browsers)
        await self._begin_reporting(supervisor)

    async def resume(self) -> None:
        """Go on where the incarnation before was, if its log tells."""
        async with self._resuming:
            if self._supervisor is not None:
                return
            log = Log(Path(self._config.folder) / "log")
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(LogInUse), **SUPERVISOR_RETURNS
            ):
                with attempt:  # the process before may still be ending
                    recovery = await log.open()
            if not recovery.state.name:  # nothing was ever decided: there is no pool to go on with
                await log.close()
                self._again = False
                return
            lost = ", ".join(str(each) for each in recovery.lost)
            supervisor = self._made(log, recovery.term + 1, recovery.state)
            try:
                await supervisor.resume(self._find_hosts, f"events {lost} are lost" if lost else "")
            except BaseException:
                await log.close()  # else nobody could try again
                raise
            self._unclaimed.cancel()
            self._supervisor = supervisor
            await self._begin_reporting(supervisor)

    async def _begin_reporting(self, supervisor: Supervisor) -> None:
        """Samples and metrics: neither is on the way of anything that matters."""
        self._metrics = metrics = PoolMetrics(self._config.name)
        if self._config.history:
            try:
                self._history = await RayHistory.create(self._config)
            except PoolError as error:
                supervisor.faults.append(f"history: {error}")
        self._reporting = asyncio.create_task(self._report_loop(supervisor, metrics), name="report")

    async def _report_loop(self, supervisor: Supervisor, metrics: PoolMetrics) -> None:
        while not supervisor.state.closing:
            with contextlib.suppress(PoolError):
                self._memory = await supervisor.memory()
            metrics.update(supervisor.state, self._memory)
            if self._history is not None:
                self._history.renew()
            await asyncio.sleep(min(_REPORT_SECONDS, self._config.lease_seconds / 3))

    def _on_repair(self, record: BrowserRecord, repair: Repair) -> None:
        strategy, held = self._config.strategy.name, self._memory.get(record.id, 0)
        if self._metrics is not None:
            self._metrics.repaired(record, repair)
        if self._history is not None:
            self._history.tell(recovery_samples(self._config.name, strategy, record, repair, held))

    def _made(self, log: Log | None, term: int, state: PoolState | None) -> Supervisor:
        folder = self._config.folder
        return Supervisor(
            self._config,
            self._new_host,
            end_this_actor,
            log,
            wall=self._injector.wall,
            term=term,
            state=state,
            orders=DiskOrders(Path(folder) / "models") if folder else None,
            on_repair=self._on_repair,
        )

    async def _new_host(self, browser_id: str, kind: BrowserType, epoch: int) -> Host:
        try:
            name = browser_name(self._config, browser_id, epoch)
            actor = start_actor(Browser, name, browser_id, kind, self._hosts, **where_browsers_go())
        except (RayError, ValueError) as error:
            raise LaunchFailed(f"Ray could not start a worker for {browser_id}: {error}") from error
        return RayHost(actor)

    async def _find_hosts(self) -> Mapping[str, list[Host]]:
        """The living workers of this pool, by browser, found by their names."""
        name, run = re.escape(self._config.name), re.escape(self._config.run)
        pattern = re.compile(rf"{name}: (?P<id>[\w-]+) from epoch \d+ \({run}\)")
        found: dict[str, list[Host]] = {}
        for listed in await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True):
            match = pattern.fullmatch(listed["name"]) if listed["namespace"] == NAMESPACE else None
            if match is None:
                continue
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                actor = ray.get_actor(listed["name"], namespace=NAMESPACE)
                found.setdefault(match["id"], []).append(RayHost(actor))
        return found

    async def _open(self) -> Supervisor:
        if self._supervisor is None and self._again:
            await self.resume()
        if self._supervisor is None:
            raise PoolClosed(f"pool {self._config.name} is not open")
        return self._supervisor

    async def config(self) -> tuple[SupervisorConfig, HostConfig]:
        return self._config, self._hosts

    async def want(self, browsers: Mapping[str, BrowserType]) -> None:
        await (await self._open()).want(browsers)

    async def drain(self, browser_id: str) -> None:
        await (await self._open()).drain(browser_id)

    async def load(self, order: ModelOrder) -> None:
        await (await self._open()).load(order)

    async def reload(self, model: str) -> None:
        await (await self._open()).reload(model)

    async def unload(self, model: str) -> None:
        await (await self._open()).unload(model)

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None
    ) -> Repair:
        return await (await self._open()).repair(browser_id, failure, start)

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        return await (await self._open()).watch(client, version, seconds)

    async def reports(self) -> Mapping[str, LaunchReport]:
        return (await self._open()).reports()

    async def memory(self) -> Mapping[str, int]:
        return await (await self._open()).memory()

    async def node(self) -> str:
        return this_node()

    async def pids(self) -> Mapping[str, int]:
        """The processes of the control plane, by what they are."""
        history = await self._history.pid() if self._history is not None else 0
        return {"supervisor": os.getpid(), **({"history": history} if history else {})}

    async def inject(self, fault: Fault) -> Injected:
        """Break the supervisor's own process on purpose. Raises `FaultRefused`."""
        if not self._hosts.faults:
            raise refused("off")
        return self._injector.inject(fault)

    async def close(self) -> None:
        await (await self._open()).close()
        if self._history is not None:
            await self._history.close()
