"""The answers to one step of a stage, and which of them is accepted.

Where replicas answer (`critical`), two must agree. This module must not request an answer, nor drop
a copy that gave a wrong one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from recovery.records import HostRef
from recovery.voting import Ballot, Elected, Undecided, count_votes, quorum
from sharding.models.frames import Array
from sharding.sequences.copies import Copy
from sharding.sequences.rules import PipelineRules


class Votes:
    """Each copy's answer to one step, in order of arrival."""

    def __init__(self, rules: PipelineRules) -> None:
        self._quorum = quorum(rules.level)
        self._tolerance = rules.tolerance
        self._answers: list[tuple[Copy, Mapping[str, Array]]] = []

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, copy: Copy, answer: Mapping[str, Array]) -> None:
        """One more answer."""
        self._answers.append((copy, answer))

    @property
    def short_of_quorum(self) -> bool:
        """Whether there are fewer answers than the level requires."""
        return len(self._answers) < self._quorum

    @property
    def first(self) -> tuple[Copy, Mapping[str, Array]]:
        """The copy that answered first, and its answer."""
        return self._answers[0]

    def voters(self) -> set[HostRef]:
        """The hosts that have answered."""
        return {copy.ref for copy, _ in self._answers}

    def count(self) -> Elected | Undecided:
        """The verdict on the answers so far."""
        ballots = [Ballot(copy.ref, copy.numeric, answer) for copy, answer in self._answers]
        return count_votes(ballots, self._tolerance)

    def spread(self) -> str:
        """How far the answers are apart, in words; empty if some agree."""
        verdict = self.count()
        return verdict.spread if isinstance(verdict, Undecided) else ""

    def answer_of(self, voter: HostRef) -> tuple[Copy, Mapping[str, Array]]:
        """This voter's copy and its answer."""
        return next((copy, answer) for copy, answer in self._answers if copy.ref == voter)

    def copies_of(self, voters: Collection[HostRef]) -> list[Copy]:
        """The copies of these voters."""
        return [copy for copy, _ in self._answers if copy.ref in voters]
