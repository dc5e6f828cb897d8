"""Stand-ins for browsers, clocks and logs, with faults by script: by count, by gate, by call.

Nothing here sleeps for luck. A `FakeHost` behaves as `actors.browser.host.BrowserHost` does towards
its supervisor and its clients, without a browser; `in_virtual_time` runs a test on a loop whose
clock jumps to the next timer, so that seconds cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from actors.messages import (
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    RunReply,
    RunRequest,
    Usage,
)
from actors.supervisor.journal import MemoryLog
from actors.supervisor.records import ModelOrder
from recovery.breaker import BreakerKey, CircuitState
from recovery.control import Event, PoolState
from recovery.errors import BrowserLost, LaunchFailed, PageError, PoolError, StaleTerm
from recovery.failures import Category, Failure, Scope, Severity, categorize_browser_failure
from recovery.faults import Fault
from recovery.kinds import Backend, BrowserType, ModelType, Readiness
from recovery.log.codec import as_logged
from recovery.log.segments import LogUnavailable
from recovery.records import BrowserFacts, HostRef, HostStatus, NumericId
from recovery.resources import BrowserLoad, NodeLoad
from recovery.voting import Tolerance
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec, TensorSpec

FACTS = BrowserFacts(product="Fake", version="1")
NUMERIC = NumericId("fake-ort", Backend.WASM)


def spec(name: str = "m", digest: str = "d") -> ModelSpec:
    """A model of one float input and output, in no file."""
    tensor = TensorSpec("x", "float32", (None,))
    return ModelSpec(name, digest, ModelType.UNKNOWN, (tensor,), (tensor,), (), 0, Tolerance(), 17)


def order(name: str = "m", digest: str = "d") -> ModelOrder:
    return ModelOrder(spec(name, digest), (Backend.WASM,), entry={"config": {"of": name}})


def failure(category: Category = Category.CRASH, **fields: Any) -> Failure:
    """A failure of a browser, unless said otherwise."""
    fields = {"message": "it broke", "severity": Severity.SEVERE, "scope": Scope.BROWSER, **fields}
    return Failure(category, **fields)


def host_status(
    browser_id: str = "chrome-0",
    epoch: int = 0,
    *,
    queue: int = 0,
    queue_max: int = 4,
    models: Iterable[str] = ("m",),
    readiness: Readiness = Readiness.READY,
) -> HostStatus:
    return HostStatus(
        HostRef(browser_id, epoch),
        BrowserType.CHROME,
        readiness,
        queue,
        queue_max,
        dict.fromkeys(models, NUMERIC),
    )


class FakeHost:
    """A worker with a browser in it, in this process.

    Calls are counted from 0, over all incarnations: `fail_launch={0, 1}` fails the first two
    launches with `launch_error`, `fail_load` the loads, `crash_on_run` kills the browser in the
    middle of these operations, `die_on_run` the whole worker, `lie_on_run` answers them quite
    wrong, `flip_on_run` wrong by the lowest bit of one float32. Operations wait for `run_gate`,
    launches for `launch_gate`, loads for `load_gate`; all are open unless a test closes them.
    """

    def __init__(
        self,
        browser_id: str = "chrome-0",
        kind: BrowserType = BrowserType.CHROME,
        *,
        fail_launch: Iterable[int] = (),
        fail_load: Iterable[int] = (),
        crash_on_run: Iterable[int] = (),
        die_on_run: Iterable[int] = (),
        error_on_run: Iterable[int] = (),
        lie_on_run: Iterable[int] = (),
        flip_on_run: Iterable[int] = (),
        launch_error: PoolError | None = None,
        load_error: PoolError | None = None,
        queue_max: int = 4,
    ) -> None:
        self.kind = kind
        self.fail_launch, self.fail_load = set(fail_launch), set(fail_load)
        self.crash_on_run, self.die_on_run = set(crash_on_run), set(die_on_run)
        self.error_on_run = set(error_on_run)
        self.lie_on_run, self.flip_on_run = set(lie_on_run), set(flip_on_run)
        self.launch_error = launch_error or LaunchFailed("it did not start")
        self.load_error = load_error or PageError("it did not load", what="load_failed")
        self.queue_max = queue_max
        self.ref = HostRef(browser_id, -1)
        self.term = 0
        self.readiness = Readiness.STARTING
        self.models: dict[str, NumericId] = {}
        self.launches: list[LaunchOrder] = []
        self.loads: list[tuple[HostRef, str]] = []
        self.unloads: list[tuple[HostRef, str]] = []
        self.runs = 0
        self.in_flight: list[str] = []
        self.answered: Counter[str] = Counter()
        self.run_gate, self.launch_gate, self.load_gate = _open_gate(), _open_gate(), _open_gate()
        self.drained = self.stopped = self.killed = False
        self._browser_over: asyncio.Future[Failure] | None = None
        self._worker_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events: list[HostEvent] = []
        self._news = asyncio.Event()
        self._launching: asyncio.Task[LaunchReport] | None = None
        self._report: LaunchReport | None = None
        self._cause: Failure | None = None
        self.digests: dict[str, str] = {}
        self.in_touch = _open_gate()
        self._lost: Failure | None = None
        self.reconnects = 0
        self.usage_said: dict[str, Any] = {}  # what `wear` says, where it is not new
        self.available_bytes = 1 << 33

    # -- faults on demand -------------------------------------------------------------------------

    def crash(self, what: str = "browser_exited") -> None:
        """The browser dies; the worker lives and tells."""
        assert self._browser_over is not None
        cause = categorize_browser_failure("it died", {"what": what, "ref": self.ref})
        self.readiness, self._cause = Readiness.DEAD, cause
        self._browser_over.set_result(cause)
        self._tell(failure=cause)

    def drop_sockets(self) -> None:
        """The page is out of touch until `in_touch` is set again."""
        self.in_touch.clear()
        lost = categorize_browser_failure(
            "out of touch", {"what": "socket_closed", "ref": self.ref}
        )
        self._lost = lost
        self._tell(failure=lost)

    def _tell(self, **news: Any) -> None:
        self._events.append(HostEvent(self.ref, len(self._events) + 1, **news))
        self._news.set()

    def die(self) -> None:
        """The worker dies, and whoever waits for it hears so."""
        if not self._worker_over.done():
            self._worker_over.set_result(None)

    # -- the protocol -----------------------------------------------------------------------------

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        self._accept(order.term)
        if self._launching is None or order.ref != self.ref:
            if order.ref.epoch <= self.ref.epoch:
                raise StaleTerm(f"{order.ref} was ordered, but {self.ref} has been here")
            self.launches.append(order)
            self.ref, self.readiness, self.models = order.ref, Readiness.STARTING, {}
            self.digests, self._cause, self._report = {}, None, None
            self.in_touch.set()
            self._browser_over = asyncio.get_running_loop().create_future()
            self._launching = asyncio.ensure_future(self._launch(len(self.launches) - 1, order))
        # As in a worker: who ordered it may go away, and the launch goes on.
        return await self._unless_dead(_joined(self._launching))

    async def _launch(self, number: int, order: LaunchOrder) -> LaunchReport:
        await self.launch_gate.wait()
        if number in self.fail_launch:
            self.readiness = Readiness.DEAD
            raise self.launch_error
        self.readiness = Readiness.READY
        self._report = LaunchReport(FACTS, order.port or 4000, {}, {}, "")
        return self._report

    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None = None,
    ) -> NumericId:
        self._accept(term)
        self._require(ref)
        number = len(self.loads)
        self.loads.append((ref, spec.name))
        await self._unless_dead(self.load_gate.wait())
        if number in self.fail_load:
            raise self.load_error
        self._require(ref)
        self.models[spec.name] = NUMERIC
        self.digests[spec.name] = spec.digest
        return NUMERIC

    async def unload(self, ref: HostRef, term: int, model: str) -> None:
        self._accept(term)
        self._require(ref)
        self.unloads.append((ref, model))
        self.models.pop(model, None)
        self.digests.pop(model, None)

    async def usage(self) -> Usage:
        load = BrowserLoad(
            self.ref.browser_id,
            self.ref.epoch,
            "node",
            age_seconds=0.0,
            served=self.runs,
            memory_bytes=1 << 20,
            queue=len(self.in_flight),
            idle_seconds=0.0,
            ready=self.readiness is Readiness.READY,
            models=dict.fromkeys(self.models, 0.0),
        )
        return Usage(
            replace(load, **self.usage_said), NodeLoad("node", 1 << 34, self.available_bytes)
        )

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> None:
        self._require(ref)
        self.lie_on_run |= set(range(self.runs, self.runs + fault["times"]))

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        if self._worker_over.done():
            raise _worker_gone()
        if request.ref != self.ref or self.readiness is not Readiness.READY:
            return RunReply(self.status(), failure=self._failure("replaced", request))
        if request.model not in self.models:
            return RunReply(self.status(), failure=self._failure("not_loaded", request))
        if len(self.in_flight) >= self.queue_max:
            return RunReply(self.status(), busy=True)
        if not self.in_touch.is_set():
            return RunReply(self.status(), failure=self._failure("socket_closed", request))
        number, self.runs = self.runs, self.runs + 1
        self.in_flight.append(request.op_id)
        try:
            reply = await self._answer(number, request, tensors)
        finally:
            self.in_flight.remove(request.op_id)
        return replace(reply, status=self.status())

    async def _answer(
        self, number: int, request: RunRequest, tensors: Mapping[str, Any]
    ) -> RunReply:
        browser_over = self._browser_over
        assert browser_over is not None
        if number in self.die_on_run:
            self.die()
        if number in self.crash_on_run:
            self.crash()
        gate = asyncio.ensure_future(self._unless_dead(self.run_gate.wait()))
        await asyncio.wait(
            {gate, browser_over}, timeout=request.seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if browser_over.done():
            gate.cancel()
            return RunReply(self.status(), failure=browser_over.result())
        if not gate.done():
            gate.cancel()
            return RunReply(self.status(), failure=self._failure("deadline_passed", request))
        await gate
        if number in self.error_on_run:
            return RunReply(self.status(), failure=self._failure("run_failed", request))
        self.answered[request.op_id] += 1
        outputs = {name: array + 1 for name, array in tensors.items()}
        if number in self.lie_on_run:
            outputs = {name: array + 1000 for name, array in outputs.items()}
        if number in self.flip_on_run:
            for array in outputs.values():
                array.view(np.uint32)[0] ^= 1
        return RunReply(self.status(), outputs=outputs, answered=True, backend=Backend.WASM)

    async def next_event(
        self, term: int, seconds: float, after: int, peers: Mapping[BreakerKey, CircuitState]
    ) -> HostEvent | None:
        self._accept(term)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self._events) <= after:
                    self._news.clear()
                    await self._unless_dead(self._news.wait())
                return self._events[after]
        return None

    async def hello(self, term: int) -> HostReport:
        self._accept(term)
        ready = self.readiness is Readiness.READY
        return HostReport(
            self.ref,
            self.readiness,
            len(self._events),
            self._report if ready else None,
            dict(self.models),
            dict(self.digests),
            self._cause if self.in_touch.is_set() else self._lost,
        )

    async def reconnect(self, ref: HostRef, term: int) -> None:
        self._accept(term)
        self._require(ref)
        self.reconnects += 1
        try:
            async with asyncio.timeout(2.0):
                await self._unless_dead(self.in_touch.wait())
        except TimeoutError:
            raise BrowserLost("the page is out of touch", what="socket_closed") from None

    async def drain(self, term: int) -> None:
        self._accept(term)
        self.readiness, self.drained = Readiness.DRAINING, True
        await self._unless_dead(self.run_gate.wait())

    async def memory_bytes(self) -> int:
        if self._worker_over.done():
            raise _worker_gone()
        return 1 << 20

    async def stop(self) -> None:
        if self._worker_over.done():
            raise _worker_gone()
        self.stopped = True
        self.readiness = Readiness.DEAD

    def kill(self) -> None:
        self.killed = True
        self.die()

    # -- small things -----------------------------------------------------------------------------

    def status(self) -> HostStatus:
        return HostStatus(
            self.ref,
            self.kind,
            self.readiness,
            len(self.in_flight),
            self.queue_max,
            dict(self.models),
            served=self.answered.total(),
            term=self.term,
        )

    async def _unless_dead(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await `work`; raises `BrowserLost` as soon as the worker is dead."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._worker_over}, return_when=asyncio.FIRST_COMPLETED)
            if self._worker_over.done():
                raise _worker_gone()
            return task.result()
        finally:
            task.cancel()

    def _accept(self, term: int) -> None:
        if self._worker_over.done():
            raise _worker_gone()
        if term < self.term:
            raise StaleTerm(f"term {term} was superseded by {self.term}")
        self.term = term

    def _require(self, ref: HostRef) -> None:
        if ref != self.ref or self.readiness is Readiness.DEAD:
            raise BrowserLost(f"{ref} is not here")

    def _failure(self, what: str, request: RunRequest) -> Failure:
        message = what.replace("_", " ")
        context = {"what": what, "ref": self.ref, "op_id": request.op_id}
        return categorize_browser_failure(message, context)


class FakeHosts:
    """A host factory. `scripts` holds, by browser id, the faults of each host made for it in
    turn; a host beyond its scripts has none. Every host is kept in `made`."""

    def __init__(self, **scripts: Iterable[Mapping[str, Any]]) -> None:
        self._scripts = {name.replace("_", "-"): list(turns) for name, turns in scripts.items()}
        self.asked_for: list[str] = []
        self.made: dict[str, list[FakeHost]] = {}
        self.gate = _open_gate()

    async def __call__(self, browser_id: str, kind: BrowserType, epoch: int) -> FakeHost:
        self.asked_for.append(browser_id)
        await self.gate.wait()
        turns = self._scripts.get(browser_id, [])
        script = turns.pop(0) if turns else {}
        host = FakeHost(browser_id, kind, **script)
        self.made.setdefault(browser_id, []).append(host)
        return host

    async def living(self) -> dict[str, list[FakeHost]]:
        """As the workers that Ray still knows."""
        return {
            name: [host for host in hosts if not host._worker_over.done()]
            for name, hosts in self.made.items()
        }

    def __getitem__(self, browser_id: str) -> FakeHost:
        """The newest host of a browser."""
        return self.made[browser_id][-1]

    @property
    def all(self) -> list[FakeHost]:
        return [host for hosts in self.made.values() for host in hosts]

    def answers(self) -> Counter[str]:
        """How often each operation was answered, over all hosts."""
        return sum((host.answered for host in self.all), Counter[str]())


class GatedLog(MemoryLog):
    """An event log that a test can hold up: `append` returns when `gate` is open. While `full`,
    nothing can be written."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _open_gate()
        self.full = False
        self.closed = False
        self.checkpoints: list[tuple[int, PoolState]] = []

    async def append(self, event: Event) -> None:
        await self.gate.wait()
        if self.full:
            raise LogUnavailable("the disk is full")
        assert event.seq == self.last_seq + 1
        await super().append(as_logged(event))
        self.events_since_checkpoint += 1

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        if self.full:
            raise LogUnavailable("the disk is full")
        assert seq == self.last_seq
        self.checkpoints.append((seq, state))
        self.events_since_checkpoint = 0

    async def close(self) -> None:
        self.closed = True


async def eventually(condition: Callable[[], bool]) -> None:
    """Let the loop turn until `condition` holds. It must need no time, only turns."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come about")


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for what happens outside of the loop: a process, a socket."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # nobody could set an event
            await asyncio.sleep(0.002)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose time stands still while anything can run, and then jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual = 0.0

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        due = [timer.when() for timer in self._scheduled if not timer.cancelled()]
        if not self._ready and due:
            self._virtual = max(self._virtual, min(due))
        super()._run_once()


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    """Run an async test on a `VirtualTimeLoop`."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(test(*args, **kwargs))

    return run


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


async def _joined(task: asyncio.Task[LaunchReport]) -> LaunchReport:
    return await asyncio.shield(task)


def _worker_gone() -> BrowserLost:
    return BrowserLost("the worker is gone", what="worker_exited")
