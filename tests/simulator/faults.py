"""How the faults of a plan are carried out, each when its clock says so.

This module must not draw faults, or judge what comes of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from actors.messages import RunRequest
from recovery.kinds import Readiness
from tests.simulator.clocks import Clocks
from tests.simulator.hosts import SimHost
from tests.simulator.log import Store
from tests.simulator.plans import NEVER, Clock, Fault, FaultPlan, Kind


class Faults:
    """The faults of one plan. Those that are due while it is not `active` wait until it is."""

    def __init__(
        self,
        plan: FaultPlan,
        hosts: Mapping[str, list[SimHost]],
        store: Store,
        clocks: Clocks,
        loop: asyncio.AbstractEventLoop,
        kill_supervisor: Callable[[float], bool],
    ) -> None:
        self._plan = plan
        self._hosts = hosts
        self._store = store
        self._clocks = clocks
        self._loop = loop
        self._kill_supervisor = kill_supervisor
        self._waiting = list(plan.faults)
        self._operations = 0
        self._failing: Counter[tuple[Kind, str]] = Counter()
        self.applied: Counter[str] = Counter()
        self.active = False  # whether faults may happen now
        self.last_fault = 0.0

    def takes(self, kind: Kind, browser_id: str) -> bool:
        """Whether this launch or load is one that fails."""
        if not self._failing[kind, browser_id]:
            return False
        self._failing[kind, browser_id] -= 1
        return True

    def _due(self, clock: Clock, count: float) -> list[Fault]:
        if not self.active:
            return []
        due = [fault for fault in self._waiting if fault.clock is clock and fault.when <= count]
        self._waiting = [fault for fault in self._waiting if fault not in due]
        return due

    def operation_began(self, host: SimHost, request: RunRequest) -> None:
        self._operations += 1
        for fault in self._due(Clock.OPERATIONS, self._operations):
            self.strike(fault, None if fault.target else host)

    def supervisor_dies_at(self, seq: int) -> Fault | None:
        due = self._due(Clock.EVENTS, seq)
        for fault in due:
            # Its last act, whether it is logged or not, is cut short in the log.
            self._loop.call_later(0.0008, self.strike, fault)
        return due[0] if due else None

    async def strike_in_time(self) -> None:
        for fault in sorted(self._plan.faults, key=lambda fault: fault.when):
            if fault.clock is Clock.SECONDS:
                await asyncio.sleep(max(fault.when - self._clocks.now, 0.0))
                for due in self._due(Clock.SECONDS, fault.when):
                    self.strike(due)

    def strike(self, fault: Fault, host: SimHost | None = None) -> None:
        lasts = fault.kind is not Kind.CLOCK_STEPS and fault.seconds < NEVER
        self.last_fault = self._clocks.now + (fault.seconds if lasts else 0.0)
        if fault.kind is Kind.SUPERVISOR_DEATH:
            self.applied[fault.kind] += self._kill_supervisor(fault.seconds)
        elif fault.kind is Kind.CLOCK_STEPS:
            self._clocks.step(fault.seconds)
            self.applied[fault.kind] += 1
        elif fault.kind is Kind.LOG_FULL:
            self._store.full = True
            self._loop.call_later(fault.seconds, setattr, self._store, "full", False)
            self.applied[fault.kind] += 1
        elif (host := host or self._victim(fault.target)) is not None:
            self.applied[fault.kind] += 1
            self._strike_host(fault, host)

    def _victim(self, target: str) -> SimHost | None:
        hosts = [host for hosts in self._hosts.values() for host in hosts if host.lives]
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
                self._failing[fault.kind, host.ref.browser_id] += fault.times
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
