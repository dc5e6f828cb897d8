"""When a step is late enough to be hedged: sent to another browser, too.

At the levels that keep another browser ready, once for each step. This module must not read a
clock by itself, nor send anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from recovery.kinds import Level
from recovery.levels import REDUNDANT


class Hedge:
    """Whether one step, which `began` by `clock`, is late: after `late_seconds`."""

    def __init__(
        self, level: Level, began: float, late_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._level = level
        self._began = began
        self._late_seconds = late_seconds
        self._clock = clock
        self.taken = False  # whether the step has been hedged

    @property
    def late(self) -> bool:
        """Whether the step is late, or has been hedged."""
        return self.taken or self.until_late() <= 0

    def until_late(self) -> float:
        """Seconds until the hedge is due; infinite if there will be none."""
        if self.taken or self._level not in REDUNDANT:
            return math.inf
        return self._began + self._late_seconds - self._clock()
