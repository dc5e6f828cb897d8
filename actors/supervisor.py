"""The supervisor: creates, watches and replaces browsers, and alone may do so.

A thin shell around `recovery.pool_state`: whatever happens becomes an event, the event is logged
and applied, and the instructions that follow are carried out on hosts. It is on no operation's
way. A plain class; hosts, clock and log come in as arguments. It must not decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.messages import HostEvent, LaunchOrder, LaunchReport, RunReply, RunRequest
from recovery.errors import (
    BadInput,
    BrowserError,
    BrowserLost,
    PoolClosed,
    PoolError,
    SetupError,
    StaleTerm,
)
from recovery.failures import categorize_browser_failure
from recovery.kinds import Backend, BrowserType, Level, Readiness, Strategy
from recovery.pool_state import (
    ALIVE,
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserStopped,
    BrowserUnwanted,
    BrowserWanted,
    Drain,
    Event,
    Instruction,
    Launch,
    Load,
    ModelFailed,
    ModelLoaded,
    ModelPhase,
    ModelUnwanted,
    ModelWanted,
    Phase,
    PoolClosing,
    PoolOpened,
    PoolState,
    Stop,
    Unload,
    decide,
)
from recovery.records import HostRef, HostStatus, NumericId
from recovery.supervision import RestartLimit
from sharding.signature import ModelSpec

_WATCH_SECONDS_MAX = 30.0
_FAILURES_KEPT_MAX = 256
_ASK_SECONDS = 2.0
_STOP_SECONDS = 10.0  # longer than a warden takes; then the worker is killed, and its warden acts
_DRAIN_SECONDS = 300.0  # what is in flight has deadlines of its own


class Host(Protocol):
    """A browser host, in this process or behind Ray.

    Every method raises `BrowserLost` with `what="worker_exited"` when its worker is gone.
    """

    async def launch(self, order: LaunchOrder) -> LaunchReport: ...
    async def load(
        self, ref: HostRef, term: int, spec: ModelSpec, backends: tuple[Backend, ...]
    ) -> NumericId: ...
    async def unload(self, ref: HostRef, term: int, model: str) -> None: ...
    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply: ...
    async def next_event(self, term: int, seconds: float) -> HostEvent | None: ...
    async def drain(self, term: int) -> None: ...
    async def memory_bytes(self) -> int: ...
    async def stop(self) -> None: ...
    def kill(self) -> None: ...


HostFactory = Callable[[str, BrowserType, int], Awaitable[Host]]


class EventLog(Protocol):
    """Where events go before their instructions run."""

    async def append(self, event: Event) -> None: ...


class MemoryLog:
    """A bounded log in memory. It does not outlive the supervisor."""

    def __init__(self, events_max: int = 10_000) -> None:
        self.events: deque[Event] = deque(maxlen=events_max)

    async def append(self, event: Event) -> None:
        self.events.append(event)


@dataclass(frozen=True)
class SupervisorConfig:
    name: str
    level: Level
    strategy: Strategy
    limit: RestartLimit
    lease_seconds: float
    persistent: bool  # outlive the creator
    browsers_max: int = 32


@dataclass(frozen=True)
class ModelOrder:
    """A model to load. `entry` is the pool's own record of it, handed to clients as it is."""

    spec: ModelSpec
    backends: tuple[Backend, ...]
    entry: Any


@dataclass(frozen=True)
class Route:
    """A host that clients may ask."""

    status: HostStatus
    host: Host
    data_token: str = field(default="", repr=False)  # of the data plane at `status.ref.address`


@dataclass(frozen=True)
class Table:
    """What clients know of the pool. A newer one has a higher version."""

    version: int
    state: PoolState
    routes: tuple[Route, ...]
    models: Mapping[str, ModelOrder] = field(default_factory=dict)


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
    ) -> None:
        self._config = config
        self._factory = factory
        self._on_closed = on_closed
        self._log = log or MemoryLog()
        self._wall = wall
        self._clock = clock
        self._term = term
        self._seq = 0
        self._state = PoolState()
        self._order = asyncio.Lock()  # events are logged and applied one at a time
        self._hosts: dict[str, Host] = {}
        self._ports: dict[str, int] = {}
        self._reports: dict[str, LaunchReport] = {}
        self._models: dict[str, ModelOrder] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._version = 0
        self._changed = asyncio.Condition()
        self._creator = ""
        self._creator_until = 0.0
        self.faults: deque[str] = deque(maxlen=_FAILURES_KEPT_MAX)

    # -- orders from clients ----------------------------------------------------------------------

    async def open(self, creator: str, browsers: Mapping[str, BrowserType]) -> None:
        """Begin: every browser in `browsers` (id to type) is started."""
        config = self._config
        self._creator = creator
        self._renew(creator)
        await self._happen(
            PoolOpened(config.name, config.level, config.strategy, config.limit, self._term)
        )
        await self.want(browsers)
        if not config.persistent:
            self._spawn(self._lease_loop(), "lease")

    async def want(self, browsers: Mapping[str, BrowserType]) -> None:
        """Start these browsers (id to type) as well."""
        self._require_open()
        for browser_id, kind in browsers.items():
            await self._happen(BrowserWanted(browser_id, kind))

    async def drain(self, browser_id: str) -> None:
        """Take one browser out of service in order; returns when it has stopped."""
        self._require_open()
        await self._happen(BrowserUnwanted(browser_id))
        await self._until(
            lambda: self._state.browsers[browser_id].phase in (Phase.STOPPED, Phase.GIVEN_UP)
        )

    async def load(self, order: ModelOrder) -> None:
        """Have every browser load a model; returns when each has, or has failed to.

        The table says which is which.
        """
        self._require_open()
        name = order.spec.name
        known = self._state.models.get(name)
        if known is not None and known != order.spec.digest:
            raise BadInput(
                f"this pool has another model called {name!r}: unload that first, or choose "
                "another name",
                expected=known,
                got=order.spec.digest,
            )
        self._models[name] = order
        await self._happen(ModelWanted(name, order.spec.digest))
        await self._until(lambda: self._settled(name))

    async def unload(self, model: str) -> None:
        self._require_open()
        await self._happen(ModelUnwanted(model))
        self._models.pop(model, None)

    async def close(self) -> None:
        """Stop every browser; returns when all are gone."""
        if not self._state.closing:
            await self._happen(PoolClosing())
        await self._until(lambda: not any(r.phase in ALIVE for r in self._state.browsers.values()))
        while self._stops:  # what failed meanwhile counts as stopped before it is gone
            await asyncio.wait(self._stops)

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        """The table as soon as it is newer than `version`, or after `seconds` in any case.

        Asking renews the client's lease.
        """
        self._renew(client)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, _WATCH_SECONDS_MAX)):
                await self._until(lambda: self._version > version)
        self._renew(client)
        return self._table()

    def reports(self) -> Mapping[str, LaunchReport]:
        """How each browser's present incarnation was launched."""
        return dict(self._reports)

    async def memory(self) -> Mapping[str, int]:
        """Resident bytes of each browser's process tree."""
        found = {}
        for browser_id, host in list(self._hosts.items()):
            with contextlib.suppress(BrowserError, TimeoutError):
                async with asyncio.timeout(_ASK_SECONDS):
                    found[browser_id] = await host.memory_bytes()
        return found

    # -- events -----------------------------------------------------------------------------------

    async def _happen(self, body: Body) -> None:
        """Log and apply an event, then carry out what follows from it."""
        async with self._order:
            event = Event(self._seq + 1, self._term, self._wall(), body)
            state, instructions = decide(self._state, event)
            await self._log.append(event)
            self._seq, self._state = event.seq, state
        for instruction in instructions:
            self._carry_out(instruction)
        await self._announce()

    async def _announce(self) -> None:
        async with self._changed:
            self._version += 1
            self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Launch():
                self._spawn(self._launch(instruction), f"launch {instruction.browser_id}")
            case Load():
                self._spawn(self._load(instruction), f"load {instruction.model}")
            case Unload():
                self._spawn(self._unload(instruction), f"unload {instruction.model}")
            case Drain():
                self._spawn(self._drain(instruction), f"drain {instruction.browser_id}")
            case Stop():
                work = self._stop(instruction.browser_id, instruction.epoch)
                stop = self._spawn(work, f"stop {instruction.browser_id}")
                self._stops.add(stop)
                stop.add_done_callback(self._stops.discard)

    def _spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(self._guarded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Awaitable[None], name: str) -> None:
        """Run a task whose failure must not pass unseen."""
        try:
            await work
        except PoolError as error:
            self.faults.append(f"{name}: {type(error).__name__}: {error}")

    # -- carrying out -----------------------------------------------------------------------------

    async def _launch(self, order: Launch) -> None:
        browser_id = order.browser_id
        await asyncio.sleep(order.delay)
        ref = HostRef(browser_id, order.epoch)
        if not self._is_starting(order):
            return  # stopped while it waited
        host = self._hosts.get(browser_id)
        try:
            if host is None:
                host = await self._factory(browser_id, order.kind, order.epoch)
                if not self._is_starting(order):
                    host.kill()  # stopped before there was anything to stop
                    return
                self._hosts[browser_id] = host
            self._watch_from_now(browser_id, host)  # a launch may take longer than a lease
            port = self._ports.get(browser_id, 0)
            report = await host.launch(LaunchOrder(ref, self._term, port, warm=order.epoch == 0))
        except PoolError as error:
            if isinstance(error, StaleTerm):
                raise
            what = error.fields.get("what", "launch_failed")
            if what == "worker_exited" and self._hosts.get(browser_id) is host:
                self._forget(browser_id)
            failure = categorize_browser_failure(
                error, {"what": what, "ref": ref, "at": self._wall(), **error.fields}
            )
            final = isinstance(error, SetupError)
            await self._happen(BrowserFailed(browser_id, order.epoch, failure, final))
            return
        self._ports[browser_id], self._reports[browser_id] = report.port, report
        await self._happen(BrowserReady(browser_id, order.epoch, report.facts))

    def _is_starting(self, order: Launch) -> bool:
        record = self._state.browsers[order.browser_id]
        starting = record.phase is Phase.STARTING and record.epoch == order.epoch
        return starting and not self._state.closing

    def _watch_from_now(self, browser_id: str, host: Host) -> None:
        if browser_id not in self._watches:
            self._watches[browser_id] = self._spawn(
                self._watch_host(browser_id, host), f"watch {browser_id}"
            )

    async def _watch_host(self, browser_id: str, host: Host) -> None:
        """Wait for news of a host, and by asking renew its lease, for as long as it lives."""
        while self._hosts.get(browser_id) is host:
            try:
                lease = self._config.lease_seconds
                async with asyncio.timeout(lease):  # an answer is due after a third of it
                    event = await host.next_event(self._term, lease / 3)
            except StaleTerm:
                raise
            except TimeoutError:
                frozen = BrowserLost(f"the worker of {browser_id} does not answer")
                await self._worker_gone(browser_id, host, frozen)
                return
            except PoolError as error:  # also a worker that answers nonsense is of no more use
                await self._worker_gone(browser_id, host, error)
                return
            if event is not None:
                await self._happen(BrowserFailed(browser_id, event.ref.epoch, event.failure))

    async def _worker_gone(self, browser_id: str, host: Host, error: PoolError) -> None:
        if self._hosts.get(browser_id) is not host:
            return
        record = self._state.browsers[browser_id]
        self._forget(browser_id)
        host.kill()
        context = {
            "what": "worker_exited",
            "ref": HostRef(browser_id, record.epoch),
            "at": self._wall(),
            "browser": str(record.kind),
        }
        failure = categorize_browser_failure(error, context)
        await self._happen(BrowserFailed(browser_id, record.epoch, failure))

    def _forget(self, browser_id: str) -> None:
        self._hosts.pop(browser_id, None)
        watch = self._watches.pop(browser_id, None)
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()

    async def _load(self, order: Load) -> None:
        host, model = self._hosts.get(order.browser_id), self._models.get(order.model)
        if host is None or model is None:
            return
        ref = HostRef(order.browser_id, order.epoch)
        try:
            numeric = await host.load(ref, self._term, model.spec, model.backends)
        except StaleTerm:
            raise
        except PoolError as error:
            if isinstance(error, BrowserLost) and error.fields.get("what") != "socket_closed":
                return  # its death is an event of its own; an order that got lost is not
            failure = categorize_browser_failure(
                error, {"what": "load_failed", "ref": ref, "at": self._wall()}
            )
            await self._happen(ModelFailed(ref.browser_id, ref.epoch, order.model, failure))
            return
        await self._happen(ModelLoaded(ref.browser_id, ref.epoch, order.model, numeric))

    async def _unload(self, order: Unload) -> None:
        host = self._hosts.get(order.browser_id)
        if host is not None:
            await host.unload(HostRef(order.browser_id, order.epoch), self._term, order.model)

    async def _drain(self, order: Drain) -> None:
        host = self._hosts.get(order.browser_id)
        if host is not None:
            with contextlib.suppress(PoolError, TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    await host.drain(self._term)
        await self._stop(order.browser_id, order.epoch)

    async def _stop(self, browser_id: str, epoch: int) -> None:
        if self._state.browsers[browser_id].epoch != epoch:
            return  # its slot was started anew meanwhile
        host = self._hosts.get(browser_id)
        self._forget(browser_id)
        if host is not None:
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await host.stop()
            except (PoolError, TimeoutError) as error:
                self.faults.append(f"stop {browser_id}: {type(error).__name__}: {error}")
            finally:
                host.kill()
        record = self._state.browsers[browser_id]
        if record.epoch == epoch and record.phase not in (Phase.STOPPED, Phase.GIVEN_UP):
            await self._happen(BrowserStopped(browser_id))

    # -- leases and tables ------------------------------------------------------------------------

    def _renew(self, client: str) -> None:
        if client == self._creator:
            self._creator_until = self._clock() + self._config.lease_seconds

    async def _lease_loop(self) -> None:
        # Renewed far more often than it ends, so look only when it might have.
        while (left := self._creator_until - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        await self.close()
        self._on_closed()

    def _require_open(self) -> None:
        if self._state.closing:
            raise PoolClosed(f"pool {self._config.name} is closing")

    def _settled(self, model: str) -> bool:
        """Whether every browser that may still serve `model` has loaded it, or has failed to."""
        for record in self._state.browsers.values():
            if record.phase is Phase.STARTING:
                return False
            if record.phase is Phase.READY and record.models.get(model) is ModelPhase.LOADING:
                return False
        return True

    def _table(self) -> Table:
        routes = []
        for record in self._state.browsers.values():
            host = self._hosts.get(record.id)
            if host is None or record.phase not in (Phase.READY, Phase.DRAINING):
                continue
            ready = record.phase is Phase.READY
            report = self._reports[record.id]
            status = HostStatus(
                HostRef(record.id, record.epoch, report.node, report.address),
                record.kind,
                Readiness.READY if ready else Readiness.DRAINING,
                queue_max=1,  # a guess until the host itself replies
                models=record.numeric,
                term=self._term,
            )
            routes.append(Route(status, host, report.data_token))
        return Table(self._version, self._state, tuple(routes), dict(self._models))
