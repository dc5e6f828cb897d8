"""The history of one stage of a sequence, from which its caches can be rebuilt elsewhere.

The inputs of each original step, or copies of what each step added to the caches. Plain state; this
module must not know where the stage runs, nor send anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from recovery.errors import SequenceLost
from sharding.models.frames import Array
from sharding.sequences.caches import DELTA
from sharding.sequences.events import SequenceStatistics
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import Stage


@dataclass(frozen=True)
class RecordedStep:
    """One step as it was executed: replaying the same steps gives the same caches."""

    position: int
    tokens: int
    tensors: Mapping[str, Array]


class StageHistory:
    """What a caller keeps of one sequence's stage to rebuild its caches: inputs and copies.

    Copies are of the caches, joined from what each step added; the inputs of the steps that they
    cover are dropped. Without copies (or once they would be
    larger than `copy_bytes_max`) the inputs of all steps are kept.
    """

    def __init__(self, stage: Stage, *, copies: bool, copy_bytes_max: int) -> None:
        self._stage = stage
        self._steps: list[RecordedStep] = []
        self._deltas: list[Mapping[str, Array]] = []
        self._copying = copies and stage.copyable
        self._copy_bytes_max = copy_bytes_max
        self.covered = 0  # positions that the copies hold
        self.copy_bytes = 0
        self.step_bytes = 0

    @property
    def copying(self) -> bool:
        """Whether the next step should answer with what it adds to the caches."""
        return self._copying

    def note(self, step: RecordedStep) -> None:
        """Keep a step's inputs, before it is sent anywhere."""
        if not self._steps or self._steps[-1].position != step.position:
            self._steps.append(step)
            self.step_bytes += _bytes(step.tensors)

    def copy(self, answer: Mapping[str, Array]) -> None:
        """Keep what the last noted step added to the caches, in place of its inputs."""
        if not self._copying or not self._steps:
            return
        step = self._steps[-1]
        deltas = {
            # Copied: a view would keep the whole message in memory.
            cache.past: np.array(answer[DELTA + cache.past])
            for cache in self._stage.caches
            if DELTA + cache.past in answer
        }
        complete = len(deltas) == len(self._stage.caches) and step.position == self.covered
        if not complete or self.copy_bytes + _bytes(deltas) > self._copy_bytes_max:
            self._copying = False
            return
        self._deltas.append(deltas)
        self.copy_bytes += _bytes(deltas)
        self.covered = step.position + step.tokens
        self.step_bytes -= _bytes(self._steps.pop().tensors)

    def caches(self) -> dict[str, Array]:
        """The copied caches, of `covered` positions."""
        if len(self._deltas) > 1:
            joined = {
                cache.past: np.concatenate([d[cache.past] for d in self._deltas], axis=cache.axis)
                for cache in self._stage.caches
            }
            self._deltas = [joined]
        return dict(self._deltas[0]) if self._deltas else {}

    def rest(self, position: int) -> list[RecordedStep]:
        """The steps that lead from `covered` to `position`."""
        return [step for step in self._steps if step.position < position]


class BoundedStageHistory:
    """A stage's history within the bounds of its sequence, counted in the sequence's statistics."""

    def __init__(
        self, history: StageHistory, rules: PipelineRules, statistics: SequenceStatistics
    ) -> None:
        self._history = history
        self._rules = rules
        self._statistics = statistics
        self._step_bytes = self._copy_bytes = (
            0  # bytes in the history, as last added to the statistics
        )

    @property
    def copying(self) -> bool:
        """Whether the next step should answer with what it adds to the caches."""
        return self._history.copying

    def note(self, step: RecordedStep) -> None:
        """Keep a step's inputs, before it is sent. Raises `SequenceLost`: too much is kept."""
        if not self._rules.keeping:
            return
        self._history.note(step)
        self._tally()
        if self._statistics.history_bytes > self._rules.history_bytes_max:
            raise SequenceLost(
                f"the inputs kept of this sequence take {self._statistics.history_bytes:,} bytes; "
                f"the limit is {self._rules.history_bytes_max:,}. Ask for fewer tokens.",
            )

    def copy(self, answer: Mapping[str, Array]) -> None:
        """Keep what the last noted step added to the caches."""
        if self._rules.keeping:
            self._history.copy(answer)
            self._tally()

    def _tally(self) -> None:
        step_bytes, copy_bytes = self._history.step_bytes, self._history.copy_bytes
        self._statistics.history_bytes += step_bytes - self._step_bytes
        self._statistics.copied_bytes += copy_bytes - self._copy_bytes
        self._step_bytes, self._copy_bytes = step_bytes, copy_bytes


def _bytes(tensors: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in tensors.values())
