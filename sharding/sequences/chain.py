"""A step along the chain of workers: one order to the first stage, one answer from the last.

Only while every stage is in one browser and all are at the same position. A chain repairs nothing:
if a step fails, the chain is left and the caller runs the step stage by stage. This module must not
do that itself, nor set the chain up (`StageHosts.chain` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recovery.levels import REDUNDANT
from recovery.voting import quorum
from sharding.models.frames import Array
from sharding.sequences.events import Events
from sharding.sequences.history import RecordedStep
from sharding.sequences.hosts import Chain, StageHosts, StagePlacement
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stage_worker import StageWorker
from sharding.sequences.stages import inputs_of_stage

_CHAIN_BREAKS_MAX = 3  # in a row, after which the chain is not used again
_CHAIN_PART = 0.25  # of the time for a step, after which the caller runs it stage by stage
_CHAIN_MIN = 2  # stages: a single one is called directly


class ChainedSteps:
    """The chain of one sequence of `model` through its stages' workers, while there is one."""

    def __init__(
        self,
        sequence: str,
        model: str,
        hosts: StageHosts,
        rules: PipelineRules,
        events: Events,
        workers: Sequence[StageWorker],
    ) -> None:
        self._sequence = sequence
        self._model = model
        self._hosts = hosts
        self._rules = rules
        self._events = events
        self._workers = workers
        self._chain: Chain | None = None
        self._breaks = 0  # in a row
        self._places: list[StagePlacement] | None = None  # of the chain, if there is one

    async def take(
        self, inputs: Mapping[str, Array], position: int, tokens: int
    ) -> Mapping[str, Array] | None:
        """The step's answer by the chain; None if there is no chain, or it failed."""
        chain = await self._current_chain(position)
        if chain is None:
            return None
        seconds, kind = self._rules.step_seconds * _CHAIN_PART, f"chain of {self._model}"
        if self._rules.level in REDUNDANT:
            seconds = min(self._hosts.late_after(kind, tokens), seconds)
        began = self._events.clock()
        found = await chain.step(position, tokens, inputs, seconds)
        if found is None:
            self._interrupted(chain, position, began)
            return None
        self._breaks = 0
        self._hosts.took(kind, tokens, self._events.clock() - began)
        answers, in_page_ms = found
        self._events.statistics.in_page_ms += in_page_ms
        handed: Mapping[str, Array] = {}
        for worker, answer in zip(self._workers, answers, strict=True):
            if self._rules.keeping:
                tensors = inputs_of_stage(worker.stage, inputs, handed)
                worker.absorb(RecordedStep(position, tokens, tensors), answer)
            worker.moved(position + tokens)
            handed = answer
        return handed

    def leave(self) -> None:
        """Stop using the chain, until it is set up again."""
        if self._chain is not None:
            self._chain.leave()
        self._chain = self._places = None

    async def _current_chain(self, position: int) -> Chain | None:
        """The chain through the stages' present places; None if there can be none."""
        if len(self._workers) < _CHAIN_MIN or self._breaks >= _CHAIN_BREAKS_MAX:
            return None
        if quorum(self._rules.level) > 1:
            return None
        places = [worker.place(position) for worker in self._workers]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            self.leave()
            return None
        if known != self._places:
            self.leave()
            self._chain = await self._hosts.chain(
                self._sequence, known, copies=self._rules.keeping, seconds=self._rules.step_seconds
            )
            self._places = known
        return self._chain

    def _interrupted(self, chain: Chain, position: int, began: float) -> None:
        self._breaks += 1
        why, failure = chain.trouble
        where = str(failure.ref) if failure is not None else ""
        self._events.record("interrupted", -1, where, position, began, why, failure)
        self.leave()
