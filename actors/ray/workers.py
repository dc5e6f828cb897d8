"""Hosts and the history as actors: each plain class of `actors` in a worker process of its own.

Nothing else happens here; every decision and every side effect is in the classes that are wrapped.
The supervisor's own actor is in `actors.ray.supervisor_worker`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.browser.host import BrowserHost
from actors.history import HistoryKeeper
from actors.messages import (
    HostConfig,
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    PageDiagnostics,
    RunReply,
    RunRequest,
    Usage,
)
from actors.native_host import NativeHost
from actors.ray.connection import this_node
from actors.ray.own_process import end_in, end_this_actor, end_unless_claimed
from actors.supervisor.records import SupervisorConfig
from recovery.breaker import BreakerKey, BreakerSwitch, CircuitState
from recovery.faults import Fault, Injected
from recovery.history.samples import Sample
from recovery.history.store import HistoryStore
from recovery.kinds import Backend, BrowserType
from recovery.records import HostRef, HostStatus, NumericId
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec

_NATIVE_IDLE_SECONDS = 120.0  # the native runtime is ended when it was not asked for so long


class Browser:
    """A `BrowserHost` in a worker process of its own."""

    def __init__(self, browser_id: str, kind: BrowserType, config: HostConfig) -> None:
        self._id = browser_id
        self._unclaimed = end_unless_claimed(config.lease_seconds)
        self._host = BrowserHost(browser_id, kind, config, end_this_actor, node=this_node())

    def __repr__(self) -> str:  # what Ray's dashboard and logs show
        return self._id

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        self._unclaimed.cancel()  # from here on there is a lease
        return await self._host.launch(order)

    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId:
        return await self._host.load(ref, term, spec, backends, known)

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], gated: bool
    ) -> Injected | None:
        return await self._host.inject(ref, fault, gated=gated)

    async def diagnose(self, screenshot: bool) -> PageDiagnostics:
        return await self._host.diagnose(screenshot=screenshot)

    async def unload(self, ref: HostRef, term: int, model: str) -> None:
        await self._host.unload(ref, term, model)

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        return await self._host.run(request, tensors)

    async def next_event(
        self, term: int, seconds: float, after: int, peers: Mapping[BreakerKey, CircuitState]
    ) -> HostEvent | None:
        return await self._host.next_event(term, seconds, after, peers)

    async def hello(self, term: int) -> HostReport:
        self._unclaimed.cancel()
        return await self._host.hello(term)

    async def reconnect(self, ref: HostRef, term: int) -> None:
        await self._host.reconnect(ref, term)

    async def status(self) -> HostStatus:
        return self._host.status()

    async def usage(self) -> Usage:
        return self._host.usage()

    async def breaker_metrics(self) -> Mapping[str, Mapping[str, Any]]:
        return self._host.breaker_metrics()

    async def switch_breaker(self, model: str, to: BreakerSwitch) -> None:
        self._host.switch_breaker(model, to)

    async def drain(self, term: int) -> None:
        await self._host.drain(term)

    async def memory_bytes(self) -> int:
        return await self._host.memory_bytes()

    async def stop(self) -> None:
        await self._host.stop()


class History:
    """A `HistoryKeeper` in a worker process of its own, which ends when nobody is heard of.

    Ray starts the process again when it dies; whatever is asked of it first opens the file.
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self._name = config.name
        make = partial(HistoryStore, config=config.history_limits)
        self._keeper = HistoryKeeper(Path(config.history), Path(config.history_spare), make)
        self._silence_max = 4 * config.lease_seconds  # seconds
        self._lease = end_unless_claimed(config.lease_seconds)
        self._opened: asyncio.Task[str] | None = None

    def __repr__(self) -> str:
        return f"history of {self._name}"

    async def open(self) -> str:
        await self.renew()
        return await self._ready()

    async def _ready(self) -> str:
        if self._opened is None or (self._opened.done() and not self._keeper.is_open):
            self._opened = asyncio.create_task(self._keeper.open(), name="open")
        return await asyncio.shield(self._opened)

    async def renew(self) -> None:
        self._lease.cancel()
        self._lease = end_in(self._silence_max)

    async def add(self, samples: Sequence[Sample]) -> None:
        await self._ready()
        self._keeper.add(samples)

    async def ask(self, question: str, options: Mapping[str, Any]) -> Any:
        await self._ready()
        return await self._keeper.ask(question, **options)

    async def pid(self) -> int:
        return os.getpid()

    async def query(self, sql: str, params: Sequence[Any]) -> list[dict[str, Any]]:
        await self._ready()
        return await self._keeper.query(sql, params)

    async def close(self) -> None:
        if self._opened is not None:
            await asyncio.wait({self._opened})
        await self._keeper.close()


class Native:
    """A `NativeHost` in a worker process of its own, which ends when it has had nothing to do."""

    def __init__(self, lease_seconds: float) -> None:
        self._host = NativeHost(this_node())
        self._idle_max = max(4 * lease_seconds, _NATIVE_IDLE_SECONDS)  # seconds
        self._lease = end_in(self._idle_max)

    def __repr__(self) -> str:
        return "native runtime (simulation)"

    async def run(
        self, request: RunRequest, spec: ModelSpec, tensors: Mapping[str, Any]
    ) -> RunReply:
        self._lease.cancel()
        try:
            return await self._host.run(request, spec, tensors)
        finally:
            self._lease.cancel()
            self._lease = end_in(self._idle_max)
