"""What a chaos run is asked for, and how far it has come.

Plain records for whoever asks for a run or watches one. This module must not ask or break anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pool.chaos.records import FaultRecord, OpRecord
from recovery.faults import Clock, Due, Schedule


@dataclass(frozen=True)
class Plan:
    """What a run is asked for. `settle`: wait until every browser is back before the next fault;
    `gated`: leave browsers alone whose circuit is open; `seconds`: of each operation, at most."""

    schedule: Schedule
    operations: int
    at_once: int = 4
    gated: bool = True
    settle: bool = True
    seconds: float = 120.0
    settings: Mapping[str, str] = field(default_factory=dict)

    def due(self, clock: Clock) -> list[Due]:
        """The faults that happen by this clock, the first one first."""
        faults = (due for due in self.schedule.faults if due.clock is clock)
        return sorted(faults, key=lambda due: due.when)


@dataclass
class Progress:
    """How a run is going, for whoever watches it."""

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
