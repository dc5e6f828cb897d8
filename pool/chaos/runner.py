"""One chaos run: sends operations, injects faults by the schedule, and records the results.

It delegates: `asking` sends operations, `injections` triggers faults, `watch`, `observer`,
`control_log` and `memory` observe, `attribution` assigns observations to faults. Observing must
not delay operations. This module must not choose, inject or evaluate faults.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from pool.background import BackgroundTasks
from pool.chaos.asking import Asker, OnBadResult
from pool.chaos.attribution import Gathered, attributed
from pool.chaos.clock import SupervisorClock
from pool.chaos.control_log import ControlLogReader
from pool.chaos.injections import Injections
from pool.chaos.memory import MemorySampler
from pool.chaos.observer import Observer
from pool.chaos.plan import Plan, Progress
from pool.chaos.records import ChaosRun
from pool.chaos.watch import FaultWatch
from pool.chaos.workload import Workload
from pool.doctor import machine
from pool.leaks import Traces
from pool.pool import BrowserPool

_SAMPLE_EVERY = 20  # operations, between two memory samples


class ChaosRunner:
    """A run on a pool that is open, with `workload` loaded.

    `on_bad_result` is called with each failed or wrong result; `on_node_death`, which may block,
    after a node was killed: it may start another.
    """

    def __init__(
        self,
        pool: BrowserPool,
        workload: Workload,
        plan: Plan,
        *,
        on_bad_result: OnBadResult = lambda *_: None,
        on_node_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress = Progress()
        self._plan = plan
        self._began = time.monotonic()
        self._tasks = BackgroundTasks()  # observers, concurrent with the operations
        self._traces = Traces()
        clock = SupervisorClock()
        self._log = ControlLogReader(pool, clock)
        self._observer = Observer(pool, self._log, clock, self._traces)
        self._memory = MemorySampler(pool, self._traces, self._elapsed)
        self._watch = FaultWatch(pool, self._log, self._tasks, on_node_death)
        self._injections = Injections(
            pool,
            plan,
            self.progress,
            observer=self._observer,
            log=self._log,
            clock=clock,
            watch=self._watch,
        )
        self._asker = Asker(
            pool,
            workload,
            self.progress,
            seconds=plan.seconds,
            elapsed=self._elapsed,
            on_step=self._injections.on_step,
            on_bad_result=on_bad_result,
        )

    async def run(self) -> ChaosRun:
        """Carry out the run. The pool stays open; repairs are awaited, within a limit."""
        plan = self._plan
        await self._observer.look()
        await self._memory.take(0)
        self._began, began_at = time.monotonic(), time.time()
        numbers = iter(range(plan.operations))
        timed = asyncio.create_task(self._injections.in_time(self._elapsed), name="timed faults")
        try:
            await asyncio.gather(*(self._ask(numbers) for _ in range(plan.at_once)))
        finally:
            timed.cancel()
            await asyncio.gather(timed, return_exceptions=True)
        await self._injections.until_noticed()
        repaired = await self._observer.until_repaired()
        seconds = self._elapsed()
        errors = await self._tasks.finish()
        await self._memory.take(plan.operations)
        await self._log.read()
        self.progress.faults[:] = attributed(self.progress.faults, self._gathered())
        return ChaosRun(
            plan.schedule.seed,
            began_at,
            seconds,
            plan.settings,
            machine(),
            dict(self._observer.products),
            plan.schedule,
            tuple(sorted(self.progress.operations, key=lambda op: op.number)),
            tuple(sorted(self.progress.faults, key=lambda fault: fault.number)),
            tuple(self._memory.samples),
            repaired=repaired,
            notes=tuple(map(repr, errors)),
        )

    async def leaked(self) -> tuple[str, ...]:
        """What the run's browsers leaked; call it once the pool is closed."""
        return tuple(await self._traces.left())

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    async def _ask(self, numbers: Iterator[int]) -> None:
        for number in numbers:  # shared: each number is taken once
            self.progress.began = number + 1
            await self._injections.on_operation(number + 1)
            await self._asker.ask(number)
            if (number + 1) % _SAMPLE_EVERY == 0:
                self._tasks.start(self._memory.take(number + 1), "memory sample")

    def _gathered(self) -> Gathered:
        return Gathered(
            self._log.noticed,
            self._asker.strikes,
            self.progress.operations,
            self._observer.repairs,
            self._watch.seen,
            self._injections.marks,
        )
