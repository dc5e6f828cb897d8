"""The supervisor: creates, watches and replaces browsers, and alone may do so.

A thin shell around `recovery.control.decide`: whatever happens becomes an event, the event is
logged and applied, and the instructions that follow are carried out on hosts. It is on no
operation's way. When its process dies, the next incarnation begins a new term: it takes the state
from the log, asks the living what they have, and finishes or repeats what was under way
(`recovery.control.reconcile`). A plain class; hosts, clock and log come in as arguments. It must
not decide anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from actors.messages import (
    Examination,
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    RunReply,
    RunRequest,
    Wear,
)
from recovery.adjustments import adjust
from recovery.breaker import BreakerKey, CircuitState
from recovery.control import (
    ALIVE,
    COMING,
    Body,
    BreakersMoved,
    BrowserFailed,
    BrowserReady,
    BrowserReconnected,
    BrowserRecord,
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
    Reconnect,
    Repair,
    Seen,
    Stop,
    TermBegan,
    Unload,
    decide,
    reconcile,
)
from recovery.errors import (
    BadInput,
    BrowserLost,
    PoolClosed,
    PoolError,
    SetupError,
    StaleTerm,
)
from recovery.failures import Failure, categorize_browser_failure
from recovery.faults import Fault, Injected
from recovery.kinds import Backend, BrowserType, Level, Readiness, RecoveryLevel
from recovery.log.codec import as_logged
from recovery.log.segments import LogUnavailable
from recovery.maintenance import Caretaker
from recovery.placement import Placing
from recovery.plan import StrategyOrder
from recovery.records import HostRef, HostStatus, NumericId
from recovery.resources import BrowserLoad, NodeLoad, ResourceLimits, refuse_load
from recovery.scaling import ScalingLimits
from recovery.supervision import RestartLimit
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec

_WATCH_SECONDS_MAX = 30.0
_FAULTS_KEPT_MAX = 256
_FAULTS_SHOWN = 8
_ASK_SECONDS = 2.0
_STOP_SECONDS = 10.0  # longer than a warden takes; then the worker is killed, and its warden acts
_DRAIN_SECONDS = 300.0  # what is in flight has deadlines of its own
_HELLO_SECONDS = 5.0  # a worker that says nothing to a new supervisor for so long is given up
_UNLOGGED_MAX = 1000  # events that wait for a log that can't be written
_CHECKPOINT_EVENTS = 1000  # that a new supervisor replays at most, or little more


class Host(Protocol):
    """A browser host, in this process or behind Ray.

    Every method raises `BrowserLost` with `what="worker_exited"` when its worker is gone.
    """

    async def launch(self, order: LaunchOrder) -> LaunchReport: ...
    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId: ...
    async def unload(self, ref: HostRef, term: int, model: str) -> None: ...
    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply: ...
    async def next_event(
        self, term: int, seconds: float, after: int, peers: Mapping[BreakerKey, CircuitState]
    ) -> HostEvent | None: ...
    async def hello(self, term: int) -> HostReport: ...
    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None: ...
    async def examine(self, *, screenshot: bool = True) -> Examination: ...
    async def reconnect(self, ref: HostRef, term: int) -> None: ...
    async def drain(self, term: int) -> None: ...
    async def memory_bytes(self) -> int: ...
    async def wear(self) -> Wear: ...
    async def stop(self) -> None: ...
    def kill(self) -> None: ...


HostFactory = Callable[[str, BrowserType, int], Awaitable[Host]]
HostFinder = Callable[[], Awaitable[Mapping[str, Sequence[Host]]]]


class EventLog(Protocol):
    """Where events go before their instructions run. See `recovery.log.log.Log`."""

    @property
    def last_seq(self) -> int: ...
    @property
    def events_since_checkpoint(self) -> int: ...
    async def append(self, event: Event) -> None: ...
    async def checkpoint(self, state: PoolState, seq: int) -> None: ...
    async def close(self) -> None: ...


class MemoryLog:
    """A bounded log in memory. It does not outlive the supervisor."""

    def __init__(self, events_max: int = 10_000) -> None:
        self.events: deque[Event] = deque(maxlen=events_max)
        self.last_seq = 0
        self.events_since_checkpoint = 0

    async def append(self, event: Event) -> None:
        self.events.append(event)
        self.last_seq = event.seq

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        """A state is in memory already."""

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class SupervisorConfig:
    """What a pool's supervisor is told once. `creator` is the client whose lease is the pool's."""

    name: str
    level: Level
    strategy: StrategyOrder
    limit: RestartLimit
    lease_seconds: float
    persistent: bool  # outlive the creator
    browsers_max: int = 32
    creator: str = ""
    run: str = ""  # tells pools of one name apart, one after the other
    folder: str = ""  # of the log and the model orders; empty: in memory only
    checkpoint_seconds: float = 60.0
    resources: ResourceLimits = field(default_factory=ResourceLimits)
    scaling: Mapping[BrowserType, ScalingLimits] = field(default_factory=dict)
    care_seconds: float = 5.0  # between two looks at memory, wear and size; 0: never
    history: str = ""  # file of the samples; empty: none are kept
    history_spare: str = ""  # to be used while another pool writes to that


@dataclass(frozen=True)
class ModelOrder:
    """A model to load. `entry` is the pool's own record of it as plain JSON, for clients.

    `known` is what the native runtime answers to a question that any browser can be asked.
    """

    spec: ModelSpec
    backends: tuple[Backend, ...]
    entry: Mapping[str, Any]
    known: KnownAnswer | None = None
    placing: Placing | None = None  # None: on every browser


class OrderStore(Protocol):
    """Keeps model orders for the next incarnation. Every method may raise `LogUnavailable`."""

    async def save(self, order: ModelOrder) -> None: ...
    async def load(self, name: str, digest: str) -> ModelOrder | None: ...
    async def remove(self, name: str) -> None: ...


class MemoryOrders:
    """Model orders that end with the supervisor."""

    def __init__(self) -> None:
        self._orders: dict[str, ModelOrder] = {}

    async def save(self, order: ModelOrder) -> None:
        self._orders[order.spec.name] = order

    async def load(self, name: str, digest: str) -> ModelOrder | None:
        order = self._orders.get(name)
        return order if order is not None and order.spec.digest == digest else None

    async def remove(self, name: str) -> None:
        self._orders.pop(name, None)


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
    log_trouble: str = ""  # why the log can't be written, or what of it was lost
    faults: tuple[str, ...] = ()  # what the supervisor itself could not carry out, the last of it


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
    ) -> None:
        self._config = config
        self._factory = factory
        self._on_closed = on_closed
        self._log: EventLog = log or MemoryLog()
        self._orders: OrderStore = orders or MemoryOrders()
        self._on_repair = on_repair
        self._wall = wall
        self._clock = clock
        self._term = term
        self._seq = self._log.last_seq
        self._unlogged: deque[Event] = deque()
        self._log_trouble = ""  # why it can't be written now
        self._log_lost = ""  # what of it is lost for good
        self._state = state or PoolState()
        self._order = asyncio.Lock()  # events are logged and applied one at a time
        self._hosts: dict[str, Host] = {}
        self._seen: dict[str, int] = {}  # the last event of each host that was taken in
        self._deaths: dict[str, Failure] = {}  # of workers, for the breakers of the next ones
        self._ports: dict[str, int] = {}
        self._reports: dict[str, LaunchReport] = {}
        self._models: dict[str, ModelOrder] = {}
        self._ordering = asyncio.Lock()  # a load and an unload of one name don't mix
        self._tasks: set[asyncio.Task[None]] = set()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._happening: dict[asyncio.Task[None], None] = {}  # on their way into log and state
        self._turns: dict[str, asyncio.Lock] = {}  # by node: one rebuild at a time
        self._version = term << 32  # a later term has newer tables, however many there were before
        self._changed = asyncio.Condition()
        self._creator_until = 0.0
        self.faults: deque[str] = deque(maxlen=_FAULTS_KEPT_MAX)

    # -- orders from clients ----------------------------------------------------------------------

    async def open(self, browsers: Mapping[str, BrowserType]) -> None:
        """Begin: every browser in `browsers` (id to type) is started."""
        config = self._config
        await self._happen(
            PoolOpened(config.name, config.level, config.strategy, config.limit, self._term)
        )
        await self.want(browsers)
        self._begin_watching()

    async def resume(self, find: HostFinder, trouble: str = "") -> None:
        """Go on with the state that was given: reconcile it with the hosts that `find` finds.

        `trouble` says what of the log was lost, if anything was.
        """
        self._log_lost = trouble
        await self._happen(TermBegan(self._term))
        for name, digest in {**self._state.parked, **self._state.models}.items():
            order = await self._orders.load(name, digest)
            if order is None:
                self.faults.append(f"model {name}: its order is lost; load it again")
                await self._happen(ModelUnwanted(name))
            else:
                self._models[name] = order
        found = await find()
        greetings = [self._greet(name, host) for name, hosts in found.items() for host in hosts]
        seen = self._adopt([greeting for greeting in await asyncio.gather(*greetings) if greeting])
        todo = reconcile(self._state, seen, self._wall())
        for event in todo.events:
            await self._happen(event)
        for order_again in todo.orders:
            self._carry_out(order_again)
        await self._announce()
        self._begin_watching()

    def _begin_watching(self) -> None:
        self._renew(self._config.creator)
        if self._state.closing:
            self._spawn(self._finish_closing, "close")
        elif not self._config.persistent:
            self._spawn(self._lease_loop, "lease")
        if self._config.folder:
            self._spawn(self._checkpoint_loop, "checkpoints")
        if self._config.care_seconds:
            self._spawn(self._care_loop, "care")

    def trouble(self, text: str) -> None:
        """Have the table say what is wrong with the log, as long as this term lasts."""
        self._log_lost = text

    async def _finish_closing(self) -> None:
        await self.close()
        self._on_closed()

    async def _greet(self, browser_id: str, host: Host) -> tuple[str, Host, HostReport] | None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                return browser_id, host, await host.hello(self._term)
        except (PoolError, TimeoutError) as error:
            self.faults.append(f"hello to {browser_id}: {type(error).__name__}: {error}")
            host.kill()
            return None

    def _adopt(self, greetings: Sequence[tuple[str, Host, HostReport]]) -> dict[str, Seen]:
        """Take over the newest worker of each slot; whatever else of this pool lives is ended."""
        seen: dict[str, Seen] = {}
        for browser_id, host, report in sorted(greetings, key=lambda each: -each[2].ref.epoch):
            if browser_id in self._hosts or browser_id not in self._state.browsers:
                host.kill()
                continue
            self._hosts[browser_id] = host
            self._seen[browser_id] = report.seq
            launch = report.launch
            if launch is not None:
                self._ports[browser_id], self._reports[browser_id] = launch.port, launch
            seen[browser_id] = Seen(
                report.ref.epoch,
                report.readiness,
                launch.facts if launch is not None else None,
                report.digests,
                report.models,
                report.cause,
                report.breakers,
            )
            self._watch_from_now(browser_id, host)
        return seen

    async def want(self, browsers: Mapping[str, BrowserType]) -> None:
        """Start these browsers (id to type) as well. One that is there already is no error."""
        self._require_open()
        for browser_id, kind in browsers.items():
            known = self._state.browsers.get(browser_id)
            if known is None or known.phase not in ALIVE:
                await self._happen(BrowserWanted(browser_id, kind), ordered=True)

    async def drain(self, browser_id: str) -> None:
        """Take one browser out of service in order; returns when it has stopped."""
        self._require_open()
        await self._happen(BrowserUnwanted(browser_id), ordered=True)
        await self._until(
            lambda: self._state.browsers[browser_id].phase in (Phase.STOPPED, Phase.GIVEN_UP)
        )

    async def load(self, order: ModelOrder) -> None:
        """Have every browser, or those that `placing` chooses, load a model.

        Returns when each has, or has failed to.
        The table says which is which.
        """
        self._require_open()
        name = order.spec.name
        async with self._ordering:
            self._require_open()
            known = self._state.models.get(name) or self._state.parked.get(name)
            if known is not None and known != order.spec.digest:
                raise BadInput(
                    f"this pool has another model called {name!r}: unload that first, or choose "
                    "another name",
                    expected=known,
                    got=order.spec.digest,
                )
            if known is None:
                await self._refuse_if_full(order)
            await self._orders.save(order)  # also of a known model: its back ends may be others
            before = self._models.get(name)
            self._models[name] = order
            try:
                wanted = _wanted(order)
                await self._happen(wanted, ordered=True)
            except PoolError:
                if before is None:
                    del self._models[name]
                else:
                    self._models[name] = before
                raise
        await self._until(lambda: self._settled(name))

    async def wake(self, model: str) -> None:
        """Have a parked model loaded again, without waiting for it. Any other is left as it is.

        Raises `SetupError` while there is too little memory for it.
        """
        self._require_open()
        async with self._ordering:
            order = self._models.get(model)
            if order is not None and model in self._state.parked:
                await self._refuse_if_full(order)
                await self._happen(_wanted(order), ordered=True)

    async def unload(self, model: str) -> None:
        self._require_open()
        async with self._ordering:
            await self._happen(ModelUnwanted(model), ordered=True)
            self._models.pop(model, None)
            await self._announce()
            await self._orders.remove(model)

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None = None
    ) -> Repair:
        """Recover one browser from `failure` as the pool's strategy says; returns what came of it.

        `start` is the rung to begin with, if not the usual one for the failure. For callers who
        know of a failure that no watch can see. Raises `BadInput`.
        """
        self._require_open()
        record = self._state.browsers.get(browser_id)
        if record is None:
            raise BadInput(f"there is no browser {browser_id!r} in this pool.", got=browser_id)
        # Of one incarnation a failure is told once, however often and by whomever.
        epoch = failure.ref.epoch if failure.ref else record.epoch
        if record.epoch == epoch and record.repair is None and record.phase is Phase.READY:
            await self._happen(BrowserFailed(browser_id, epoch, failure, start=start))
        await self._until(lambda: self._state.browsers[browser_id].repair is None)
        for repair in reversed(self._state.repairs):
            if (repair.browser_id, repair.from_epoch) == (browser_id, epoch):
                return repair
        raise BadInput(f"browser {browser_id!r} is not in service, so there is nothing to do.")

    async def close(self) -> None:
        """Stop every browser; returns when all are gone."""
        if not self._state.closing:
            await self._happen(PoolClosing())
        await self._until(lambda: not any(r.phase in ALIVE for r in self._state.browsers.values()))
        # What failed meanwhile counts as stopped before it is gone, and what happened is logged.
        while under_way := self._stops | self._happening.keys():
            await asyncio.wait(under_way)
        await self._log.close()

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

    @property
    def state(self) -> PoolState:
        """The state as the last event left it."""
        return self._state

    def reports(self) -> Mapping[str, LaunchReport]:
        """How each browser's present incarnation was launched."""
        return dict(self._reports)

    async def memory(self) -> Mapping[str, int]:
        """Resident bytes of each browser's process tree."""
        found: dict[str, int] = {}

        async def ask(browser_id: str, host: Host) -> None:
            with contextlib.suppress(PoolError, TimeoutError):
                async with asyncio.timeout(_ASK_SECONDS):
                    found[browser_id] = await host.memory_bytes()

        await asyncio.gather(*(ask(*each) for each in self._hosts.items()))
        return found

    # -- events -----------------------------------------------------------------------------------

    async def _happen(self, body: Body, *, ordered: bool = False) -> None:
        """Log and apply an event, then carry out what follows from it.

        While the log can't be written, what clients order (`ordered`) is refused with
        `LogUnavailable`; what simply happened is applied all the same, and logged later. Whoever
        asks may be cancelled meanwhile; the event is then taken to its end all the same, because
        half of one would leave the log and the state apart.
        """
        happening = asyncio.create_task(self._take_place(body, ordered), name="event")
        self._tasks.add(happening)
        self._happening[happening] = None
        happening.add_done_callback(self._happened)
        await asyncio.shield(happening)

    def _happened(self, happening: asyncio.Task[None]) -> None:
        self._tasks.discard(happening)
        self._happening.pop(happening, None)
        if not happening.cancelled():
            happening.exception()  # told to whoever asked, if they still listen

    async def _take_place(self, body: Body, ordered: bool) -> None:
        async with self._order:
            # As a replay will see it, so that the live state can't differ from a replayed one.
            event = as_logged(Event(self._seq + 1, self._term, self._wall(), body))
            before = self._state
            state, instructions = decide(before, event)
            await self._append(event, ordered)
            self._seq, self._state = event.seq, state
        for instruction in instructions:
            self._carry_out(instruction)
        await self._announce()
        self._tell_repairs(before, state)
        if self._log.events_since_checkpoint >= _CHECKPOINT_EVENTS:
            await self._checkpoint()

    async def _append(self, event: Event, ordered: bool) -> None:
        try:
            await self._log_what_waits()
            await self._log.append(event)
            self._log_trouble = ""
        except LogUnavailable as error:
            self._log_trouble = str(error)
            if ordered:
                raise
            if len(self._unlogged) >= _UNLOGGED_MAX:
                self._log_lost = f"the log is given up: {error}"
                await self._log.close()
                self._log = MemoryLog()
                self._unlogged.clear()
            else:
                self._unlogged.append(event)

    async def _log_what_waits(self) -> None:
        while self._unlogged:
            await self._log.append(self._unlogged[0])
            self._unlogged.popleft()

    async def _checkpoint(self) -> None:
        async with self._order:
            try:
                await self._log_what_waits()
                if not self._log.events_since_checkpoint:
                    return
                await self._log.checkpoint(self._state, self._seq)
                self._log_trouble = ""
            except LogUnavailable as error:
                self._log_trouble = str(error)

    async def _checkpoint_loop(self) -> None:
        while not self._state.closing:
            await asyncio.sleep(self._config.checkpoint_seconds)
            await self._checkpoint()

    def _tell_repairs(self, before: PoolState, after: PoolState) -> None:
        """Report the repairs that have ended, for the history."""
        if self._on_repair is None or after.repairs is before.repairs:
            return
        for repair in after.repairs:
            if repair not in before.repairs:  # not now: whatever it does, the event goes on
                record = after.browsers[repair.browser_id]
                asyncio.get_running_loop().call_soon(self._on_repair, record, repair)

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
                self._spawn(partial(self._launch, instruction), f"launch {instruction.browser_id}")
            case Reconnect():
                self._spawn(
                    partial(self._reconnect, instruction), f"reconnect {instruction.browser_id}"
                )
            case Load():
                self._spawn(partial(self._load, instruction), f"load {instruction.model}")
            case Unload():
                self._spawn(partial(self._unload, instruction), f"unload {instruction.model}")
            case Drain():
                self._spawn(partial(self._drain, instruction), f"drain {instruction.browser_id}")
            case Stop():
                work = partial(self._stop, instruction.browser_id, instruction.epoch)
                stop = self._spawn(work, f"stop {instruction.browser_id}")
                self._stops.add(stop)
                stop.add_done_callback(self._stops.discard)

    def _spawn(self, work: Callable[[], Awaitable[None]], name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(self._guarded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        """Run a task whose failure must not pass unseen."""
        try:
            await work()
        except PoolError as error:
            self.faults.append(f"{name}: {type(error).__name__}: {error}")

    # -- carrying out -----------------------------------------------------------------------------

    async def _launch(self, order: Launch) -> None:
        await asyncio.sleep(order.delay)
        if not self._is_starting(order):
            return  # stopped while it waited
        if order.epoch == 0:
            await self._launch_now(order)
            return
        report = self._reports.get(order.browser_id)
        # When many die, they are rebuilt one at a time: all at once would only starve each other.
        turn = self._turns.setdefault(report.node if report else "", asyncio.Lock())
        async with turn:
            if self._is_starting(order):
                await self._launch_now(order)

    async def _launch_now(self, order: Launch) -> None:
        browser_id = order.browser_id
        host = self._hosts.get(browser_id)
        try:
            if host is None:
                host = await self._factory(browser_id, order.kind, order.epoch)
                if not self._is_starting(order):
                    host.kill()  # stopped before there was anything to stop
                    return
                self._hosts[browser_id] = host
                self._seen.pop(browser_id, None)
            self._watch_from_now(browser_id, host)  # a launch may take longer than a lease
            report = await host.launch(self._launch_order(order))
        except PoolError as error:
            if isinstance(error, StaleTerm):
                raise
            await self._launch_failed(order, host, error)
            return
        self._ports[browser_id], self._reports[browser_id] = report.port, report
        self._deaths.pop(browser_id, None)
        if self._state.browsers[browser_id].epoch == order.epoch:
            await self._happen(BrowserReady(browser_id, order.epoch, report.facts))

    def _launch_order(self, order: Launch) -> LaunchOrder:
        record = self._state.browsers[order.browser_id]
        adjusted = order.adjusted and adjust(
            order.kind, order.adjusted.model_type, order.adjusted.category
        )
        return LaunchOrder(
            HostRef(order.browser_id, order.epoch),
            self._term,
            self._ports.get(order.browser_id, 0),
            adjusted.arguments if adjusted else (),
            adjusted.preferences if adjusted else {},
            adjusted.environment if adjusted else {},
            warm=order.epoch == 0 and not record.stands_in_for,
            breakers=record.breakers,
            death=self._deaths.get(order.browser_id),
        )

    async def _launch_failed(self, order: Launch, host: Host | None, error: PoolError) -> None:
        browser_id, ref = order.browser_id, HostRef(order.browser_id, order.epoch)
        what = error.fields.get("what", "launch_failed")
        if what == "worker_exited" and self._hosts.get(browser_id) is host:
            self._forget(browser_id)
        context = {"what": what, "ref": ref, "at": self._wall(), "browser": str(order.kind)}
        failure = categorize_browser_failure(error, {**context, **error.fields})
        final = isinstance(error, SetupError)
        await self._happen(BrowserFailed(browser_id, order.epoch, failure, final))

    async def _reconnect(self, order: Reconnect) -> None:
        host = self._hosts.get(order.browser_id)
        ref = HostRef(order.browser_id, order.epoch)
        try:
            if host is None:
                raise BrowserLost(f"the worker of {order.browser_id} is gone", what="worker_exited")
            await host.reconnect(ref, self._term)
        except StaleTerm:
            raise
        except PoolError as error:
            record = self._state.browsers[order.browser_id]
            if record.epoch == order.epoch and record.phase is Phase.RECONNECTING:
                context = {"ref": ref, "at": self._wall(), "browser": str(record.kind)}
                failure = categorize_browser_failure(error, {**context, **error.fields})
                await self._happen(BrowserFailed(order.browser_id, order.epoch, failure))
            return
        await self._happen(BrowserReconnected(order.browser_id, order.epoch))

    def _is_starting(self, order: Launch) -> bool:
        record = self._state.browsers[order.browser_id]
        starting = record.phase is Phase.STARTING and record.epoch == order.epoch
        return starting and not self._state.closing

    def _watch_from_now(self, browser_id: str, host: Host) -> None:
        if browser_id not in self._watches:
            self._watches[browser_id] = self._spawn(
                partial(self._watch_host, browser_id, host), f"watch {browser_id}"
            )

    async def _watch_host(self, browser_id: str, host: Host) -> None:
        """Wait for news of a host, and by asking renew its lease, for as long as it lives."""
        while self._hosts.get(browser_id) is host:
            try:
                lease = self._config.lease_seconds
                seen = self._seen.get(browser_id, 0)
                async with asyncio.timeout(lease):  # an answer is due after a third of it
                    event = await host.next_event(
                        self._term, lease / 3, seen, self._peers(browser_id)
                    )
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
            for record in self._state.browsers.values()
            if record.id != browser_id and record.phase is Phase.READY
            for model in ("", *record.models)
        }

    async def _take_in(self, browser_id: str, event: HostEvent) -> None:
        if event.breakers is not None:
            await self._happen(BreakersMoved(browser_id, event.breakers))
        if event.failure is not None:
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
        self._deaths[browser_id] = failure
        await self._happen(BrowserFailed(browser_id, record.epoch, failure))

    def _forget(self, browser_id: str) -> None:
        self._hosts.pop(browser_id, None)
        self._seen.pop(browser_id, None)
        watch = self._watches.pop(browser_id, None)
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()

    async def _load(self, order: Load) -> None:
        await asyncio.sleep(order.delay)
        host, model = self._hosts.get(order.browser_id), self._models.get(order.model)
        if host is None or model is None:
            return
        ref = HostRef(order.browser_id, order.epoch)
        try:
            numeric = await host.load(ref, self._term, model.spec, model.backends, model.known)
        except StaleTerm:
            raise
        except PoolError as error:
            if isinstance(error, BrowserLost) and error.fields.get("what") != "socket_closed":
                return  # its death is an event of its own; an order that got lost is not
            failure = categorize_browser_failure(
                error, {"what": "load_failed", **error.fields, "ref": ref, "at": self._wall()}
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

    # -- taking care ------------------------------------------------------------------------------

    async def _care_loop(self) -> None:
        caretaker = Caretaker(self._config.resources, self._config.scaling)
        while not self._state.closing:
            await asyncio.sleep(self._config.care_seconds)
            loads, nodes = await self._carried()
            for body in caretaker.look(self._state, loads, nodes, self._clock()):
                try:
                    await self._happen(body, ordered=True)
                except PoolError as error:  # the log is full, say: it can wait
                    self.faults.append(f"care: {type(error).__name__}: {error}")

    async def _carried(self) -> tuple[list[BrowserLoad], list[NodeLoad]]:
        """What the hosts in service, and their nodes, carry. Who does not answer is left out."""
        found: list[Wear] = []

        async def ask(host: Host) -> None:
            with contextlib.suppress(PoolError, TimeoutError):
                async with asyncio.timeout(_ASK_SECONDS):
                    found.append(await host.wear())

        serving = [
            host
            for browser_id, host in self._hosts.items()
            if self._state.browsers[browser_id].phase is Phase.READY
        ]
        await asyncio.gather(*map(ask, serving))
        found.sort(key=lambda wear: wear.browser.browser_id)
        nodes = {wear.node.node: wear.node for wear in found}
        return [wear.browser for wear in found], list(nodes.values())

    async def _refuse_if_full(self, order: ModelOrder) -> None:
        """Raises `SetupError` if the memory of a machine is too small for a model's load."""
        loads, nodes = await self._carried()
        why = refuse_load(self._config.resources, nodes, loads, order.spec.load_peak_bytes)
        if why:
            raise SetupError(f"{order.spec.name} is not loaded: {why}")

    # -- leases and tables ------------------------------------------------------------------------

    def _renew(self, client: str) -> None:
        if client == self._config.creator:
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
            if record.phase in COMING:
                return False
            if record.phase is Phase.READY and record.models.get(model) is ModelPhase.LOADING:
                return False
        return True

    def _table(self) -> Table:
        routes = []
        for record in self._state.browsers.values():
            host = self._hosts.get(record.id)
            report = self._reports.get(record.id)
            if host is None or report is None or record.phase not in _ROUTED:
                continue
            status = HostStatus(
                HostRef(record.id, record.epoch, report.node, report.address),
                record.kind,
                _ROUTED[record.phase],
                queue_max=1,  # a guess until the host itself replies
                models=record.numeric,
                term=self._term,
            )
            routes.append(Route(status, host, report.data_token))
        return Table(
            self._version,
            self._state,
            tuple(routes),
            dict(self._models),
            "; ".join(filter(None, (self._log_lost, self._log_trouble))),
            tuple(self.faults)[-_FAULTS_SHOWN:],
        )


_ROUTED = {
    Phase.READY: Readiness.READY,
    Phase.RECONNECTING: Readiness.STARTING,  # it may be back in a moment, with all it had
    Phase.DRAINING: Readiness.DRAINING,
}


def _wanted(order: ModelOrder) -> ModelWanted:
    return ModelWanted(order.spec.name, order.spec.digest, order.spec.type, order.placing)
