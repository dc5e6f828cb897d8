"""Has each fault of the schedule made when it is due, one at a time.

This module must not choose faults (`recovery.faults` draws them), make them (`actors.injector`
does), or say what one did (`watch` sees that).
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
    """The faults of one run. Each is written down in `progress` as soon as it was made or not."""

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
        self._striking = asyncio.Lock()
        self._marks: dict[int, int] = {}

    @property
    def marks(self) -> Mapping[int, int]:
        """A fault's number -> the log's last event before it."""
        return self._marks

    async def on_operation(self, begun: int) -> None:
        """So many operations have begun: make what is due by that."""
        await self._strike_due(self._operations_due, begun)

    async def on_step(self) -> None:
        """Another token has come: make what is due by that."""
        self._steps += 1
        await self._strike_due(self._steps_due, self._steps)

    async def in_time(self, elapsed: Callable[[], float]) -> None:
        """Make what is due by the seconds that have `elapsed`, until there is no more of it."""
        for due in self._plan.due(Clock.SECONDS):
            await asyncio.sleep(max(due.when - elapsed(), 0.0))
            async with self._striking:
                await self._strike(due)

    async def until_noticed(self) -> None:
        """Wait until the supervisor knows of the last fault, if it must come to know."""
        made = [r.injected for r in self._progress.faults if r.injected is not None]
        if made:
            await self._observer.until_noticed(made[-1])

    async def _strike_due(self, waiting: deque[Due], count: float) -> None:
        async with self._striking:  # whoever comes meanwhile waits until it has happened
            while waiting and waiting[0].when <= count:
                await self._strike(waiting.popleft())

    async def _strike(self, due: Due) -> None:
        progress = self._progress
        if self._plan.settle:
            progress.waiting_for = "every browser to be back"
            await self.until_noticed()
            await self._observer.until_whole()
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
