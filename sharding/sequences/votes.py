"""The answers to one step of a stage, and which of them may be believed.

Where replicas answer (`critical`), two that agree elect one. This module must not ask for an answer
nor let go of whoever gave a wrong one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from recovery.records import HostRef
from recovery.sequences import QUORUM
from recovery.voting import Ballot, Elected, Undecided, count_votes
from sharding.models.frames import Array
from sharding.sequences.copies import Copy
from sharding.sequences.rules import PipelineRules


class Votes:
    """What each copy answered to one step, in the order in which it came."""

    def __init__(self, rules: PipelineRules) -> None:
        self._quorum = QUORUM.get(rules.level, 1)
        self._tolerance = rules.tolerance
        self._answers: list[tuple[Copy, Mapping[str, Array]]] = []

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, copy: Copy, answer: Mapping[str, Array]) -> None:
        """One more answer."""
        self._answers.append((copy, answer))

    @property
    def few(self) -> bool:
        """Fewer than the level believes."""
        return len(self._answers) < self._quorum

    @property
    def first(self) -> tuple[Copy, Mapping[str, Array]]:
        """The copy that answered first, and what."""
        return self._answers[0]

    def voters(self) -> set[HostRef]:
        """Who has answered."""
        return {copy.ref for copy, _ in self._answers}

    def count(self) -> Elected | Undecided:
        """What the answers so far come to."""
        ballots = [Ballot(copy.ref, copy.numeric, answer) for copy, answer in self._answers]
        return count_votes(ballots, self._tolerance)

    def spread(self) -> str:
        """How far the answers are apart, in words; nothing if some agree."""
        verdict = self.count()
        return verdict.spread if isinstance(verdict, Undecided) else ""

    def of(self, voter: HostRef) -> tuple[Copy, Mapping[str, Array]]:
        """Whose answer this voter's is, and the answer."""
        return next((copy, answer) for copy, answer in self._answers if copy.ref == voter)

    def by(self, voters: Collection[HostRef]) -> list[Copy]:
        """The copies of these voters."""
        return [copy for copy, _ in self._answers if copy.ref in voters]
