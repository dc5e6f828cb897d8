"""Which of a browser's processes serves our page: the one that works when the page does.

Engines keep spare page processes, whose end means nothing. This module must not watch a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from actors.driver.processes import busiest, cpu_seconds

_AGAIN_SECONDS = 0.5  # between two looks at which process serves the page


class PageProcess:
    """`pid` is the process that serves the page, once it has shown by its work; else 0."""

    def __init__(
        self,
        clock: Callable[[], float],
        usage: Callable[[Iterable[int]], dict[int, float]] = cpu_seconds,
    ) -> None:
        self._clock = clock
        self._usage = usage
        self.reset()

    def reset(self) -> None:
        """Another browser: nothing is known of it."""
        self.pid = 0
        self.candidates: tuple[int, ...] = ()  # that may serve the page
        self._used: dict[int, float] = {}  # by each of them, when last looked at
        self._looked_at = -math.inf

    def measure(self) -> dict[int, float]:
        """CPU seconds of the candidates, to be compared after some work; {} once it is known."""
        return {} if self.pid else self._usage(self.candidates)

    def name(self, used: Mapping[int, float]) -> None:
        """Find out which process serves the page: the one that has worked since `used`.

        The first load is the best evidence, as it compiles the runtime, too; where another
        process was busy meanwhile, the operations that follow tell.
        """
        if self.pid or not self.candidates:
            return
        now = self._usage(self.candidates)
        self.pid = busiest(used, now)
        self._used, self._looked_at = now, self._clock()

    def worked(self) -> None:
        """The page has answered an operation: it may show now, if it has not yet."""
        if not self.pid and self._clock() - self._looked_at > _AGAIN_SECONDS:
            self.name(self._used)

    def forget(self, pid: int) -> None:
        """That one has ended; its number may be another's soon."""
        self.candidates = tuple(other for other in self.candidates if other != pid)
