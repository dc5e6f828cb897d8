"""The supervisor's clock, which a fault may have set forward or back, told by our own.

This module must not step any clock: it only remembers that one was stepped.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from recovery.faults import CLOCK_STEP_SECONDS, Fault, FaultKind

SKEW_SECONDS = 0.01  # between the clocks of processes of one machine


class SupervisorClock:
    """How far the supervisor's clock is, or was, ahead of ours. `now` is ours: wall time in s."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._steps = [0.0]  # how far it was ahead, one after the other; the last is how far it is

    def note(self, fault: Fault) -> None:
        """This fault was made, and may have been one of the clock."""
        if fault.kind is FaultKind.CLOCK_STEP:
            self._steps.append(self._steps[-1] + CLOCK_STEP_SECONDS[fault.intensity])
        elif fault.kind is FaultKind.SUPERVISOR_DEATH:
            self._steps.append(0.0)  # the next one's clock is right again

    def ours(self, at: float) -> float:
        """A moment of the supervisor's clock, by our clock. It is one not long ago."""
        now = self._now()
        return min((at - ahead for ahead in self._steps), key=lambda t: abs(t - now))
