"""The schedules of `tabpool chaos`, as plans: what the control plane sees of each of their faults.

This module must not draw a schedule (`recovery.faults` does).
"""

from __future__ import annotations

from collections.abc import Mapping

from recovery.faults import CLOCK_STEP_SECONDS, FaultKind, Intensity, Schedule
from recovery.faults import Clock as ScheduleClock
from tests.simulator.plans import Clock, Fault, FaultPlan, Kind

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
