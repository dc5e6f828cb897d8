"""One chaos run: operations are asked, faults happen as the schedule says, and all is written down.

Nothing that operations need waits for what is gathered here. This module must not choose faults
(`recovery.faults` draws them), make them (`actors.injector` does), or judge what came of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import psutil

from pool.chaos.evidence import ENDS, GONE, STOPPED, Noticed, Seen, evidence, judged
from pool.chaos.records import ChaosRun, FaultRecord, MemorySample, OpRecord
from pool.chaos.workload import Question, Workload
from pool.doctor import machine
from pool.leaks import Traces
from pool.pool import BrowserPool
from pool.results import Result
from recovery.control import COMING, ModelPhase, Phase, PoolState, Repair
from recovery.errors import FaultRefused, PoolBusy, PoolError, SequenceLost
from recovery.faults import CLOCK_STEP_SECONDS, Clock, Due, FaultKind, Injected, Place, Schedule
from recovery.faults import FAULTS as KINDS
from recovery.kinds import RecoveryLevel
from recovery.levels import ORDER
from recovery.log import log

WHOLE_SECONDS = 90.0  # that repairs may take before a fault happens all the same
_ENDED_SECONDS = 3.0  # within which a process that was killed must be gone
_ENDED_POLL_SECONDS = 0.05
_QUIET_SECONDS = 1.0  # the same for one that may go by unnoticed
_NOTICED_SECONDS = 15.0  # within which a fault that must be noticed should be, before the next
_GROWN_SECONDS = 1.2  # the same for a browser that is to grow
_SAMPLE_EVERY = 20  # operations, between two looks at memory
_SETTLE_POLL_SECONDS = 0.2
_SKEW_SECONDS = 0.01  # between the clocks of processes of one machine
_EVENTS_MAX = 200_000  # of the control log that are kept for the account
_SUPERVISOR_AWAY_SECONDS = 30.0


_RAISED = (PoolError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Plan:
    """What a run is asked for. `settle`: wait until every browser is back before the next fault;
    `gated`: leave browsers alone whose circuit is open; `seconds`: of each operation, at most."""

    schedule: Schedule
    operations: int
    at_once: int = 4
    gated: bool = True
    settle: bool = True
    seconds: float = 120.0
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """How a run is going, for whoever watches it."""

    began: int = 0
    operations: list[OpRecord] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    waiting_for: str = ""

    @property
    def failed(self) -> int:
        return sum(not op.success and not op.refused for op in self.operations)

    @property
    def wrong(self) -> int:
        return sum(op.wrong for op in self.operations)


class _Repaired(NamedTuple):
    """A repair, its times by our clock."""

    began: float
    ready: float | None
    repair: Repair


class _Strike(NamedTuple):
    """An attempt of an operation that failed, and where."""

    number: int
    category: str
    browser_id: str
    epoch: int
    at: float


class _Before(NamedTuple):
    """How things were before a fault that changes them."""

    term: int = 0
    tree_bytes: int = 0
    skew_seconds: float = 0.0


class ChaosRunner:
    """A run on a pool that is open, with `workload` loaded.

    `tell` is called with each result that failed or was wrong, as it comes; `on_node_death`, which
    may block, after a node was killed: it may start another.
    """

    def __init__(
        self,
        pool: BrowserPool,
        workload: Workload,
        plan: Plan,
        *,
        tell: Callable[[int, Question, Result, str], None] = lambda *_: None,
        on_node_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._pool = pool
        self._workload = workload
        self._plan = plan
        self._tell = tell
        self._on_node_death = on_node_death
        self._began = time.monotonic()
        self._began_at = time.time()
        self._operations_due = deque(_due(plan.schedule, Clock.OPERATIONS))
        self._steps_due = deque(_due(plan.schedule, Clock.STEPS))
        self._steps = 0
        self._striking = asyncio.Lock()
        self._noticed: deque[Noticed] = deque(maxlen=_EVENTS_MAX)
        self._log_seq = 0
        self._last_logged: tuple[float, float] = (0.0, 0.0)  # its clock, and ours
        self._repairs: dict[tuple[str, int, float], _Repaired] = {}
        self._strikes: list[_Strike] = []
        self._marks: dict[int, int] = {}  # a fault's number -> the log's last event before it
        self._steps_of_clock = [0.0]  # how far the supervisor's clock is, or was, ahead
        self._traces = Traces()
        self._products: dict[str, str] = {}
        self._engines: dict[str, str] = {}
        self._memory: list[MemorySample] = []
        self._sampling: set[asyncio.Task[None]] = set()
        self._answers: dict[str, int] = {}
        self._seen: dict[int, Seen] = {}  # by a fault's number
        self.progress = Progress()

    async def run(self) -> ChaosRun:
        """All of it. The pool is left open, and is whole again if it can be."""
        plan = self._plan
        await self._look_at_browsers()
        self._memory.append(await self._memory_sample(0))
        self._began, self._began_at = time.monotonic(), time.time()
        numbers = iter(range(plan.operations))
        timed = asyncio.create_task(self._strike_in_time(), name="timed faults")
        try:
            await asyncio.gather(*(self._asker(numbers) for _ in range(plan.at_once)))
        finally:
            timed.cancel()
            await asyncio.gather(timed, return_exceptions=True)
        await self._until_noticed()
        whole = await self._whole(WHOLE_SECONDS)
        seconds = time.monotonic() - self._began
        beside = await asyncio.gather(*self._sampling, return_exceptions=True)
        self._memory.append(await self._memory_sample(plan.operations))
        await self._read_log()
        self._finish_faults()
        return ChaosRun(
            plan.schedule.seed,
            self._began_at,
            seconds,
            plan.settings,
            machine(),
            dict(self._products),
            plan.schedule,
            tuple(sorted(self.progress.operations, key=lambda op: op.number)),
            tuple(sorted(self.progress.faults, key=lambda fault: fault.number)),
            tuple(self._memory),
            repaired=whole,
            notes=tuple(repr(error) for error in beside if isinstance(error, Exception)),
        )

    async def left_behind(self) -> tuple[str, ...]:
        """What is left of any browser of the run, once its pool is closed."""
        return tuple(await self._traces.left())

    # -- operations -------------------------------------------------------------------------------

    async def _asker(self, numbers: Any) -> None:
        for number in numbers:  # shared: each number is taken once
            self.progress.began = number + 1
            await self._strike_due(self._operations_due, number + 1)
            await self._ask(number)
            if (number + 1) % _SAMPLE_EVERY == 0:
                sampling = asyncio.create_task(self._sample(number + 1))
                self._sampling.add(sampling)
                sampling.add_done_callback(self._sampling.discard)

    async def _ask(self, number: int) -> None:
        question, op_id = self._workload.of(number), f"chaos-{number}"
        began, refused = time.monotonic(), ""
        result: Result | None = None
        try:
            result = await self._answer(question, op_id)
        except PoolBusy as error:
            refused = str(error)
        except _RAISED as error:  # whatever it is, an operation that raises has failed
            result = _failed(error, op_id, question)
        took = time.monotonic() - began
        record = OpRecord(
            number, op_id, question.model, str(question.type), began - self._began, took
        )
        if result is None:
            self.progress.operations.append(replace(record, refused=True, error=refused))
            return
        self._answers[op_id] = self._answers.get(op_id, 0) + 1
        wrong = result.success and not self._workload.right(number, result)
        strikes = _strikes(number, result)
        self._strikes += strikes
        record = replace(
            record,
            success=result.success,
            wrong=wrong,
            recovered=result.recovered,
            simulated=result.simulated,
            answers=self._answers[op_id],
            browser_id=result.browser_id,
            engine=str(result.browser_type or ""),
            level_effective=str(result.level_effective),
            struck=tuple((s.category, s.browser_id, s.epoch) for s in strikes),
            error=result.error,
        )
        self.progress.operations.append(record)
        if wrong or not result.success:
            self._tell(number, question, result, "wrong" if wrong else "failed")

    async def _answer(self, question: Question, op_id: str) -> Result:
        seconds = self._plan.seconds
        if question.op != "generate":
            return await self._pool.run_with_recovery(
                question.model, question.op, question.inputs, deadline=seconds, op_id=op_id
            )
        ended: list[Result] = []
        stream = self._pool.stream(
            question.model, question.inputs, op_id=op_id, on_result=ended.append
        )
        with contextlib.suppress(SequenceLost):
            async with contextlib.aclosing(stream) as tokens:
                async for _ in tokens:
                    self._steps += 1
                    await self._strike_due(self._steps_due, self._steps)
        return ended[0]

    # -- faults -----------------------------------------------------------------------------------

    async def _strike_due(self, waiting: deque[Due], count: float) -> None:
        async with self._striking:  # whoever comes meanwhile waits until it has happened
            while waiting and waiting[0].when <= count:
                await self._strike(waiting.popleft())

    async def _strike_in_time(self) -> None:
        for due in _due(self._plan.schedule, Clock.SECONDS):
            await asyncio.sleep(max(self._began + due.when - time.monotonic(), 0.0))
            async with self._striking:
                await self._strike(due)

    async def _strike(self, due: Due) -> None:
        if self._plan.settle:
            self.progress.waiting_for = "every browser to be back"
            await self._until_noticed()
            await self._whole(WHOLE_SECONDS)
            self.progress.waiting_for = ""
        record = FaultRecord(len(self.progress.faults), due, "refused")
        try:
            before = await self._before(due)
            await self._read_log()
            self._marks[record.number] = self._log_seq
            injected = await self._pool.inject_fault(due.fault, gated=self._plan.gated)
        except FaultRefused as error:
            outcome = "impossible" if error.fields.get("what") == "impossible" else "refused"
            self.progress.faults.append(replace(record, outcome=outcome, why=str(error)))
            return
        except PoolError as error:
            self.progress.faults.append(replace(record, why=str(error)))
            return
        if due.fault.kind is FaultKind.CLOCK_STEP:
            ahead = CLOCK_STEP_SECONDS[due.fault.intensity]
            self._steps_of_clock.append(self._steps_of_clock[-1] + ahead)
        elif due.fault.kind is FaultKind.SUPERVISOR_DEATH:
            self._steps_of_clock.append(0.0)  # the next one's clock is right again
        engine = self._engines.get(injected.target, "")
        self.progress.faults.append(
            replace(record, outcome="unseen", injected=injected, engine=engine)
        )
        watching = asyncio.create_task(self._watch(record.number, injected, before), name="watch")
        self._sampling.add(watching)
        watching.add_done_callback(self._sampling.discard)

    async def _until_noticed(self) -> None:
        """Wait until the supervisor knows of the last fault, if it must come to know."""
        made = [record.injected for record in self.progress.faults if record.injected is not None]
        if made and made[-1].fault.kind is FaultKind.FULL_DISK and made[-1].until is not None:
            await asyncio.sleep(made[-1].until - time.time())  # nothing could be logged meanwhile
        if not made or not made[-1].fault.dose.noticed:
            return
        quiet = made[-1].fault.dose.quiet
        deadline = time.monotonic() + (_QUIET_SECONDS if quiet else _NOTICED_SECONDS)
        while time.monotonic() < deadline:
            await self._read_log()
            if any(
                (failure.browser_id, failure.epoch) == (made[-1].target, made[-1].epoch)
                and failure.at >= made[-1].at - _SKEW_SECONDS
                for failure in self._noticed
            ):
                return
            await asyncio.sleep(_SETTLE_POLL_SECONDS)

    async def _before(self, due: Due) -> _Before:
        match due.fault.kind:
            case FaultKind.SUPERVISOR_DEATH:
                return _Before(term=(await self._pool.control()).term)
            case FaultKind.MEMORY_EXHAUSTION:
                return _Before(tree_bytes=await self._tree_bytes(due.fault.target))
            case FaultKind.CLOCK_STEP:
                return _Before(skew_seconds=await self._skew())
        return _Before()

    async def _skew(self) -> float:
        """How far the supervisor's clock is ahead of ours, by what it logs now."""
        await self._have_something_logged()
        await self._read_log()
        return self._last_logged[0] - self._last_logged[1]

    async def _watch(self, number: int, injected: Injected, before: _Before) -> None:
        """See what a fault did, with other eyes than those of whoever made it."""
        kind = injected.fault.kind
        grows = kind is FaultKind.MEMORY_EXHAUSTION
        if kind is FaultKind.FULL_DISK:
            await self._have_something_logged()  # or not, which is the point
        delay = injected.at + (_GROWN_SECONDS if grows else 0.0) - time.time()
        await asyncio.sleep(max(delay, 0.01))
        processes = _states(injected)
        deadline = time.monotonic() + (_ENDED_SECONDS if kind in ENDS else 0.0)
        # The kernel tells of a process's end only whoever started it.
        while set(processes.values()) - {GONE} and time.monotonic() < deadline:
            await asyncio.sleep(_ENDED_POLL_SECONDS)
            processes = _states(injected)
        seen = Seen(processes)
        with contextlib.suppress(PoolError, TimeoutError):
            async with asyncio.timeout(_SUPERVISOR_AWAY_SECONDS):
                seen = await self._seen_by_others(seen, injected, before)
        self._seen[number] = seen
        if kind is FaultKind.NODE_DEATH:
            await asyncio.to_thread(self._on_node_death)

    async def _seen_by_others(self, seen: Seen, injected: Injected, before: _Before) -> Seen:
        match injected.fault.kind:
            case FaultKind.SUPERVISOR_DEATH:
                while (term := (await self._pool.control()).term) <= before.term:  # noqa: ASYNC110
                    await asyncio.sleep(_SETTLE_POLL_SECONDS)
                return replace(seen, term_before=before.term, term_after=term)
            case FaultKind.MEMORY_EXHAUSTION:
                grown = await self._tree_bytes(injected.target) - before.tree_bytes
                return replace(seen, grown_bytes=grown)
            case FaultKind.TAB_HIDDEN:
                found = await self._pool.examine(injected.target, screenshot=False)
                return replace(seen, visibility=found.visibility)
            case FaultKind.CLOCK_STEP:
                return replace(seen, skew_seconds=await self._skew() - before.skew_seconds)
        return seen

    async def _have_something_logged(self) -> None:
        """Order what is so already: an event that changes nothing, but has to be logged."""
        for name in self._pool.models()[:1]:
            with contextlib.suppress(PoolError):
                await self._pool.order_again(name)

    async def _tree_bytes(self, browser_id: str) -> int:
        return (await self._pool.state()).memory_bytes.get(browser_id, 0)

    def _finish_faults(self) -> None:
        """Weigh what was seen of each fault, now that all that came of it is logged."""
        for at, record in enumerate(self.progress.faults):
            if record.injected is not None:
                self.progress.faults[at] = self._finished(record, record.injected)

    def _finished(self, record: FaultRecord, injected: Injected) -> FaultRecord:
        target = injected.target
        after = self._next_on(record)  # what is noticed from then on is of that one
        until = after.injected.at if after is not None and after.injected else math.inf
        last = self._marks[after.number] if after is not None else math.inf
        noticed = [
            failure
            for failure in self._noticed
            if failure.browser_id == target
            and failure.epoch >= injected.epoch
            and self._marks[record.number] < failure.seq <= last
        ]
        hit = [
            strike
            for strike in self._strikes
            if (strike.browser_id, strike.epoch) == (target, injected.epoch)
            and injected.at - _SKEW_SECONDS <= strike.at < until
        ]
        wrong = [op for op in self.progress.operations if op.wrong and op.browser_id == target]
        answers = [strike.category for strike in hit] + ["wrong"] * len(wrong)
        seen = replace(self._seen.get(record.number, Seen()), noticed=noticed, answers=answers)
        shown = evidence(injected, seen)
        repair = self._repair_of(injected, until)
        aimed_at_browser = KINDS[injected.fault.kind].place is Place.BROWSER
        return replace(
            record,
            outcome="happened" if shown else "unseen",
            evidence=shown,
            noticed=tuple(failure.category for failure in noticed),
            noticed_ms=(noticed[0].at - injected.at) * 1e3 if noticed else None,
            right=judged(injected, noticed) if aimed_at_browser else None,
            ladder=_ladder(repair.repair) if repair else (),
            repair_seconds=repair.ready - repair.began if repair and repair.ready else None,
            struck=tuple(dict.fromkeys(strike.number for strike in hit)),
        )

    def _next_on(self, record: FaultRecord) -> FaultRecord | None:
        """The next fault that was made on the same slot."""
        made = record.injected
        for other in self.progress.faults[record.number + 1 :]:
            if made and other.injected and other.injected.target == made.target:
                return other
        return None

    def _repair_of(self, injected: Injected, until: float) -> _Repaired | None:
        """The last repair that was begun because of a fault."""
        found = [
            repaired
            for (browser_id, epoch, _), repaired in self._repairs.items()
            if (browser_id, epoch) == (injected.target, injected.epoch)
            and injected.at - _SKEW_SECONDS <= repaired.began < until
        ]
        return max(found, key=lambda repaired: repaired.began, default=None)

    # -- looking ----------------------------------------------------------------------------------

    async def _whole(self, seconds: float) -> bool:
        """Wait until every browser is in service, or replaced, with all its models."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(PoolError):
                state = await self._pool.control()
                self._take_repairs(state)
                if is_whole(state):
                    await self._look_at_browsers()
                    return True
            await asyncio.sleep(_SETTLE_POLL_SECONDS)
        return False

    async def _look_at_browsers(self) -> None:
        with contextlib.suppress(PoolError):
            view = await self._pool.state()
            self._traces.note(view.launches.values())
            self._take_repairs(view.control)
            for record in view.control.browsers.values():
                self._engines[record.id] = str(record.kind)
                if record.facts is not None:
                    self._products[record.id] = f"{record.facts.product} {record.facts.version}"
        await self._read_log()

    def _take_repairs(self, state: PoolState) -> None:
        for repair in state.repairs:
            key = (repair.browser_id, repair.from_epoch, repair.began)
            if key not in self._repairs:
                ready = None if repair.ready is None else self._ours(repair.ready)
                self._repairs[key] = _Repaired(self._ours(repair.began), ready, repair)

    def _ours(self, at: float) -> float:
        """A moment of the supervisor's clock, which may have been stepped, by our clock."""
        now = time.time()
        return min((at - ahead for ahead in self._steps_of_clock), key=lambda t: abs(t - now))

    async def _read_log(self) -> None:
        folder = self._pool.log_folder
        if folder is None:
            return
        with contextlib.suppress(PoolError, OSError):
            events = await asyncio.to_thread(lambda: list(log.show(folder, self._log_seq + 1)))
            for event in events:
                if event.get("type") == "unreadable":
                    continue
                self._log_seq = max(self._log_seq, int(event["seq"]))
                self._last_logged = (float(event["at"]), time.time())
                if (failure := _noticed(event)) is not None:
                    self._noticed.append(replace(failure, at=self._ours(failure.at)))

    async def _sample(self, operations: int) -> None:
        with contextlib.suppress(PoolError):
            self._memory.append(await self._memory_sample(operations))

    async def _memory_sample(self, operations: int) -> MemorySample:
        pids: dict[str, int] = {"client": os.getpid()}
        workers, browsers = 0, 0
        with contextlib.suppress(PoolError):
            pids |= await self._pool.control_pids()
            view = await self._pool.state()
            self._traces.note(view.launches.values())
            workers = sum(_rss(report.pids.get("worker", 0)) for report in view.launches.values())
            browsers = sum(view.memory_bytes.values())
        control = {name: _rss(pid) for name, pid in pids.items()}
        return MemorySample(operations, time.monotonic() - self._began, control, workers, browsers)


def _due(schedule: Schedule, clock: Clock) -> list[Due]:
    return sorted((due for due in schedule.faults if due.clock is clock), key=lambda due: due.when)


def is_whole(state: PoolState) -> bool:
    """Whether every browser that is wanted is in service, or another in its place, and has all."""
    records = state.browsers.values()
    if any(record.repair is not None or record.phase in COMING for record in records):
        return False
    if any(record.phase is Phase.GIVEN_UP and not record.replaced_by for record in records):
        return False
    loading = (ModelPhase.LOADING,)
    serving = [record for record in records if record.phase is Phase.READY]
    return bool(serving) and not any(
        phase in loading for record in serving for phase in record.models.values()
    )


def _states(injected: Injected) -> dict[int, str]:
    """What the kernel says of the processes that were hit. They must be on this machine."""
    return {pid: _state(pid, injected) for pid in injected.pids}


def _state(pid: int, injected: Injected) -> str:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE or process.create_time() > injected.at + 1.0:
            return GONE
        if process.status() == psutil.STATUS_STOPPED:
            return STOPPED
        if injected.fault.kind is FaultKind.FULL_DISK:
            return "mute" if process.rlimit(psutil.RLIMIT_FSIZE)[0] == 0 else "there"
        if injected.fault.kind is FaultKind.MEMORY_EXHAUSTION:
            limited = process.rlimit(psutil.RLIMIT_DATA)[0] != psutil.RLIM_INFINITY
            return "limited" if limited else "there"
    except psutil.NoSuchProcess:
        return GONE
    except psutil.AccessDenied:
        return "there"
    return "there"


def _rss(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0


def _noticed(event: Mapping[str, Any]) -> Noticed | None:
    body = event["body"]
    failure = body.get("failure") if isinstance(body, Mapping) else None
    if not isinstance(failure, Mapping) or "browser_id" not in body:
        return None
    return Noticed(
        str(body["browser_id"]),
        int(body.get("epoch", -1)),
        str(failure["category"]),
        str(failure.get("evidence", {}).get("what", "")),
        float(failure["at"]),
        str(body.get("model", "")),
        int(event["seq"]),
    )


def _strikes(number: int, result: Result) -> list[_Strike]:
    found = []
    for step in result.recovery:
        failure = step.failure
        if failure is not None and failure.ref is not None:
            too_large = failure.evidence.get("what") == "too_large"
            word = "too_large" if too_large else str(failure.category)
            ref = failure.ref
            found.append(_Strike(number, word, ref.browser_id, ref.epoch, failure.at))
    return found


def _failed(error: Exception, op_id: str, question: Question) -> Result:
    said, none = repr(error), ORDER[0]
    return Result(
        op_id, question.model, question.op, success=False, level_effective=none, error=said
    )


def _ladder(repair: Repair | None) -> tuple[str, ...]:
    if repair is None:
        return ()
    return tuple(
        " and ".join(f"{int(rung)} {RecoveryLevel(rung).name}" for rung in step.rungs)
        + ("" if step.worked else " (failed)")
        for step in repair.steps
    )
