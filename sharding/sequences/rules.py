"""The recovery rules of a sequence: its level and limits.

Plain data; this module must not know how the rules are applied.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recovery.kinds import Level
from recovery.voting import Tolerance


@dataclass(frozen=True)
class PipelineRules:
    """The recovery rules of a sequence.

    `step_seconds`: the time limit of each step, repairs included.
    `copy_bytes_max`: of the caches of one stage that are copied out of the browser (`high` and
    above); beyond it, inputs are kept instead. `history_bytes_max`: of the inputs kept for one
    sequence.
    """

    level: Level = Level.MEDIUM
    failures_max: int = 5  # of one step
    step_seconds: float = 60.0
    copy_bytes_max: int = 256 << 20
    history_bytes_max: int = 512 << 20
    tolerance: Tolerance = field(default_factory=Tolerance)
    strict: bool = True

    @property
    def keeping(self) -> bool:
        """Whether the caller keeps what is needed to rebuild a lost stage's caches."""
        return self.level not in (Level.NONE, Level.LOW)
