"""Faults of the process that a supervisor runs in: its death, a full disk, a clock that jumps.

This module must not touch another process.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable

from actors.injection.signals import SIGNALS, end_self
from actors.injection.target import SELF_SECONDS, impossible
from recovery.faults import CLOCK_STEP_SECONDS, Fault, FaultKind, Injected, Intensity

_FULL_SECONDS = {Intensity.MILD: 1.0, Intensity.MODERATE: 3.0, Intensity.SEVERE: 10.0}


class SupervisorFailureInjector:
    """Injects faults into the supervisor's own process; also its wall clock."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._ahead_seconds = 0.0

    def wall(self) -> float:
        """The supervisor's wall time in seconds, injected clock steps included."""
        return self._wall() + self._ahead_seconds

    def inject(self, fault: Fault) -> Injected:
        """Inject `fault` into this process; returns what was done. Raises `FaultRefused`."""
        loop, how, at = asyncio.get_running_loop(), fault.intensity, self._wall()
        pids, until = (os.getpid(),), None
        match fault.kind:
            case FaultKind.SUPERVISOR_DEATH:
                at += SELF_SECONDS
                loop.call_later(SELF_SECONDS, end_self, SIGNALS[how])
            case FaultKind.FULL_DISK:
                # The kernel refuses all writes of this process to files.
                soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
                until = at + _FULL_SECONDS[how]
                restored = (resource.RLIMIT_FSIZE, (soft, hard))
                loop.call_later(_FULL_SECONDS[how], resource.setrlimit, *restored)
            case FaultKind.CLOCK_STEP:
                self._ahead_seconds += CLOCK_STEP_SECONDS[how]
            case _:
                raise impossible(fault, "it is a fault of a browser, not of the supervisor")
        return Injected(fault, at, fault.dose.what, "", -1, pids, until)
