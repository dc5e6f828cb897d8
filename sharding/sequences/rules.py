"""How a sequence is to be kept alive: the level and the bounds that all its parts go by.

Plain data; this module must not know how the rules are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from recovery.kinds import Level
from recovery.voting import Tolerance


@dataclass(frozen=True)
class PipelineRules:
    """How a sequence is to be kept alive.

    `step_seconds`: within which each step must have an answer, repairs included.
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
        """Whether the caller keeps what would make a lost stage's caches again."""
        return self.level not in (Level.NONE, Level.LOW)
