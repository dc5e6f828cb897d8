"""A client's routing table: the browsers that can take operations, kept up to date.

The table is a hint; browsers decide on admission. One task long-polls the supervisor (which also
renews the client's lease), and every reply updates its browser's status. This module must not
choose a browser: `recovery.answering` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from actors.dataplane import DataLink
from actors.links import Links
from actors.messages import PageDiagnostics, RunReply, RunRequest
from actors.relay import Chain, Hop
from actors.supervisor.hosts import Host
from actors.supervisor.records import ModelOrder, Table
from recovery.breaker import BreakerSwitch
from recovery.control import COMING, ModelPhase, Phase
from recovery.errors import BrowserLost, PoolClosed, PoolError
from recovery.faults import Fault, Injected
from recovery.kinds import Readiness
from recovery.records import HostRef, HostStatus

_QUEUE_NEWS_SECONDS = 0.1  # after this, a full host is tried again
_EXCLUDED_SECONDS = 2.0  # a dead browser is usually replaced or dropped within this
_UNREACHABLE_SECONDS = 0.2  # between two calls of an unreachable supervisor


T = TypeVar("T")


class TableSource(Protocol):
    async def watch(self, client: str, version: int, seconds: float) -> Table: ...


class Routing:
    """The routes of one client."""

    def __init__(
        self,
        source: TableSource,
        client: str,
        poll_seconds: float,
        node: str,
        bytes_max: int,
        queue_max: int = 1,
    ) -> None:
        self._source = source
        self._queue_max = queue_max
        self._node = node
        self._bytes_max = bytes_max
        self._links: Links[DataLink] = Links()
        self._tokens: dict[str, str] = {}
        self._client = client
        self._poll_seconds = poll_seconds
        self._patience_seconds = 3 * poll_seconds
        self._excluded: dict[HostRef, float] = {}
        self._statuses: dict[HostRef, HostStatus] = {}
        self._hosts: dict[HostRef, Host] = {}
        self._outstanding: dict[HostRef, int] = {}
        self._heard: dict[HostRef, float] = {}  # when each host last reported its own status
        self._changed = asyncio.Condition()
        self.changes = 0  # number of announcements, so that waiters miss none
        self._task: asyncio.Task[None] | None = None
        self.table: Table | None = None
        self.gone: PoolClosed | None = None

    async def start(self) -> None:
        """Get the first table, and start keeping it up to date."""
        await self._take(await self._source.watch(self._client, -1, 0.0))
        self._task = asyncio.create_task(self._follow(), name="routing")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.gone is None:
            self.gone = PoolClosed("this pool has been closed")
        await self.announce()  # wake up waiting operations, which fail now
        await self._links.close()

    async def _follow(self) -> None:
        heard = time.monotonic()
        while True:
            version = self.table.version if self.table else -1
            try:
                table = await self._source.watch(self._client, version, self._poll_seconds)
            except BrowserLost as error:  # unreachable; given up after a lease
                if time.monotonic() - heard > self._patience_seconds:
                    self.gone = PoolClosed(f"the pool's supervisor is unreachable: {error}")
                else:
                    await asyncio.sleep(_UNREACHABLE_SECONDS)
                    continue
            except PoolError as error:
                self.gone = error if isinstance(error, PoolClosed) else PoolClosed(str(error))
            if self.gone is not None:
                await self.announce()
                return
            heard = time.monotonic()
            await self._take(table)

    async def _take(self, table: Table) -> None:
        if self.table is not None and table.version <= self.table.version:
            return
        self.table = table
        refs = {route.status.ref for route in table.routes}
        for route in table.routes:
            known = self._statuses.get(route.status.ref)
            # The host's own report of its queue is newer than the supervisor's.
            queue_max = known.queue_max if known else self._queue_max
            self._statuses[route.status.ref] = replace(
                route.status, queue_max=queue_max, blocked=known.blocked if known else {}
            )
            self._hosts[route.status.ref] = route.host
            if route.status.ref.node == self._node:  # loopback addresses of other nodes are useless
                self._tokens[route.status.ref.address] = route.data_token
        local = {ref.address for ref in refs if ref.node == self._node}
        await self._links.keep(local)
        self._tokens = {at: token for at, token in self._tokens.items() if at in local}
        for ref in self._statuses.keys() - refs:
            del self._statuses[ref], self._hosts[ref]
            self._heard.pop(ref, None)
            self._excluded.pop(ref, None)
        await self.announce()

    async def announce(self) -> None:
        self.changes += 1
        async with self._changed:
            self._changed.notify_all()

    # -- what operations use ----------------------------------------------------------------------

    def candidates(self) -> list[HostStatus]:
        """Every known host; its queue is this client's own operations on it, or what it recently
        reported if that is more."""
        return [
            replace(
                status,
                queue=max(self._queue_heard(status), self._outstanding.get(ref, 0)),
                readiness=Readiness.DEAD if self._exclusion_left(ref) > 0 else status.readiness,
                blocked=self._blocked(status),
            )
            for ref, status in self._statuses.items()
        ]

    def _exclusion_left(self, ref: HostRef) -> float:
        return self._excluded.get(ref, -math.inf) - asyncio.get_running_loop().time()

    def _blocked(self, status: HostStatus) -> Mapping[str, float]:
        """Seconds for which breakers still refuse, by model."""
        if not status.blocked:
            return status.blocked
        age = asyncio.get_running_loop().time() - self._heard.get(status.ref, -math.inf)
        return {model: left - age for model, left in status.blocked.items() if left > age}

    def _queue_heard(self, status: HostStatus) -> int:
        # Other clients' operations end unnoticed here, so reports expire.
        return status.queue if self._news_left(status.ref) > 0 else 0

    def _news_left(self, ref: HostRef) -> float:
        age = asyncio.get_running_loop().time() - self._heard.get(ref, -math.inf)
        return _QUEUE_NEWS_SECONDS - age

    def any_left(self, model: str) -> bool:
        """Whether any running or starting browser has `model` or may still load it."""
        records = self.table.state.browsers.values() if self.table else ()
        return any(
            record.phase in (Phase.READY, *COMING)
            and record.models.get(model) is not ModelPhase.FAILED
            for record in records
        )

    async def run(
        self, ref: HostRef, request: RunRequest, tensors: Mapping[str, Any]
    ) -> RunReply | None:
        """Run an operation on `ref`: over the data plane if it is on this node, else by Ray.

        None if the table no longer has it, or this client has left: a call through Ray would then
        reconnect, and wait for a cluster that may have ended. Raises `BrowserLost`.
        """
        host = self._hosts.get(ref)
        if host is None or self.gone is not None:
            return None
        try:
            with self._sending(ref):
                if not ref.address or ref.node != self._node:
                    return await host.run(request, tensors)
                return await self._run_linked(ref.address, request, tensors)
        except BaseException:  # replies are announced by `learn`; errors free a place, too
            await self.announce()
            raise

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None:
        """Inject a fault into a host."""
        return await self._host(ref).inject(ref, fault, gated=gated)

    async def diagnose(self, ref: HostRef, *, screenshot: bool = True) -> PageDiagnostics:
        """Diagnostics of a host's page. Raises `BrowserLost`."""
        return await self._host(ref).diagnose(screenshot=screenshot)

    async def breaker_metrics(self, ref: HostRef) -> Mapping[str, Mapping[str, Any]]:
        """Metrics of a host's circuit breakers, by model. Raises `BrowserLost`."""
        return await self._host(ref).breaker_metrics()

    async def switch_breaker(self, ref: HostRef, model: str, to: BreakerSwitch) -> None:
        """Set one of a host's circuit breakers by hand. Raises `BrowserLost`."""
        await self._host(ref).switch_breaker(model, to)

    def _host(self, ref: HostRef) -> Host:
        host = self._hosts.get(ref)
        if host is None:
            raise BrowserLost(f"{ref} is not in service")
        return host

    async def _run_linked(
        self, address: str, request: RunRequest, tensors: Mapping[str, Any]
    ) -> RunReply:
        link = await self._link(address)
        try:
            return await link.run(request, tensors)
        except BrowserLost as error:
            if error.fields.get("what") == "socket_closed":
                # The connection or the worker? If reconnecting fails, it was the worker.
                await self._link(address)
            raise

    async def _link(self, address: str) -> DataLink:
        token = self._tokens.get(address, "")
        return await self._links.get(address, lambda: DataLink(address, token, self._bytes_max))

    async def chain(self, sequence: str, hops: Sequence[Hop]) -> Chain | None:
        """A route for a sequence from worker to worker. None if not all are on this node, or if
        one has ended."""
        known = [self._statuses.get(hop.ref) for hop in hops]
        refs = [status.ref for status in known if status is not None]
        if len(refs) < len(hops) or any(r.node != self._node or not r.address for r in refs):
            return None
        ends = [*refs[1:], None]
        whole = [
            replace(hop, address=end.address, token=self._tokens.get(end.address, ""))
            if end is not None
            else hop
            for hop, end in zip(hops, ends, strict=True)
        ]
        try:
            chain = Chain(sequence, whole, [await self._link(ref.address) for ref in refs])
        except BrowserLost:
            return None
        try:
            await chain.lay()
        except BaseException as error:
            chain.leave()
            if isinstance(error, BrowserLost):
                return None
            raise
        return chain

    @contextlib.contextmanager
    def _sending(self, ref: HostRef) -> Iterator[None]:
        """Count an operation as outstanding on `ref` within this context."""
        self._outstanding[ref] = self._outstanding.get(ref, 0) + 1
        try:
            yield
        finally:
            self._outstanding[ref] -= 1
            if not self._outstanding[ref]:
                del self._outstanding[ref]

    async def learn(self, status: HostStatus) -> None:
        """Update a host's status from its own report."""
        known = self._statuses.get(status.ref)
        if known is not None:  # a host doesn't know its own address: keep the table's
            self._statuses[status.ref] = replace(status, ref=known.ref)
            if self._excluded.get(status.ref) != math.inf:  # one that was outvoted stays so
                self._excluded.pop(status.ref, None)
            self._heard[status.ref] = asyncio.get_running_loop().time()
        await self.announce()

    async def exclude(self, ref: HostRef) -> None:
        """Exclude a failed incarnation until the supervisor has replaced it.

        Only for a while: if the supervisor does not replace it, it is used again.
        """
        if ref in self._statuses:
            until = asyncio.get_running_loop().time() + _EXCLUDED_SECONDS
            self._excluded[ref] = max(until, self._excluded.get(ref, until))

    def exclude_faulty(self, ref: HostRef) -> None:
        """Exclude an outvoted incarnation, whatever status it reports."""
        if ref in self._statuses:
            self._excluded[ref] = math.inf

    def readmit(self, ref: HostRef) -> None:
        self._excluded.pop(ref, None)

    async def change(self, seconds: float, seen: int | None = None) -> None:
        """Wait until something may have changed (since `changes` was `seen`), at most `seconds`."""
        if seen is not None and seen != self.changes:
            return
        full = [status.ref for status in self._statuses.values() if status.full]
        news = [*map(self._news_left, full), *map(self._exclusion_left, self._excluded)]
        for status in self._statuses.values():
            news.extend(self._blocked(status).values())
        for left in news:
            if left > 0:
                seconds = min(seconds, left)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)), self._changed:
                await self._changed.wait()

    async def until(self, condition: Callable[[Table], bool], seconds: float) -> Table:
        """The first table for which `condition` holds. Raises `TimeoutError`, `PoolClosed`."""

        def holds() -> bool:
            return self.gone is not None or (self.table is not None and condition(self.table))

        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(holds)
        if self.gone is not None:
            raise self.gone
        assert self.table is not None
        return self.table

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises `PoolClosed` as soon as the supervisor is given up."""
        working = asyncio.ensure_future(work)
        gone = asyncio.create_task(self._until_gone(), name="gone")
        try:
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                assert self.gone is not None
                raise self.gone
            return await working
        finally:
            gone.cancel()
            working.cancel()

    async def _until_gone(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.gone is not None)

    def models(self) -> Mapping[str, ModelOrder]:
        return self.table.models if self.table else {}
