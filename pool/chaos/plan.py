"""The parameters of a chaos run, and its progress.

Plain records. This module must not run operations or inject faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pool.chaos.records import FaultRecord, OpRecord
from recovery.faults import Clock, Due, Schedule


@dataclass(frozen=True)
class Plan:
    """The parameters of a run. `settle`: wait until every browser is ready before the next fault;
    `gated`: refuse faults on browsers whose circuit breaker is open; `seconds`: each operation's
    deadline."""

    schedule: Schedule
    operations: int
    at_once: int = 4
    gated: bool = True
    settle: bool = True
    seconds: float = 120.0
    settings: Mapping[str, str] = field(default_factory=dict)

    def due(self, clock: Clock) -> list[Due]:
        """The faults scheduled by this clock, in order."""
        faults = (due for due in self.schedule.faults if due.clock is clock)
        return sorted(faults, key=lambda due: due.when)


@dataclass
class Progress:
    """The progress of a run, for display."""

    began: int = 0
    operations: list[OpRecord] = field(default_factory=list)
    faults: list[FaultRecord] = field(default_factory=list)
    waiting_for: str = ""

    @property
    def failed(self) -> int:
        return sum(not op.success and not op.refused for op in self.operations)

    @property
    def wrong(self) -> int:
        return sum(op.wrong for op in self.operations)
