"""The account of a sequence: what it has cost, and what happened to it besides its steps.

`Events` writes by the sequence's own clock, which began with it. This module must not decide
anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from recovery.failures import Failure

_EVENTS_MAX = 1000  # of what is told of one sequence


@dataclass(frozen=True)
class SequenceStep:
    """Something that happened to a sequence besides its steps; `at` and `seconds` since it began.

    `what`: "failed", "interrupted" (a step that went from browser to browser, which the caller then
    takes over; of no stage, -1), "restored" (from copies), "replayed" (from inputs), "hedged",
    "outvoted".
    """

    what: str
    stage: int
    where: str
    position: int
    at: float
    seconds: float
    outcome: str
    failure: Failure | None = None


@dataclass
class SequenceStatistics:
    """What a sequence has cost so far, in milliseconds and bytes; and what happened to it."""

    in_page_ms: float = 0.0
    steps: int = 0
    copied_bytes: int = 0
    history_bytes: int = 0
    events: deque[SequenceStep] = field(default_factory=lambda: deque(maxlen=_EVENTS_MAX))

    @property
    def first_failure(self) -> Failure | None:
        """The earliest failure that the sequence has met, whatever stage it struck."""
        met = [step.failure for step in self.events if step.failure is not None]
        return met[0] if met else None


class Events:
    """Tells what happens, in the order in which it is over."""

    def __init__(self, statistics: SequenceStatistics, clock: Callable[[], float]) -> None:
        self.statistics = statistics
        self.clock = clock
        self._began = clock()

    def tell(
        self,
        what: str,
        stage: int,
        where: str,
        position: int,
        since: float,
        outcome: str,
        failure: Failure | None = None,
    ) -> None:
        """`since`: when it began, by `clock`. The rest as in `SequenceStep`."""
        now = self.clock()
        self.statistics.events.append(
            SequenceStep(
                what, stage, where, position, since - self._began, now - since, outcome, failure
            )
        )
