"""The statistics of a sequence, and its events: failures, repairs, hedges.

Times are in seconds since the sequence began. This module must not decide anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from recovery.failures import Failure

_EVENTS_MAX = 1000  # events kept for one sequence


@dataclass(frozen=True)
class SequenceStep:
    """An event of a sequence; `at`: seconds since the sequence began, `seconds`: its duration.

    `what`: "failed", "interrupted" (a step along the chain, which the caller then runs stage by
    stage; its `stage` is -1), "restored" (from copies), "replayed" (from inputs), "hedged",
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
    """What a sequence has used so far, in milliseconds and bytes; and its events."""

    in_page_ms: float = 0.0
    steps: int = 0
    copied_bytes: int = 0
    history_bytes: int = 0
    events: deque[SequenceStep] = field(default_factory=lambda: deque(maxlen=_EVENTS_MAX))

    @property
    def first_failure(self) -> Failure | None:
        """The earliest failure of any stage of the sequence."""
        failures = [step.failure for step in self.events if step.failure is not None]
        return failures[0] if failures else None


class Events:
    """Records the events of a sequence, in the order in which they end."""

    def __init__(self, statistics: SequenceStatistics, clock: Callable[[], float]) -> None:
        self.statistics = statistics
        self.clock = clock
        self._began = clock()

    def record(
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
