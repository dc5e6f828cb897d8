"""Triggers each fault of the schedule when it is due, one at a time.

This module must not choose faults (`recovery.faults` does), inject them itself (`actors.injection`
does), or observe their effects (`watch` does).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from pool.chaos.clock import SupervisorClock
from pool.chaos.control_log import ControlLogReader
from pool.chaos.observer import Observer
from pool.chaos.plan import Plan, Progress
from pool.chaos.records import FaultRecord
from pool.chaos.watch import FaultWatch
from pool.pool import BrowserPool
from recovery.errors import FaultRefused, PoolError
from recovery.faults import Clock, Due


class Injections:
    """The faults of one run. Each is recorded in `progress` once injected or refused."""

    def __init__(
        self,
        pool: BrowserPool,
        plan: Plan,
        progress: Progress,
        *,
        observer: Observer,
        log: ControlLogReader,
        clock: SupervisorClock,
        watch: FaultWatch,
    ) -> None:
        self._pool = pool
        self._plan = plan
        self._progress = progress
        self._observer = observer
        self._log = log
        self._clock = clock
        self._watch = watch
        self._operations_due = deque(plan.due(Clock.OPERATIONS))
        self._steps_due = deque(plan.due(Clock.STEPS))
        self._steps = 0
        self._injecting = asyncio.Lock()
        self._marks: dict[int, int] = {}

    @property
    def marks(self) -> Mapping[int, int]:
        """The number of the log's last event before each fault, by the fault's number."""
        return self._marks

    async def on_operation(self, begun: int) -> None:
        """Inject the faults due after `begun` operations."""
        await self._inject_due(self._operations_due, begun)

    async def on_step(self) -> None:
        """Count another token, and inject the faults due by then."""
        self._steps += 1
        await self._inject_due(self._steps_due, self._steps)

    async def in_time(self, elapsed: Callable[[], float]) -> None:
        """Inject the faults that are due by time. `elapsed` returns seconds since the start."""
        for due in self._plan.due(Clock.SECONDS):
            await asyncio.sleep(max(due.when - elapsed(), 0.0))
            async with self._injecting:
                await self._inject(due)

    async def until_noticed(self) -> None:
        """Wait until the supervisor has detected the last fault, if it should."""
        injected = [r.injected for r in self._progress.faults if r.injected is not None]
        if injected:
            await self._observer.until_noticed(injected[-1])

    async def _inject_due(self, waiting: deque[Due], count: float) -> None:
        async with self._injecting:  # other operations wait until the fault is injected
            while waiting and waiting[0].when <= count:
                await self._inject(waiting.popleft())

    async def _inject(self, due: Due) -> None:
        progress = self._progress
        if self._plan.settle:
            progress.waiting_for = "all browsers to be ready"
            await self.until_noticed()
            await self._observer.until_repaired()
            progress.waiting_for = ""
        record = FaultRecord(len(progress.faults), due, "refused")
        try:
            before = await self._watch.before(due)
            await self._log.read()
            self._marks[record.number] = self._log.last_seq
            injected = await self._pool.inject_fault(due.fault, gated=self._plan.gated)
        except FaultRefused as error:
            outcome = "impossible" if error.fields.get("what") == "impossible" else "refused"
            progress.faults.append(replace(record, outcome=outcome, why=str(error)))
            return
        except PoolError as error:
            progress.faults.append(replace(record, why=str(error)))
            return
        self._clock.note(due.fault)
        engine = self._observer.engine_of(injected.target)
        progress.faults.append(replace(record, outcome="unseen", injected=injected, engine=engine))
        self._watch.start(record.number, injected, before)
