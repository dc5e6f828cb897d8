"""When a step is late, so that another browser is asked for it, too.

At the levels that keep another browser ready, once for each step. This module must not look at a
clock by itself, nor ask anybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from recovery.kinds import Level
from recovery.levels import REDUNDANT


class Hedge:
    """The patience with one step, which `began` by `clock` and is late after `late_seconds`."""

    def __init__(
        self, level: Level, began: float, late_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._level = level
        self._began = began
        self._late_seconds = late_seconds
        self._clock = clock
        self.taken = False  # whether another was asked because the step was late

    @property
    def late(self) -> bool:
        """By the time; a new copy, which has to be built first, is given as long again."""
        return self.taken or self.until_late() <= 0

    def until_late(self) -> float:
        """Seconds until another should be asked; infinite if none ever will be."""
        if self.taken or self._level not in REDUNDANT:
            return math.inf
        return self._began + self._late_seconds - self._clock()
