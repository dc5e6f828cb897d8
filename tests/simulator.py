"""The whole control plane in one process, on a clock that jumps, under faults drawn from a seed.

Real are the supervisor, each client's routing and the answering loop; browsers are fake, the log is
in memory and outlives its supervisor. After every event that is applied, and again at the end, what
must always hold is checked. A seed says everything: the same one gives the same story, and

    .venv/bin/python -m tests.simulator 17 --show

tells the story of seed 17 again. This module must not wait for real time or touch anything real.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import pool.answering
import pool.routing
from actors.messages import LaunchOrder, LaunchReport, RunReply, RunRequest
from actors.supervisor.changes import Changes
from actors.supervisor.orders import MemoryOrders
from actors.supervisor.records import SupervisorConfig, Table
from actors.supervisor.supervisor import Supervisor
from actors.supervisor.tasks import Tasks
from pool.answering import Answering, Question, Rules
from pool.results import Result
from pool.routing import Routing
from recovery.adjustments import adjust
from recovery.answering import _reported
from recovery.control import (
    ALIVE,
    COMING,
    DEAD_MAX,
    HISTORY_MAX,
    TALLIES_MAX,
    BrowserRecord,
    Event,
    ModelPhase,
    Phase,
    PoolState,
    apply,
)
from recovery.errors import BrowserLost, LaunchFailed
from recovery.failures import Failure
from recovery.faults import CLOCK_STEP_SECONDS, FaultKind, Intensity, Schedule, read_schedule
from recovery.faults import Clock as ScheduleClock
from recovery.kinds import BrowserType, Level, Readiness, RecoveryLevel, Strategy
from recovery.levels import BROWSERS_NEEDED, COPIES
from recovery.log.codec import decode, encode, state_from_plain, state_to_plain
from recovery.log.segments import LogUnavailable
from recovery.plan import strategy_order
from recovery.supervision import RestartLimit
from recovery.voting import QUORUM
from tests.fakes import FakeHost, VirtualTimeLoop, order

BROWSERS: Mapping[str, int] = {"chrome": 2, "firefox": 1}
DEADLINE = 30.0  # of each operation
LIMIT = RestartLimit()
LEASE = 15.0
SETTLE_SECONDS = 240.0  # from the last fault on, until all is in order again
TURN_SECONDS = 1e-9  # that a turn of the loop takes: a clock that stands still rounds for ever
TURNS_MAX = 20_000  # of the loop in one millisecond: more is a busy wait
NEVER = 1e9  # seconds
# Browsers remembered beyond those asked for: the long dead, and a window of races.
STAND_INS_MAX = DEAD_MAX + 2 * 3 * RestartLimit().restarts_max


class _Word(StrEnum):
    def __repr__(self) -> str:  # so that a plan's repr makes the plan
        return f"{type(self).__name__}.{self.name}"


class Kind(_Word):
    BROWSER_CRASH = "browser crash"
    PAGE_CRASH = "page crash"
    WORKER_DEATH = "worker death"
    SOCKETS_DROPPED = "sockets dropped"  # back after `seconds`, or never
    LAUNCHES_FAIL = "launches fail"  # the browser crashes, and its next `times` launches fail
    LOADS_FAIL = "loads fail"  # likewise
    ERROR_REPORTED = "error reported"  # by the page, of its next operation
    OPERATION_HANGS = "operation hangs"  # the next one, until its deadline
    WORKER_SILENT = "worker silent"  # it lives, and answers nobody
    SUPERVISOR_DEATH = "supervisor death"  # the next incarnation begins after `seconds`
    LOG_FULL = "log full"  # for `seconds`
    # What only schedules have (see `plan_of`): plans drawn from a seed stay what they were.
    PAGE_HANGS = "page hangs"  # until it is found out and ended
    MEMORY_RUNS_OUT = "memory runs out"  # of the page
    DEVICE_LOST = "device lost"  # by the page
    ANSWERS_WRONG = "answers wrong"  # the next `times` of them
    CLOCK_STEPS = "clock steps"  # that of the supervisor, by `seconds`


DRAWN = tuple(kind for kind in Kind if kind not in tuple(Kind)[-5:])


class Clock(_Word):
    """What `Fault.when` counts: virtual time, operations that browsers began, logged events."""

    SECONDS = "seconds"
    OPERATIONS = "operations"
    EVENTS = "events"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. An empty target is the browser that is just asked, or any.

    `logged` is for a supervisor's death at an event: whether that event is in the log.
    """

    kind: Kind
    when: float
    clock: Clock = Clock.SECONDS
    target: str = ""
    seconds: float = 0.0
    times: int = 1
    logged: bool = True


@dataclass(frozen=True)
class FaultPlan:
    """`seconds`: over how much virtual time operations are spread."""

    seed: int
    faults: tuple[Fault, ...]
    seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of a simulation. `log` holds the events as they are on disk."""

    results: tuple[tuple[str, bool, str, int, int, str], ...]  # id, success, browser, attempts...
    log: tuple[bytes, ...]
    state: PoolState
    seconds: float
    terms: int
    applied: Mapping[str, int]  # faults that found something to break, by kind
    given_up: Mapping[str, str]  # slot -> why
    recovered: int

    @property
    def failed(self) -> int:
        return sum(not success for _, success, *_ in self.results)


class SimulationFailed(AssertionError):
    """Something that must always hold did not."""


def slots(browsers: Mapping[str, int]) -> dict[str, BrowserType]:
    return {
        f"{kind}-{n}": BrowserType(kind) for kind, count in browsers.items() for n in range(count)
    }


def make_plan(
    seed: int,
    *,
    browsers: Mapping[str, int] = BROWSERS,
    operations: int = 150,
    faults: int = 8,
    seconds: float = 60.0,
    kinds: Sequence[Kind] = DRAWN,
) -> FaultPlan:
    """Draw faults over the first four fifths of a simulation."""
    rng = random.Random(f"plan {seed}")
    drawn: list[Fault] = []
    for _ in range(rng.randint(1, 2 * faults - 1)):
        kind = rng.choice(kinds)
        deaths = [fault for fault in drawn if fault.kind is Kind.SUPERVISOR_DEATH]
        if kind is Kind.SUPERVISOR_DEATH and len(deaths) == 2:
            continue  # clients give up a supervisor that is away for 15 s
        clock = rng.choice(tuple(Clock) if kind is Kind.SUPERVISOR_DEATH else tuple(Clock)[:2])
        most = {Clock.SECONDS: seconds, Clock.OPERATIONS: operations, Clock.EVENTS: 10 * faults}
        when = rng.uniform(0.02, 0.8) * most[clock]
        how_long = {
            Kind.SOCKETS_DROPPED: rng.choice((0.01, 0.5, 1.5, 1.99, 2.5, NEVER)),
            Kind.SUPERVISOR_DEATH: rng.choice((0.05, 0.5, 1.5)),
            Kind.LOG_FULL: rng.choice((0.5, 5.0, 20.0)),
        }
        drawn.append(
            Fault(
                kind,
                round(when, 3) if clock is Clock.SECONDS else max(int(when), 1),
                clock,
                rng.choice(("", *slots(browsers))),
                how_long.get(kind, 0.0),
                rng.choice((1, 1, 2, 3, 5)) if kind in (Kind.LAUNCHES_FAIL, Kind.LOADS_FAIL) else 1,
                rng.random() < 0.5,
            )
        )
    return FaultPlan(
        seed, tuple(sorted(drawn, key=lambda fault: (fault.clock, fault.when))), seconds
    )


# What the control plane sees of each fault of `recovery.faults`: the simulator's own kind, for how
# long, and how often. None: it sees nothing of it, and must not mind. A node's death is that of one
# worker here, as there are no nodes.
_KILLED = dict.fromkeys(Intensity, (Kind.BROWSER_CRASH, 0.0, 1))
_PAGE_GONE = dict.fromkeys(Intensity, (Kind.PAGE_CRASH, 0.0, 1))
_MILD, _MODERATE, _SEVERE = Intensity
SEEN_OF: Mapping[FaultKind, Mapping[Intensity, tuple[Kind, float, int] | None]] = {
    FaultKind.LAUNCH_FAILURE: {
        _MILD: (Kind.LAUNCHES_FAIL, 0.0, 1),
        _MODERATE: (Kind.LAUNCHES_FAIL, 0.0, 2),
        _SEVERE: (Kind.LAUNCHES_FAIL, 0.0, 1),
    },
    FaultKind.CONNECTION_FAILURE: {
        _MILD: (Kind.SOCKETS_DROPPED, 0.3, 1),
        _MODERATE: (Kind.SOCKETS_DROPPED, 1.0, 1),
        _SEVERE: (Kind.SOCKETS_DROPPED, 10.0, 1),
    },
    FaultKind.TIMEOUT: {
        _MILD: None,
        _MODERATE: (Kind.PAGE_HANGS, 0.0, 1),
        _SEVERE: (Kind.PAGE_HANGS, 0.0, 1),
    },
    FaultKind.TAB_CRASH: _PAGE_GONE,
    FaultKind.BROWSER_CRASH: _KILLED,
    FaultKind.GPU_PROCESS_CRASH: dict.fromkeys(Intensity, (Kind.DEVICE_LOST, 0.0, 1)),
    FaultKind.DEVICE_LOSS: dict.fromkeys(Intensity, (Kind.DEVICE_LOST, 0.0, 1)),
    FaultKind.MEMORY_EXHAUSTION: {
        _MILD: None,
        _MODERATE: (Kind.MEMORY_RUNS_OUT, 0.0, 1),
        _SEVERE: (Kind.MEMORY_RUNS_OUT, 0.0, 1),
    },
    FaultKind.DRIVER_DEATH: _KILLED,
    FaultKind.SOCKET_DROP: dict.fromkeys(Intensity, (Kind.SOCKETS_DROPPED, 0.01, 1)),
    FaultKind.API_ERROR: dict.fromkeys(Intensity, (Kind.LOADS_FAIL, 0.0, 1)),
    FaultKind.WRONG_ANSWER: {
        _MILD: (Kind.ANSWERS_WRONG, 0.0, 1),
        _MODERATE: (Kind.ANSWERS_WRONG, 0.0, 3),
        _SEVERE: (Kind.ANSWERS_WRONG, 0.0, 1_000),
    },
    FaultKind.PAGE_REFRESH: _PAGE_GONE,
    FaultKind.TAB_HIDDEN: dict.fromkeys(Intensity),
    FaultKind.MACHINE_SUSPENDED: {
        _MILD: None,
        _MODERATE: None,
        _SEVERE: (Kind.PAGE_HANGS, 0.0, 1),
    },
    FaultKind.MESSAGE_OVER_LIMIT: {
        _MILD: (Kind.ERROR_REPORTED, 0.0, 1),
        _MODERATE: (Kind.SOCKETS_DROPPED, 0.05, 1),
        _SEVERE: (Kind.SOCKETS_DROPPED, 0.05, 1),
    },
    FaultKind.WORKER_DEATH: dict.fromkeys(Intensity, (Kind.WORKER_DEATH, 0.0, 1)),
    FaultKind.NODE_DEATH: dict.fromkeys(Intensity, (Kind.WORKER_DEATH, 0.0, 1)),
    FaultKind.SUPERVISOR_DEATH: dict.fromkeys(Intensity, (Kind.SUPERVISOR_DEATH, 0.5, 1)),
    FaultKind.FULL_DISK: {
        _MILD: (Kind.LOG_FULL, 1.0, 1),
        _MODERATE: (Kind.LOG_FULL, 3.0, 1),
        _SEVERE: (Kind.LOG_FULL, 10.0, 1),
    },
    FaultKind.CLOCK_STEP: {
        how: (Kind.CLOCK_STEPS, CLOCK_STEP_SECONDS[how], 1) for how in Intensity
    },
}


def plan_of(schedule: Schedule, seconds: float = 60.0) -> FaultPlan:
    """The plan that a schedule for real browsers stands for. Steps of sequences, of which the
    simulator has none, count as operations."""
    faults = []
    for due in schedule.faults:
        seen = SEEN_OF[due.fault.kind][due.fault.intensity]
        if seen is not None:
            kind, how_long, times = seen
            in_time = due.clock is ScheduleClock.SECONDS
            clock = Clock.SECONDS if in_time else Clock.OPERATIONS
            faults.append(Fault(kind, due.when, clock, due.fault.target, how_long, times))
    return FaultPlan(schedule.seed, tuple(faults), seconds)


def case(seed: int) -> dict[str, Any]:
    """The simulation that a bare seed stands for: all levels and strategies take their turn."""
    level = tuple(Level)[seed % len(Level)]
    strategy = tuple(Strategy)[seed // len(Level) % len(Strategy)]
    browsers = (BROWSERS, {"firefox": 1}, {"chrome": 1, "edge": 1, "safari": 1})[seed % 3]
    if sum(browsers.values()) < BROWSERS_NEEDED[level]:
        browsers = BROWSERS
    return {
        "plan": make_plan(seed, browsers=browsers),
        "browsers": browsers,
        "level": level,
        "strategy": strategy,
    }


# -- the parts that are not real ------------------------------------------------------------------


class Loop(VirtualTimeLoop):
    """Virtual time that notices when it has come to a stop."""

    def __init__(self) -> None:
        super().__init__()
        self._turns, self._moment = 0, -1.0

    def _run_once(self) -> None:
        super()._run_once()
        now = self.time()
        self._turns = self._turns + 1 if now - self._moment < 0.001 else 0
        if not self._turns:
            self._moment = now
        self._virtual += TURN_SECONDS
        if self._turns > TURNS_MAX:
            self._turns = 0
            raise SimulationFailed(f"busy waiting at {now:.3f} s")


class Gate:
    """Opens for everyone after a while of its own; `hang_next` keeps the next one for good."""

    def __init__(self, rng: random.Random, least: float, most: float) -> None:
        self._rng, self._least, self._most = rng, least, most
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hang_next = False

    def wait(self) -> Coroutine[Any, Any, None]:
        hangs, self.hang_next = self.hang_next, False
        return self._wait(None if hangs else self._rng.uniform(self._least, self._most))

    async def _wait(self, seconds: float | None) -> None:
        broken = self._broken
        await asyncio.wait({broken}, timeout=seconds)
        if broken.done():
            raise BrowserLost("the page's data socket closed", what="socket_closed")

    def interrupt(self) -> None:
        """Whoever waits now is told that the connection broke."""
        self._broken.set_result(None)
        self._broken = asyncio.get_running_loop().create_future()


class SimHost(FakeHost):
    """A worker that takes its time, and whose page answers as `BrowserHost`'s does when it is out
    of touch: what was under way has failed, what is new waits."""

    def __init__(self, world: World, browser_id: str, kind: BrowserType) -> None:
        super().__init__(browser_id, kind)
        number = len(world.hosts.get(browser_id, ()))
        rng = random.Random(f"{world.plan.seed} {browser_id} {number}")
        self.world = world
        self.rng = rng
        self.run_gate: Any = Gate(rng, 0.002, 0.05)
        self.launch_gate: Any = Gate(rng, 0.2, 1.5)
        self.load_gate: Any = Gate(rng, 0.02, 0.3)
        self.silent = False
        self.doomed = False  # the launch under way will fail
        self.error_next = False
        for name in ("launch", "load", "unload", "run", "next_event", "hello", "reconnect", "stop"):
            setattr(self, name, self._heard(getattr(self, name)))

    @property
    def lives(self) -> bool:
        return not self._worker_over.done()

    @property
    def serves(self) -> bool:
        return (
            self.lives
            and not self.silent
            and self.readiness is Readiness.READY
            and self.in_touch.is_set()
            and "m" in self.models
        )

    def _heard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def calling(*arguments: Any) -> Any:
            if self.silent:
                began = self.world.now
                try:
                    await self._unless_dead(asyncio.Event().wait())
                finally:
                    if isinstance(arguments[0] if arguments else None, RunRequest):
                        self.world.stalled[_op(arguments[0])] += self.world.now - began
            return await call(*arguments)

        return calling

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        self.world.launching(self, order)
        return await super().launch(order)

    async def _launch(self, number: int, order: LaunchOrder) -> LaunchReport:
        self.doomed = self.world.takes(Kind.LAUNCHES_FAIL, order.ref.browser_id)
        report = await super()._launch(number, order)
        if self.doomed:
            self.readiness = Readiness.DEAD
            raise LaunchFailed(f"{order.ref} did not start")
        return report

    async def load(self, *arguments: Any) -> Any:
        if self.world.takes(Kind.LOADS_FAIL, self.ref.browser_id):
            self.fail_load.add(len(self.loads))
        return await super().load(*arguments)

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        if not self.in_touch.is_set() and self.lives:
            await self._until_in_touch(request.seconds)
            if not self.in_touch.is_set() and request.ref == self.ref:
                return RunReply(self.status(), failure=self._failure("deadline_passed", request))
        return await super().run(request, tensors)

    async def _until_in_touch(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._unless_dead(self.in_touch.wait())
        except TimeoutError:
            pass

    async def _answer(
        self, number: int, request: RunRequest, tensors: Mapping[str, Any]
    ) -> RunReply:
        self.world.operation_began(self, request)
        if not self.in_touch.is_set():
            return RunReply(self.status(), failure=self._failure("socket_closed", request))
        if self.error_next:
            self.error_next = False
            self.error_on_run.add(number)
        if self.run_gate.hang_next:
            self.world.hung.add(_op(request))
        return await super()._answer(number, request, tensors)

    def drop_sockets(self) -> None:
        super().drop_sockets()
        self.run_gate.interrupt()

    def crash(self, what: str = "browser_exited") -> None:
        if self.readiness is Readiness.STARTING:
            self.doomed = True
        elif self._browser_over is not None and not self._browser_over.done():
            super().crash(what)


class Store:
    """What of the log is on disk, and the state that it replays to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.replayed = PoolState()
        self.checkpoint: tuple[int, dict[str, Any]] | None = None
        self.full = False

    def write(self, event: Event) -> None:
        line = encode(event)
        self.lines.append(line)
        self.replayed = apply(self.replayed, decode(line))

    def recovered(self) -> PoolState:
        """As a new incarnation reads it: the last checkpoint, and the events after it."""
        seq, plain = self.checkpoint or (0, state_to_plain(PoolState()))
        return reduce(apply, map(decode, self.lines[seq:]), state_from_plain(plain))


class SimLog:
    """One incarnation's handle of the log. Writing takes a millisecond."""

    def __init__(self, world: World) -> None:
        self._world, self._store = world, world.store
        self._checkpointed = len(self._store.lines)

    @property
    def last_seq(self) -> int:
        return len(self._store.lines)

    @property
    def events_since_checkpoint(self) -> int:
        return self.last_seq - self._checkpointed

    async def append(self, event: Event) -> None:
        dies = self._world.supervisor_dies_at(self.last_seq + 1)
        if dies is not None and not dies.logged:
            await asyncio.sleep(60)  # it is cancelled here
        await asyncio.sleep(0.0005)
        if self._store.full:
            raise LogUnavailable("the disk is full")
        if event.seq != self.last_seq + 1:
            self._world.violated(f"event {event.seq} was logged after {self.last_seq}")
        self._store.write(event)
        await asyncio.sleep(60 if dies is not None else 0.0005)

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        if self._store.full:
            raise LogUnavailable("the disk is full")
        if seq != self.last_seq or state != self._store.replayed:
            self._world.violated(f"the checkpoint of event {seq} is not what the log replays to")
        self._store.checkpoint = seq, state_to_plain(state)
        self._checkpointed = seq

    async def close(self) -> None:
        """Nothing is open."""


class SimTasks(Tasks):
    """The real ones, and none may end with an error that nobody foresaw."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.spawned: dict[asyncio.Task[None], None] = {}  # in their order, as no set has it

    def spawn(self, work: Callable[[], Any], name: str) -> asyncio.Task[None]:
        task = super().spawn(work, name)
        self.spawned[task] = None
        task.add_done_callback(self.spawned.pop)
        return task

    async def guarded(self, work: Callable[[], Any], name: str) -> None:
        try:
            await super().guarded(work, name)
        except Exception as error:
            self._world.violated(f"the supervisor's task {name} ended with {error!r}")


class SimChanges(Changes):
    """The real ones; before anybody hears of one, `look` looks at it."""

    def __init__(self, term: int, look: Callable[[], None]) -> None:
        super().__init__(term)
        self._look = look

    async def announce(self) -> None:
        self._look()
        await super().announce()


class SimSupervisor(Supervisor):
    """The real one, looked at after every event."""

    def __init__(self, world: World, term: int, state: PoolState) -> None:
        self._own = SimTasks(world)
        super().__init__(
            world.config,
            world.make_host,
            world.closed,
            SimLog(world),
            world.wall,
            asyncio.get_running_loop().time,
            term,
            state,
            world.orders,
            tasks=self._own,
            changes=SimChanges(term, lambda: world.look(self)),
        )

    @property
    def is_behind(self) -> bool:
        return self._journal.is_behind

    @property
    def events(self) -> tuple[asyncio.Task[None], ...]:
        """Those that are on their way."""
        return self._journal.under_way

    @property
    def spawned(self) -> tuple[asyncio.Task[None], ...]:
        return tuple(self._own.spawned)


@dataclass
class Incarnation:
    supervisor: SimSupervisor
    calls: dict[asyncio.Task[Any], None] = field(default_factory=dict)
    lives: bool = True
    open: bool = False  # whether clients may call

    def kill(self) -> None:
        self.lives = False
        # Events first: they would outlive whoever waits for them.
        for task in (*self.supervisor.events, *self.calls, *self.supervisor.spawned):
            task.cancel()


# -- what must always hold ------------------------------------------------------------------------


def why_given_up(state: PoolState, record: BrowserRecord, at: float) -> str:
    """What allows that a browser was given up; empty if nothing does."""
    limit = state.limit
    if record.replaced_by:
        return f"replaced by {record.replaced_by}"
    if record.launches_failed >= limit.launches_failed_max:
        return f"{record.launches_failed} launches in a row failed"
    recent = [moment for moment in record.restarts if abs(at - moment) < limit.period_seconds]
    if len(recent) >= limit.restarts_max:
        return f"{len(recent)} restarts within {limit.period_seconds:g} s"
    repair = next((r for r in reversed(state.repairs) if r.browser_id == record.id), None)
    if repair is None or state.level in (Level.NONE, Level.LOW):
        return ""  # these fill a slot again, whatever the plan was
    every = len(repair.steps) == len(repair.plan.steps) and not any(s.worked for s in repair.steps)
    adjustable = bool(adjust(record.kind, repair.model_type, repair.failure.category))
    restarts = [
        rung
        for step in repair.plan.steps
        for rung in step
        if rung is RecoveryLevel.MODERATE or (rung is RecoveryLevel.AGGRESSIVE and adjustable)
    ]
    tried = state.strategy.race or record.epoch - repair.from_epoch >= len(restarts)
    return f"nothing in {repair.plan.steps} worked" if every and tried else ""


def broken(before: PoolState, state: PoolState, at: float) -> str:
    """What does not hold of the state after an event, in words; empty if all is well."""
    for record in state.browsers.values():
        fault = _broken(before.browsers.get(record.id), state, record, at)
        if fault:
            return f"{record.id}: {fault}: {record}"
    for name in before.browsers.keys() - state.browsers.keys():
        gone = before.browsers[name]
        if gone.phase in ALIVE or at - gone.since < state.limit.period_seconds:
            return f"the record of {name} is gone: {gone}"
    if len(state.repairs) > HISTORY_MAX or len(state.tallies) > TALLIES_MAX:
        return "the histories have no bound"
    return ""


def _broken(
    before: BrowserRecord | None, state: PoolState, record: BrowserRecord, at: float
) -> str:
    phase, repair = record.phase, record.repair
    stand_ins = [
        other
        for other in state.browsers.values()
        if other.stands_in_for == record.id and other.phase in COMING
    ]
    principal = state.browsers.get(record.stands_in_for)
    if before is not None and record.epoch < before.epoch:
        return f"epoch {record.epoch} after {before.epoch}"
    if phase is Phase.READY and (record.models.keys() ^ state.models.keys()) - state.placed.keys():
        return f"it has {sorted(record.models)}, and {sorted(state.models)} are wanted"
    if phase in (Phase.STARTING, Phase.REPLACING, Phase.STOPPED, Phase.GIVEN_UP) and record.models:
        return f"it has models while {phase}"
    if record.numeric.keys() - record.models.keys():
        return "it is said to have what it has not"
    if repair is not None and (phase not in COMING or not repair.trying):
        return "a repair is under way, and nothing is being tried"
    if phase in (Phase.RECONNECTING, Phase.REPLACING) and repair is None:
        return f"it is {phase} without a repair"
    if phase is Phase.REPLACING and not stand_ins:
        return "nobody is being started in its place"
    if stand_ins and (repair is None or phase not in COMING):
        return "another browser is being started in place of one that needs none"
    if phase in COMING and record.stands_in_for and (principal is None or principal.repair is None):
        return f"it stands in for {record.stands_in_for}, which is not being repaired"
    if phase is Phase.GIVEN_UP and not why_given_up(state, record, record.since):
        return "it was given up too early"
    if len(record.restarts) > state.limit.restarts_max:
        return "more restarts than the limit allows"
    if repair is not None and at - repair.began > SETTLE_SECONDS:
        return "its repair does not end"
    return ""


# -- the simulation -------------------------------------------------------------------------------


class World:
    def __init__(
        self,
        plan: FaultPlan,
        browsers: Mapping[str, int],
        level: Level,
        strategy: str,
        limit: RestartLimit = LIMIT,
    ) -> None:
        self.plan = plan
        self.ahead = 0.0  # of the supervisor's wall clock
        self.slots = slots(browsers)
        self.level = level
        self.config = SupervisorConfig(
            "sim", level, strategy_order(strategy), limit, LEASE, False, creator="client-0"
        )
        self.store = Store()
        self.orders = MemoryOrders()
        self.hosts: dict[str, list[SimHost]] = {}
        self.terms = 0
        self.incarnation: Incarnation | None = None
        self.results: list[Result] = []
        self.begun: dict[str, tuple[float, float]] = {}  # operation -> from, to
        self.hung: set[str] = set()
        self.stalled: Counter[str] = Counter()  # seconds that operations waited for silent workers
        self.operations = 0
        self.failing: Counter[tuple[Kind, str]] = Counter()
        self.applied: Counter[str] = Counter()
        self.outages: list[tuple[float, bool]] = []  # samples: whether nobody could answer
        self.none_left = -1.0  # when that was last so
        self.lost_events = False
        self.faulty = False  # whether faults may happen now
        self.last_fault = 0.0
        self.closing = False
        self.epochs: dict[str, int] = {}  # slot -> the newest that was launched
        self._before = PoolState()
        self._waiting = list(plan.faults)
        self._chores: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[str] = self._loop.create_future()
        self._loop.set_exception_handler(self._unseen)

    @property
    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        """The supervisor's wall clock."""
        return self._loop.time() + self.ahead

    # -- checks -----------------------------------------------------------------------------------

    def violated(self, what: str) -> None:
        if not self.failed.done():
            self.failed.set_result(what)

    def _unseen(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, BrowserLost | LaunchFailed):  # a launch whose orderer is dead
            self.violated(f"{context.get('message')}: {error!r}")

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.violated(what)

    def look(self, supervisor: SimSupervisor) -> None:
        """What must hold after every event that is applied."""
        if self.incarnation is None or supervisor is not self.incarnation.supervisor:
            self.violated("a dead supervisor goes on")
            return
        state, now = supervisor.state, self.wall()
        if not supervisor.is_behind and state != self.store.replayed:
            self.violated(f"the log replays to {self.store.replayed}, and not to {state}")
        self.violated(wrong) if (wrong := broken(self._before, state, now)) else None
        self._before = state
        for fault in supervisor.faults:
            if "IllegalTransition" in fault or "InternalError" in fault:
                self.violated(fault)
        fresh = state.browsers.keys() - self.slots.keys()
        self.require(len(fresh) <= STAND_INS_MAX, f"ever more browsers: {sorted(fresh)}")
        for name, hosts in self.hosts.items():
            living = [str(host.ref) for host in hosts if host.lives]
            self.require(len(living) <= 1, f"{name} has {len(living)} living workers: {living}")
        if not _left(state):
            self.none_left = self.now

    def launching(self, host: SimHost, order: LaunchOrder) -> None:
        """No incarnation is launched twice, unless the worker that had the order first is dead."""
        name, epoch = order.ref.browser_id, order.ref.epoch
        others = [
            other
            for other in self.hosts[name]
            if other is not host and any(known.ref == order.ref for known in other.launches)
        ]
        self.require(not any(other.lives for other in others), f"{order.ref} is launched twice")
        record = self.store.replayed.browsers.get(name)
        if others and record is not None and not self.lost_events:
            over = record.epoch > epoch or record.phase is not Phase.STARTING
            self.require(not over, f"{order.ref} is launched again, and its time is over")
        if not self.lost_events:
            known = self.epochs.get(name, -1)
            self.require(epoch >= known, f"{order.ref} is launched after epoch {known}")
        self.epochs[name] = max(epoch, self.epochs.get(name, -1))

    def judge(self, result: Result) -> None:
        """What must hold of one operation."""
        failures = [step.failure for step in result.recovery if step.failure is not None]
        if not result.success and not self._may_fail(result, failures):
            self.violated(f"an operation failed without need: {_brief(result)}")
        if self.level is Level.NONE and result.recovered:
            self.violated(f"level none recovered: {result}")

    def _may_fail(self, result: Result, failures: Sequence[Failure]) -> bool:
        begun, ended = self.begun[result.op_id]
        if self.level is Level.NONE and failures:
            return True
        if self.level is Level.LOW and any(not _reported(failure) for failure in failures):
            return True  # its own browser has to answer, and that may be gone
        if len(failures) >= 3 * COPIES[self.level] or result.op_id in self.hung:
            return True
        said = [failure.message for failure in failures if _reported(failure)]
        if len(said) > len(set(said)):
            return True
        if ended - begun >= DEADLINE:
            samples = [out for at, out in self.outages if begun <= at <= ended]
            outage = DEADLINE * sum(samples) / max(len(samples), 1)
            return self.stalled[result.op_id] + outage >= DEADLINE / 2
        # Clients hear a little later what is so.
        return self.none_left >= begun - 1.0 and "no browser is left" in result.error

    # -- faults -----------------------------------------------------------------------------------

    def takes(self, kind: Kind, browser_id: str) -> bool:
        """Whether this launch or load is one that fails."""
        if not self.failing[kind, browser_id]:
            return False
        self.failing[kind, browser_id] -= 1
        return True

    def _due(self, clock: Clock, count: float) -> list[Fault]:
        if not self.faulty:
            return []
        due = [fault for fault in self._waiting if fault.clock is clock and fault.when <= count]
        self._waiting = [fault for fault in self._waiting if fault not in due]
        return due

    def operation_began(self, host: SimHost, request: RunRequest) -> None:
        self.operations += 1
        for fault in self._due(Clock.OPERATIONS, self.operations):
            self.strike(fault, None if fault.target else host)

    def supervisor_dies_at(self, seq: int) -> Fault | None:
        due = self._due(Clock.EVENTS, seq)
        for fault in due:
            # Its last act, whether it is logged or not, is cut short in the log.
            self._loop.call_later(0.0008, self.strike, fault)
        return due[0] if due else None

    async def strike_in_time(self) -> None:
        for fault in sorted(self.plan.faults, key=lambda fault: fault.when):
            if fault.clock is Clock.SECONDS:
                await asyncio.sleep(max(fault.when - self.now, 0.0))
                for due in self._due(Clock.SECONDS, fault.when):
                    self.strike(due)

    def strike(self, fault: Fault, host: SimHost | None = None) -> None:
        lasts = fault.kind is not Kind.CLOCK_STEPS and fault.seconds < NEVER
        self.last_fault = self.now + (fault.seconds if lasts else 0.0)
        if fault.kind is Kind.SUPERVISOR_DEATH:
            self.applied[fault.kind] += self.kill_supervisor(fault.seconds)
        elif fault.kind is Kind.CLOCK_STEPS:
            self.ahead += fault.seconds
            self.applied[fault.kind] += 1
        elif fault.kind is Kind.LOG_FULL:
            self.store.full = True
            self._loop.call_later(fault.seconds, setattr, self.store, "full", False)
            self.applied[fault.kind] += 1
        elif (host := host or self._victim(fault.target)) is not None:
            self.applied[fault.kind] += 1
            self._strike_host(fault, host)

    def _victim(self, target: str) -> SimHost | None:
        hosts = [host for hosts in self.hosts.values() for host in hosts if host.lives]
        aimed = [host for host in hosts if host.ref.browser_id == target]
        return next(iter((*aimed, *(host for host in hosts if host.serves))), None)

    def _strike_host(self, fault: Fault, host: SimHost) -> None:
        match fault.kind:
            case Kind.BROWSER_CRASH:
                host.crash()
            case Kind.PAGE_CRASH:
                host.crash("page_closed")
            case Kind.WORKER_DEATH:
                host.die()
            case Kind.SOCKETS_DROPPED:
                if host.readiness is Readiness.READY and host.in_touch.is_set():
                    host.drop_sockets()
                    if fault.seconds < NEVER:
                        self._loop.call_later(fault.seconds, self._back, host, host.ref)
            case Kind.LAUNCHES_FAIL | Kind.LOADS_FAIL:
                self.failing[fault.kind, host.ref.browser_id] += fault.times
                host.crash()
            case Kind.PAGE_HANGS:
                host.crash("page_hung")
            case Kind.MEMORY_RUNS_OUT:
                host.crash("out_of_memory")
            case Kind.DEVICE_LOST:
                host.crash("device_lost")
            case Kind.ANSWERS_WRONG:
                host.lie_on_run |= set(range(host.runs, host.runs + fault.times))
            case Kind.ERROR_REPORTED:
                host.error_next = True
            case Kind.OPERATION_HANGS:
                host.run_gate.hang_next = True
            case Kind.WORKER_SILENT:
                host.silent = True

    def _back(self, host: SimHost, ref: Any) -> None:
        if host.ref == ref:
            host.in_touch.set()

    # -- the supervisor's process -----------------------------------------------------------------

    async def make_host(self, browser_id: str, kind: BrowserType, epoch: int) -> SimHost:
        """As with Ray, a worker that was asked for comes to be, whatever becomes of who asked."""
        host = SimHost(self, browser_id, kind)
        self.hosts.setdefault(browser_id, []).append(host)
        await asyncio.sleep(host.rng.uniform(0.01, 0.3))
        return host

    async def find_hosts(self) -> dict[str, list[SimHost]]:
        return {name: [h for h in hosts if h.lives] for name, hosts in self.hosts.items()}

    def begin(self) -> Incarnation:
        self.terms += 1
        state = self.store.recovered()
        self.require(state == self.store.replayed, "checkpoint and events replay to another state")
        self._before = state
        self.incarnation = Incarnation(SimSupervisor(self, state.term + 1, state))
        return self.incarnation

    def closed(self) -> None:
        self.require(self.closing, "the pool closed itself")

    def kill_supervisor(self, seconds: float) -> bool:
        old = self.incarnation
        if old is None or not old.lives:
            return False
        self.lost_events |= old.supervisor.is_behind
        old.kill()
        chore = asyncio.create_task(self._resume_after(seconds), name="resume")
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)
        return True

    async def _resume_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        new = self.begin()
        resuming = asyncio.create_task(new.supervisor.resume(self.find_hosts), name="resuming")
        new.calls[resuming] = None
        try:
            await resuming
        except asyncio.CancelledError:
            self.require(not new.lives or self.closing, "the resumption was cancelled")
            return
        except Exception as error:
            self.violated(f"the supervisor could not resume: {error!r}")
            return
        new.calls.pop(resuming, None)
        new.open = True

    async def call(self, method: Callable[[Supervisor], Coroutine[Any, Any, Any]]) -> Any:
        """What a client asks of the supervisor, whose process may die meanwhile."""
        asked = self.incarnation
        if asked is None or not asked.open or not asked.lives:
            raise BrowserLost("the supervisor can't be reached now", what="socket_closed")
        task = asyncio.create_task(method(asked.supervisor))
        asked.calls[task] = None
        try:
            return await task
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if asked.lives or (me is not None and me.cancelling()):
                raise
            raise BrowserLost("the supervisor is gone", what="worker_exited") from None
        finally:
            asked.calls.pop(task, None)

    async def watch(self, client: str, version: int, seconds: float) -> Table:
        table: Table = await self.call(lambda asked: asked.watch(client, version, seconds))
        return table

    # -- the story --------------------------------------------------------------------------------

    async def story(self, operations: int, concurrency: int, rng: random.Random) -> Outcome:
        first = self.begin()
        await first.supervisor.open(self.slots)
        first.open = True
        await first.supervisor.load(order())
        clients = [Routing(self, f"client-{n}", LEASE / 3, "node", 1 << 20, 4) for n in range(3)]
        for client in clients:
            await client.start()
        self.faulty = True
        chores = [
            asyncio.create_task(self.strike_in_time(), name="faults"),
            asyncio.create_task(self._sample_outages(), name="samples"),
        ]
        numbers = iter(range(operations))
        pause = self.plan.seconds * concurrency / max(operations, 1)
        await asyncio.gather(
            *(
                self._worker(clients[n % len(clients)], n % len(clients), numbers, pause, rng)
                for n in range(concurrency)
            )
        )
        await chores[0]
        self.faulty = False
        await self._settle()
        self._check_strength()
        await self._ask(clients[-1], 0, "last", rng)
        for chore in chores:
            chore.cancel()
        for client in clients:
            self.require(client.gone is None, f"a client gave the pool up: {client.gone}")
        answered = Counter(result.op_id for result in self.results)
        ids = {*(f"op-{n}" for n in range(operations)), "last"}
        self.require(answered == dict.fromkeys(ids, 1), f"results: {answered - Counter(ids)}")
        await self._close(clients)
        return self._outcome()

    async def _worker(
        self,
        routing: Routing,
        client: int,
        numbers: Any,
        pause: float,
        rng: random.Random,
    ) -> None:
        for number in numbers:  # shared by all workers
            await asyncio.sleep(rng.uniform(0.0, 2 * pause))
            await self._ask(routing, client, f"op-{number}", rng)

    async def _ask(self, routing: Routing, client: int, op_id: str, rng: random.Random) -> None:
        question = Question(op_id, "m", "inference", self.level, client=f"client-{client}")
        answering = Answering(
            question, Rules(), routing, random.Random(f"{self.plan.seed} {op_id}")
        )
        x = np.asarray([rng.random()], np.float32)
        began = self.now
        result, reply = await answering.run({"x": x}, DEADLINE)
        self.begun[op_id] = began, self.now
        self.results.append(result)
        if result.success:
            right = reply is not None and np.array_equal(reply.outputs["x"], x + 1)
            self.require(right, f"a wrong answer: {result}")
        late = self.now - began - DEADLINE
        self.require(late <= 1.0, f"an operation ended {late:.1f} s after its deadline: {result}")
        self.judge(result)

    async def _sample_outages(self) -> None:
        while True:
            serving = [h for hosts in self.hosts.values() for h in hosts if h.serves]
            able = sum(self._is_in_service(host) for host in serving)
            needed = QUORUM if self.level is Level.CRITICAL else 1
            self.outages.append((self.now, able < needed))
            self.none_left = self.none_left if _left(self.state) else self.now
            await asyncio.sleep(0.25)

    def _is_in_service(self, host: SimHost) -> bool:
        record = self.state.browsers.get(host.ref.browser_id)
        ready = record is not None and record.phase is Phase.READY
        return ready and record.epoch == host.ref.epoch and "m" in record.numeric

    @property
    def state(self) -> PoolState:
        assert self.incarnation is not None
        return self.incarnation.supervisor.state

    async def _settle(self) -> None:
        end = max(self.now, self.last_fault) + SETTLE_SECONDS
        quiet = 0
        while quiet < 20:  # for ten seconds
            await asyncio.sleep(0.5)
            quiet = quiet + 1 if self._is_settled() else 0
            if self.now > end:
                records = [str(record) for record in self.state.browsers.values()]
                self.violated("the pool does not come to rest:\n  " + "\n  ".join(records))
                await asyncio.sleep(math.inf)

    def _is_settled(self) -> bool:
        incarnation = self.incarnation
        assert incarnation is not None
        return (
            incarnation.open
            and incarnation.lives
            and not self.store.full
            and self.now > self.last_fault
            and all(
                record.phase not in (*COMING, Phase.DRAINING)
                and ModelPhase.LOADING not in record.models.values()
                for record in self.state.browsers.values()
            )
            # A worker that is silent is found out within a lease.
            and not any(
                host.silent for hosts in self.hosts.values() for host in hosts if host.lives
            )
        )

    def _check_strength(self) -> None:
        """The pool has what it was asked for, or says why not; and nothing else lives."""
        records = self.state.browsers.values()
        serving = [record.id for record in records if record.phase is Phase.READY]
        missed = {r.id: self._why(r) for r in records if _is_missed(r)}
        full = len(serving) + len(missed) == len(self.slots)
        self.require(full, f"of {list(self.slots)}, {serving} serve, and {missed} are missed")
        self.require(all(missed.values()), f"nobody says why some are missed: {missed}")
        for name, hosts in self.hosts.items():
            living = [host for host in hosts if host.lives]
            record = self.state.browsers.get(name)
            if record is None or record.phase is not Phase.READY:
                self.require(not living, f"left over: {[str(host.ref) for host in living]}")
                continue
            loaded = {m for m, phase in record.models.items() if phase is ModelPhase.LOADED}
            has = [(host.ref.epoch, host.readiness, set(host.models)) for host in living]
            want = [(record.epoch, Readiness.READY, loaded)]
            self.require(has == want, f"{name} is {has}, where the state says {want}: {record}")
            for model in record.models.keys() - loaded:
                tried = record.loads_failed.get(model, 0)
                self.require(tried >= 2, f"{name} is without {model} after {tried} loads: {record}")

    def _why(self, record: BrowserRecord) -> str:
        return why_given_up(self.state, record, record.since)

    async def _close(self, clients: Sequence[Routing]) -> None:
        self.closing = True
        await self.call(lambda asked: asked.close())
        for client in clients:
            await client.stop()
        await asyncio.sleep(2 * DEADLINE)
        living = [str(h.ref) for hosts in self.hosts.values() for h in hosts if h.lives]
        self.require(not living, f"a closed pool leaves {living} behind")
        alive = [record.id for record in self.state.browsers.values() if record.phase in ALIVE]
        self.require(not alive, f"a closed pool still has {alive}")
        own = asyncio.current_task()
        tasks = [t for t in asyncio.all_tasks() if t is not own and t.get_name() != "simulation"]
        self.require(not tasks, f"tasks are left: {tasks}")

    def _outcome(self) -> Outcome:
        rows = tuple(
            (
                result.op_id,
                result.success,
                result.browser_id,
                result.epoch,
                int(result.metrics["attempts"]),
                result.error,
            )
            for result in self.results
        )
        given_up = {r.id: self._why(r) for r in self.state.browsers.values() if _is_missed(r)}
        return Outcome(
            rows,
            tuple(self.store.lines),
            self.state,
            self.now,
            self.terms,
            dict(self.applied),
            given_up,
            sum(result.recovered for result in self.results),
        )


def _is_missed(record: BrowserRecord) -> bool:
    return record.phase is Phase.GIVEN_UP and not record.replaced_by


def _op(request: RunRequest) -> str:
    return request.op_id.split("/")[-1]  # without its client


def _brief(result: Result) -> str:
    steps = [f"{step.at:.3f} {step.what} {step.where} {step.outcome}" for step in result.recovery]
    return f"{result.op_id} after {result.metrics['duration_ms']:.0f} ms, {steps}: {result.error}"


def _left(state: PoolState) -> bool:
    """Whether any browser is left that has the model or may yet load it."""
    return any(
        record.phase in (Phase.READY, *COMING) and record.models.get("m") is not ModelPhase.FAILED
        for record in state.browsers.values()
    )


def simulate(
    plan: FaultPlan,
    browsers: Mapping[str, int] = BROWSERS,
    level: Level = Level.MEDIUM,
    strategy: str = "progressive",
    operations: int = 150,
    concurrency: int = 9,
    seed: int | None = None,
    limit: RestartLimit = LIMIT,
) -> Outcome:
    """Run one simulation. Raises `SimulationFailed`, which says how to see it again.

    `seed` is of the operations' own chances, the plan's if not given.
    """
    seed = plan.seed if seed is None else seed
    worlds: list[World] = []

    async def whole() -> Outcome:
        world = World(plan, browsers, level, strategy, limit)
        worlds.append(world)
        story = asyncio.current_task()
        assert story is not None
        story.set_name("simulation")
        telling = asyncio.create_task(
            world.story(operations, concurrency, random.Random(f"operations {seed}")), name="story"
        )
        await asyncio.wait({telling, world.failed}, return_when=asyncio.FIRST_COMPLETED)
        if world.failed.done():
            telling.cancel()
            raise SimulationFailed(f"at {world.now:.3f} s: {world.failed.result()}")
        return telling.result()

    again = (
        f"simulate({plan!r}, browsers={dict(browsers)!r}, level={str(level)!r}, "
        f"strategy={str(strategy)!r}, operations={operations}, concurrency={concurrency}, "
        f"seed={seed}, limit={limit!r})"
    )
    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            loop = runner.get_loop()
            clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
            with (
                mock.patch.object(pool.answering, "time", clock),
                mock.patch.object(pool.routing, "time", clock),
            ):
                return runner.run(whole())
    except Exception as error:
        lines = worlds[0].store.lines if worlds else []
        raise SimulationFailed(
            f"seed {plan.seed}: {error if isinstance(error, SimulationFailed) else repr(error)}\n\n"
            "faults:\n  "
            + "\n  ".join(map(str, plan.faults))
            + f"\n\nthe last of {len(lines)} events:\n  "
            + "\n  ".join(line.decode()[:400] for line in lines[-12:])
            + f"\n\nagain: .venv/bin/python -m tests.simulator {plan.seed}  # if made by `case`, or"
            + f"\n  {again}\n"
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Simulate the control plane.")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--schedule", help="a plan.json of `tabpool chaos`, in place of a seed")
    parser.add_argument("--level", default="high", help="of the pool, with --schedule")
    parser.add_argument("count", type=int, nargs="?", default=1, help="of seeds, from that on")
    parser.add_argument("--show", action="store_true", help="print the events, too")
    options = parser.parse_args(arguments)
    if options.schedule:
        plan = plan_of(read_schedule(options.schedule))
        cases = [(plan.seed, {"plan": plan, "level": Level(options.level)})]
    else:
        seeds = itertools.islice(itertools.count(options.seed), options.count)
        cases = [(seed, case(seed)) for seed in seeds]
    failures = 0
    for seed, wanted in cases:
        try:
            outcome = simulate(**wanted)
        except SimulationFailed as error:
            failures += 1
            sys.stdout.write(f"{error}\n")
            continue
        if options.show:
            sys.stdout.write("".join(f"{line.decode()}\n" for line in outcome.log))
        sys.stdout.write(
            f"seed {seed}: {len(outcome.results)} operations, {outcome.recovered} recovered, "
            f"{outcome.failed} failed, {len(outcome.log)} events, {outcome.terms} terms, "
            f"{outcome.seconds:.0f} s; given up: {dict(outcome.given_up)}\n"
        )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
