"""Finds the process that serves the page: the one that uses CPU time when the page works.

Engines keep spare page processes, whose end is irrelevant. This module must not watch a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from actors.driver.processes import busiest, cpu_seconds

_AGAIN_SECONDS = 0.5  # between two attempts


class PageProcess:
    """`pid` is the process that serves the page; 0 while unknown."""

    def __init__(
        self,
        clock: Callable[[], float],
        usage: Callable[[Iterable[int]], dict[int, float]] = cpu_seconds,
    ) -> None:
        self._clock = clock
        self._usage = usage
        self.reset()

    def reset(self) -> None:
        """Start over, for another browser."""
        self.pid = 0
        self.candidates: tuple[int, ...] = ()  # that may serve the page
        self._used: dict[int, float] = {}  # CPU seconds of each at the last measurement
        self._looked_at = -math.inf

    def measure(self) -> dict[int, float]:
        """CPU seconds of the candidates, to compare after some work; {} once `pid` is known."""
        return {} if self.pid else self._usage(self.candidates)

    def name(self, used: Mapping[int, float]) -> None:
        """Determine the process that serves the page: the one that has worked since `used`.

        The first load is the best evidence, as it also compiles the runtime; if another process
        was busy meanwhile, later operations decide.
        """
        if self.pid or not self.candidates:
            return
        now = self._usage(self.candidates)
        self.pid = busiest(used, now)
        self._used, self._looked_at = now, self._clock()

    def worked(self) -> None:
        """The page has answered an operation: try again if `pid` is unknown."""
        if not self.pid and self._clock() - self._looked_at > _AGAIN_SECONDS:
            self.name(self._used)

    def forget(self, pid: int) -> None:
        """Drop a candidate that has ended; its pid may be reused."""
        self.candidates = tuple(other for other in self.candidates if other != pid)
