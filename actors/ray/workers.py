"""The only door to Ray: the plain classes of this room as actors, and handles to them.

A handle has the methods of the class it stands for and raises the project's own errors: Ray's
stop here. Nothing else happens in this module; every decision and every side effect is in the
classes that it wraps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tenacity import AsyncRetrying, retry_if_exception, retry_if_exception_type

from actors.browser.host import BrowserHost
from actors.history import HistoryKeeper
from actors.injector import SupervisorFailureInjector, refused
from actors.messages import (
    Examination,
    HostConfig,
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    RunReply,
    RunRequest,
    Wear,
)
from actors.native_host import NativeHost
from actors.ray.metrics import PoolMetrics
from actors.supervisor.hosts import Host
from actors.supervisor.orders import DiskOrders
from actors.supervisor.records import ModelOrder, SupervisorConfig, Table
from actors.supervisor.supervisor import Supervisor
from recovery.breaker import BreakerKey, CircuitState
from recovery.control import BrowserRecord, PoolState, Repair
from recovery.errors import (
    BrowserLost,
    InternalError,
    LaunchFailed,
    PoolClosed,
    PoolError,
    SetupError,
)
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.history.samples import Sample, recovery_samples
from recovery.kinds import Backend, BrowserType, RecoveryLevel
from recovery.log.log import Log, LogInUse, LogUnavailable
from recovery.policies import SUPERVISOR_MAY_TAKE_LONG, SUPERVISOR_RETURNS
from recovery.records import HostRef, HostStatus, NumericId
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec

NAMESPACE = "tabpool"
# How a node says how many browsers it takes: `ray start --resources='{"tabpool_browser": 4}'`.
BROWSER_RESOURCE = "tabpool_browser"
# Ray keeps arguments and results up to this size in the call itself instead of its object
# store. Measured here for 602 KB each way: 5 ms instead of 13 ms.
_INLINE_BYTES = 4 << 20
_REPORT_SECONDS = 5.0  # between two updates of the gauges
_HISTORY_CLOSE_SECONDS = 10.0
_CLOSE_SECONDS = 60.0  # a supervisor that takes longer is killed; leases end the rest
_NATIVE_IDLE_SECONDS = 60.0  # the native runtime is ended when it was not asked for so long
_ANSWER_SECONDS = 10.0  # for what a supervisor can tell at once; one that can't is frozen


# Ray has one connection per process, which several pools of the process share.
_connecting = threading.Lock()
_users = 0
_own = False  # whether this process started the cluster
_made = False  # whether the connection was made here, and not by whoever uses pools


@dataclass(frozen=True)
class RaySession:
    """A connection to Ray. `local`: this process started the cluster and will end it."""

    local: bool
    dashboard_url: str


def connect(address: str | None, dashboard: bool) -> RaySession:
    """Join the Ray cluster at `address`, or start one in this process when it is None.

    A connection that the process already has is used as it is. Raises `SetupError`.
    """
    with _connecting:
        return _connect(address, dashboard)


def _connect(address: str | None, dashboard: bool) -> RaySession:
    global _users, _own, _made
    if ray.is_initialized():
        _users += 1
        return RaySession(_own, "")
    # Both must be set before Ray starts: metrics would be exported twice (as counter and gauge).
    os.environ.setdefault("RAY_EXPORT_COUNTER_AS_GAUGE", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = address is None
    options: dict[str, Any] = {"_system_config": {"max_direct_call_object_size": _INLINE_BYTES}}
    try:
        context = ray.init(
            address="local" if own else address,
            namespace=NAMESPACE,
            include_dashboard=dashboard if own else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(options if own else {}),
        )
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"Ray could not be reached or started ({error}). With `address=` given, check that "
            "the cluster runs (`ray status`) and that RAY_AUTH_TOKEN matches; without it, check "
            "free memory and /dev/shm."
        ) from error
    _users, _own, _made = _users + 1, own, True
    url = context.dashboard_url
    return RaySession(own, f"http://{url}" if url else "")


def disconnect(session: RaySession) -> None:
    """Leave Ray, if it was joined here; the last one out ends a cluster that was started here.

    A process that stayed would be ended with the cluster, without a word.
    """
    global _users, _made
    with _connecting:
        _users = max(_users - 1, 0)
        if (session.local or _made) and not _users and ray.is_initialized():
            ray.shutdown()
            _made = False


def cluster_address() -> str:
    """The address at which other processes can join the Ray cluster of this one."""
    return str(ray.get_runtime_context().gcs_address)


def this_node() -> str:
    """The id of the Ray node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())


def _end_this_actor() -> None:
    """End this worker process now; the actor is not restarted."""
    ray.kill(ray.get_runtime_context().current_actor)


def _was_restarted() -> bool:
    if not ray.is_initialized():
        return False  # not in a worker at all
    context = ray.get_runtime_context()
    return bool(context.get_actor_id()) and bool(context.was_current_actor_reconstructed)


def _call_myself(method: str) -> None:
    getattr(ray.get_runtime_context().current_actor, method).remote()


def _end_unless_claimed(lease_seconds: float) -> threading.Timer:
    """End this worker if its maker dies before it gives the first order: then nobody knows it."""
    timer = threading.Timer(2 * lease_seconds, _end_this_actor)
    timer.daemon = True
    timer.start()
    return timer


# -- the actors -----------------------------------------------------------------------------------


class Browser:
    """A `BrowserHost` in a worker process of its own."""

    def __init__(self, browser_id: str, kind: BrowserType, config: HostConfig) -> None:
        self._id = browser_id
        self._unclaimed = _end_unless_claimed(config.lease_seconds)
        self._host = BrowserHost(browser_id, kind, config, _end_this_actor, node=this_node())

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

    async def examine(self, screenshot: bool) -> Examination:
        return await self._host.examine(screenshot=screenshot)

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

    async def wear(self) -> Wear:
        return self._host.wear()

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
        self._keeper = HistoryKeeper(Path(config.history), Path(config.history_spare))
        self._lease_seconds = 2 * config.lease_seconds
        self._lease = _end_unless_claimed(config.lease_seconds)
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
        self._lease = _end_unless_claimed(self._lease_seconds)

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
        self._lease_seconds = max(2 * lease_seconds, _NATIVE_IDLE_SECONDS)
        self._lease = _end_unless_claimed(self._lease_seconds)

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
            self._lease = _end_unless_claimed(self._lease_seconds)


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
        self._unclaimed = _end_unless_claimed(config.lease_seconds)
        self._again = _was_restarted()
        if self._again:
            _call_myself("resume")  # nobody else may call for a while

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
            _end_this_actor,
            log,
            wall=self._injector.wall,
            term=term,
            state=state,
            orders=DiskOrders(Path(folder) / "models") if folder else None,
            on_repair=self._on_repair,
        )

    async def _new_host(self, browser_id: str, kind: BrowserType, epoch: int) -> Host:
        try:
            name = _browser_name(self._config, browser_id, epoch)
            actor = _start(Browser, name, browser_id, kind, self._hosts, **_where_browsers_go())
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

    async def wake(self, model: str) -> None:
        await (await self._open()).wake(model)

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


def _start(cls: type, name: str, *arguments: Any, max_restarts: int = 0, **options: Any) -> Any:
    """A new actor of `cls`: named, detached, and at nobody's expense."""
    return (
        ray.remote(cls)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=max_restarts,
            num_cpus=0,
            **options,
        )
        .remote(*arguments)
    )


def _where_browsers_go() -> dict[str, Any]:
    """Spread over the nodes; only over those that say they have room, if any does."""
    options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
    if ray.cluster_resources().get(BROWSER_RESOURCE):  # type: ignore[no-untyped-call]
        options["resources"] = {BROWSER_RESOURCE: 1}
    return options


def _on_this_node() -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(this_node(), soft=False)}


# -- handles --------------------------------------------------------------------------------------


async def _result(reference: Any, whose: str) -> Any:
    """Await a call; its own error as it was raised, a dead worker as `BrowserLost`."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, PoolError):
            raise cause from None
        raise InternalError(f"{whose} failed: {error}") from error
    except ActorUnavailableError as error:  # it may come back: that is for the lease to say
        raise BrowserLost(f"{whose} can't be reached now", what="socket_closed") from error
    except RayActorError as error:
        raise BrowserLost(f"the worker of {whose} is gone", what="worker_exited") from error
    except RayError as error:
        raise BrowserLost(f"{whose} could not be reached: {error}", what="socket_closed") from error


@dataclass(frozen=True)
class RayHost:
    """A handle to a `Browser`. Picklable: clients get it from the supervisor's table."""

    actor: Any

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        report: LaunchReport = await _result(self.actor.launch.remote(order), str(order.ref))
        return report

    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId:
        call = self.actor.load.remote(ref, term, spec, backends, known)
        numeric: NumericId = await _result(call, str(ref))
        return numeric

    async def unload(self, ref: HostRef, term: int, model: str) -> None:
        await _result(self.actor.unload.remote(ref, term, model), str(ref))

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        call = self.actor.run.remote(request, tensors)
        reply: RunReply = await _result(call, str(request.ref))
        return reply

    async def next_event(
        self, term: int, seconds: float, after: int, peers: Mapping[BreakerKey, CircuitState]
    ) -> HostEvent | None:
        call = self.actor.next_event.remote(term, seconds, after, peers)
        event: HostEvent | None = await _result(call, "a browser")
        return event

    async def hello(self, term: int) -> HostReport:
        report: HostReport = await _result(self.actor.hello.remote(term), "a browser")
        return report

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None:
        """Break the browser on purpose; see `BrowserHost.inject`."""
        made: Injected | None = await _result(self.actor.inject.remote(ref, fault, gated), str(ref))
        return made

    async def examine(self, *, screenshot: bool = True) -> Examination:
        found: Examination = await _result(self.actor.examine.remote(screenshot), "a browser")
        return found

    async def reconnect(self, ref: HostRef, term: int) -> None:
        await _result(self.actor.reconnect.remote(ref, term), str(ref))

    async def wear(self) -> Wear:
        wear: Wear = await _result(self.actor.wear.remote(), "a browser")
        return wear

    async def drain(self, term: int) -> None:
        await _result(self.actor.drain.remote(term), "a browser")

    async def memory_bytes(self) -> int:
        return int(await _result(self.actor.memory_bytes.remote(), "a browser"))

    async def stop(self) -> None:
        await _result(self.actor.stop.remote(), "a browser")

    def kill(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self.actor)


class RayNative:
    """The pool's native runtime on this node: started when it is first asked."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._name = f"{config.name}: native on {this_node()[:8]} ({config.run})"
        self._lease_seconds = config.lease_seconds

    async def run(
        self, request: RunRequest, spec: ModelSpec, tensors: Mapping[str, Any]
    ) -> RunReply:
        """As `NativeHost.run`. Raises `BrowserLost` if its worker can't be had."""
        try:
            actor = await asyncio.to_thread(
                _start,
                Native,
                self._name,
                self._lease_seconds,
                get_if_exists=True,
                **_on_this_node(),
            )
        except (RayError, ValueError) as error:
            raise BrowserLost(f"Ray could not start the native runtime: {error}") from error
        reply: RunReply = await _result(
            actor.run.remote(request, spec, tensors), "the native runtime"
        )
        return reply

    def end(self) -> None:
        """End it, if it was started here or by another client of the pool."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(ray.get_actor(self._name, namespace=NAMESPACE))


@dataclass(frozen=True)
class RayHistory:
    """A handle to a pool's `History`."""

    actor: Any

    @classmethod
    async def create(cls, config: SupervisorConfig) -> RayHistory:
        """Start it, or find the one that an earlier supervisor has started. Raises `PoolError`."""
        with contextlib.suppress(PoolClosed):
            return cls.find(config)
        try:
            name = _history_name(config)
            actor = _start(History, name, config, max_restarts=-1, **_on_this_node())
        except (RayError, ValueError) as error:
            raise SetupError(f"Ray could not start a worker for the history: {error}") from error
        await _result(actor.open.remote(), "the history")
        return cls(actor)

    @classmethod
    def find(cls, config: SupervisorConfig) -> RayHistory:
        try:
            return cls(ray.get_actor(_history_name(config), namespace=NAMESPACE))
        except ValueError as error:
            raise PoolClosed(f"pool {config.name} keeps no history") from error

    async def add(self, samples: Sequence[Sample]) -> None:
        await _result(self.actor.add.remote(samples), "the history")

    def tell(self, samples: Sequence[Sample]) -> None:
        """As `add`, without an answer."""
        self.actor.add.remote(samples)

    def renew(self) -> None:
        self.actor.renew.remote()

    async def ask(self, question: str, **options: Any) -> Any:
        return await _result(self.actor.ask.remote(question, options), "the history")

    async def pid(self) -> int:
        return int(await _result(self.actor.pid.remote(), "the history"))

    async def query(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = await _result(
            self.actor.query.remote(sql, params), "the history"
        )
        return rows

    async def close(self) -> None:
        with contextlib.suppress(PoolError, TimeoutError):
            async with asyncio.timeout(_HISTORY_CLOSE_SECONDS):
                await _result(self.actor.close.remote(), "the history")
        with contextlib.suppress(RayError):
            ray.kill(self.actor)


@dataclass(frozen=True)
class RaySupervisor:
    """A handle to a pool's supervisor."""

    actor: Any

    @classmethod
    def create(cls, config: SupervisorConfig, hosts: HostConfig) -> RaySupervisor:
        """Start the supervisor of a new pool. Raises `SetupError` if the name is taken."""
        try:
            actor = _start(
                PoolSupervisor,
                _supervisor_name(config.name),
                config,
                hosts,
                max_restarts=-1 if config.folder else 0,
                # Beside its log, which lies on the machine of whoever makes the pool.
                **_on_this_node(),
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
            return cls(ray.get_actor(_supervisor_name(name), namespace=NAMESPACE))
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

    async def wake(self, model: str) -> None:
        await self._call(lambda: self.actor.wake.remote(model), None)

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
        made: Injected = await _result(self.actor.inject.remote(fault), "the supervisor")
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
            return await _result(call, "the supervisor")
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


def _supervisor_name(pool: str) -> str:
    return f"{pool}: supervisor"


def _history_name(config: SupervisorConfig) -> str:
    return f"{config.name}: history ({config.run})"


def _browser_name(config: SupervisorConfig, browser_id: str, epoch: int) -> str:
    """What Ray's dashboard shows, and how a new supervisor finds it again."""
    return f"{config.name}: {browser_id} from epoch {epoch} ({config.run})"
