"""A handle to a pool's supervisor, which may be away for a while and come back.

Calls are repeated until it answers, within the patience of `recovery.policies`; Ray's errors stop
here. This module must not decide what a pool does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from tenacity import AsyncRetrying, retry_if_exception

from actors.messages import HostConfig, LaunchReport
from actors.ray.connection import NAMESPACE
from actors.ray.handles import result
from actors.ray.starting import on_this_node, start_actor, supervisor_name
from actors.ray.supervisor_worker import PoolSupervisor
from actors.supervisor.records import ModelOrder, SupervisorConfig, Table
from recovery.control import Repair
from recovery.errors import BrowserLost, InternalError, PoolClosed, PoolError, SetupError
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.kinds import BrowserType, RecoveryLevel
from recovery.policies import SUPERVISOR_MAY_TAKE_LONG, SUPERVISOR_RETURNS

_CLOSE_SECONDS = 60.0  # a supervisor that takes longer is killed; leases end the rest
_ANSWER_SECONDS = 10.0  # for what a supervisor can tell at once; one that can't is frozen


@dataclass(frozen=True)
class RaySupervisor:
    """A handle to a pool's supervisor."""

    actor: Any

    @classmethod
    def create(cls, config: SupervisorConfig, hosts: HostConfig) -> RaySupervisor:
        """Start the supervisor of a new pool. Raises `SetupError` if the name is taken."""
        try:
            actor = start_actor(
                PoolSupervisor,
                supervisor_name(config.name),
                config,
                hosts,
                max_restarts=-1 if config.folder else 0,
                # Beside its log, which lies on the machine of whoever makes the pool.
                **on_this_node(),
            )
        except ValueError as error:
            raise SetupError(
                f"a pool called {config.name!r} already runs on this Ray cluster: join it with "
                f"BrowserPool.attach({config.name!r}), or choose another name"
            ) from error
        return cls(actor)

    @classmethod
    def find(cls, name: str) -> RaySupervisor:
        """The supervisor of a running pool. Raises `PoolClosed` if there is none."""
        try:
            return cls(ray.get_actor(supervisor_name(name), namespace=NAMESPACE))
        except ValueError as error:
            raise PoolClosed(f"no pool called {name!r} runs on this Ray cluster") from error

    async def _call(self, call: Callable[[], Any], seconds: float | None = _ANSWER_SECONDS) -> Any:
        """Call, and again while the supervisor is being restarted: its calls can be repeated.

        `seconds` is for one try. Without, it takes as long as it takes (a model is loaded, say),
        and the caller watches whether the supervisor lives.
        """
        policy = SUPERVISOR_RETURNS if seconds is not None else SUPERVISOR_MAY_TAKE_LONG
        try:
            async for attempt in AsyncRetrying(retry=retry_if_exception(_out_of_reach), **policy):
                with attempt:
                    return await _in_time(call(), seconds)
        except BrowserLost as error:
            raise _closed_or_away(error) from error
        raise InternalError("a retry ended without an outcome")

    async def open(self, browsers: Mapping[str, BrowserType]) -> None:
        await self._call(lambda: self.actor.open.remote(browsers), _CLOSE_SECONDS)

    async def config(self) -> tuple[SupervisorConfig, HostConfig]:
        config, hosts = await self._call(lambda: self.actor.config.remote())
        return config, hosts

    async def want(self, browsers: Mapping[str, BrowserType]) -> None:
        await self._call(lambda: self.actor.want.remote(browsers))

    async def drain(self, browser_id: str) -> None:
        await self._call(lambda: self.actor.drain.remote(browser_id), None)

    async def load(self, order: ModelOrder) -> None:
        await self._call(lambda: self.actor.load.remote(order), None)

    async def reload(self, model: str) -> None:
        await self._call(lambda: self.actor.reload.remote(model), None)

    async def unload(self, model: str) -> None:
        await self._call(lambda: self.actor.unload.remote(model))

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None
    ) -> Repair:
        call = self.actor.repair
        repair: Repair = await self._call(lambda: call.remote(browser_id, failure, start), None)
        return repair

    async def table(self, client: str) -> Table:
        """The table as it is now."""
        table: Table = await self._call(lambda: self.actor.watch.remote(client, -1, 0.0))
        return table

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        # Not repeated here: who watches has a patience of its own.
        call = self.actor.watch.remote(client, version, seconds)
        try:
            table: Table = await _in_time(call, seconds + _ANSWER_SECONDS)
        except BrowserLost as error:
            raise _closed_or_away(error) from error
        return table

    async def reports(self) -> Mapping[str, LaunchReport]:
        reports: Mapping[str, LaunchReport] = await self._call(lambda: self.actor.reports.remote())
        return reports

    async def memory(self) -> Mapping[str, int]:
        memory: Mapping[str, int] = await self._call(lambda: self.actor.memory.remote())
        return memory

    async def node(self) -> str:
        """The id of the Ray node that it is on."""
        return str(await self._call(lambda: self.actor.node.remote()))

    async def pids(self) -> Mapping[str, int]:
        pids: Mapping[str, int] = await self._call(lambda: self.actor.pids.remote())
        return pids

    async def inject(self, fault: Fault) -> Injected:
        made: Injected = await result(self.actor.inject.remote(fault), "the supervisor")
        return made

    async def close(self) -> None:
        """Stop every browser, then the supervisor itself. No error if it is gone already."""
        with contextlib.suppress(PoolClosed, BrowserLost, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._call(lambda: self.actor.close.remote(), None)
        with contextlib.suppress(RayError):
            ray.kill(self.actor)


async def _in_time(call: Any, seconds: float | None) -> Any:
    """The supervisor's answer; one that is frozen is out of reach."""
    try:
        async with asyncio.timeout(seconds):
            return await result(call, "the supervisor")
    except TimeoutError:
        raise BrowserLost(
            f"the supervisor did not answer within {seconds:g} s", what="socket_closed"
        ) from None


def _out_of_reach(error: BaseException) -> bool:
    return isinstance(error, BrowserLost) and error.fields.get("what") == "socket_closed"


def _closed_or_away(error: BrowserLost) -> PoolError:
    if _out_of_reach(error):
        return error
    return PoolClosed("the pool's supervisor is gone, and the pool with it")
