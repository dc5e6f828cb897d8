"""Converts times of the supervisor's clock, which a fault may have stepped, to the client's.

This module must not step any clock: it only records steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from recovery.faults import CLOCK_STEP_SECONDS, Fault, FaultKind

SKEW_SECONDS = 0.01  # between the clocks of processes of one machine


class SupervisorClock:
    """How far the supervisor's clock is ahead of the client's. `now`: the client's, in seconds."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._steps = [0.0]  # seconds ahead, after each step

    def note(self, fault: Fault) -> None:
        """Record an injected fault, in case it changes the clock."""
        if fault.kind is FaultKind.CLOCK_STEP:
            self._steps.append(self._steps[-1] + CLOCK_STEP_SECONDS[fault.intensity])
        elif fault.kind is FaultKind.SUPERVISOR_DEATH:
            self._steps.append(0.0)  # the next supervisor's clock is right

    def ours(self, at: float) -> float:
        """A recent time of the supervisor's clock, converted to the client's clock."""
        now = self._now()
        return min((at - ahead for ahead in self._steps), key=lambda t: abs(t - now))
