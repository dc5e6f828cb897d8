"""A step that goes by the chain of workers: one order to the first stage, one answer from the last.

Only while every stage is in one browser and all stand at one position. A chain repairs nothing:
when a step does not come through, it is left, and the caller asks stage by stage. This module must
not do that itself, nor lay the way (`StageHosts.chain` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recovery.levels import REDUNDANT
from recovery.sequences import QUORUM
from sharding.models.frames import Array
from sharding.sequences.events import Events
from sharding.sequences.history import RecordedStep
from sharding.sequences.hosts import Chain, StageHosts, StagePlacement
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stage_worker import StageWorker
from sharding.sequences.stages import inputs_of_stage

_CHAIN_BREAKS_MAX = 3  # in a row, after which the caller asks stage by stage for good
_CHAIN_PART = 0.25  # of the time for a step, after which the caller takes it over from a chain
_CHAIN_MIN = 2  # stages: a single one is asked at once


class ChainedSteps:
    """The way of one sequence of `model` through its stages' workers, as long as there is one."""

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
        self._places: list[StagePlacement] | None = (
            None  # that the chain leads through, if there is one
        )

    async def take(
        self, inputs: Mapping[str, Array], position: int, tokens: int
    ) -> Mapping[str, Array] | None:
        """The step's answer by the chain, while every stage is in one place; None: not so."""
        chain = await self._laid(position)
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
        """Go by it no more, until it is laid anew."""
        if self._chain is not None:
            self._chain.leave()
        self._chain = self._places = None

    async def _laid(self, position: int) -> Chain | None:
        """The chain through the places where the stages are now; None if there can be none."""
        places = [
            worker.place(position)
            for worker in (self._workers if QUORUM.get(self._rules.level, 1) == 1 else ())
        ]
        if len(places) < _CHAIN_MIN or self._breaks >= _CHAIN_BREAKS_MAX:
            return None
        whole = [place for place in places if place is not None]
        if len(whole) < len(places):
            self.leave()
            return None
        if whole != self._places:
            self.leave()
            self._chain = await self._hosts.chain(
                self._sequence, whole, copies=self._rules.keeping, seconds=self._rules.step_seconds
            )
            self._places = whole
        return self._chain

    def _interrupted(self, chain: Chain, position: int, began: float) -> None:
        self._breaks += 1
        why, failure = chain.trouble
        where = str(failure.ref) if failure is not None else ""
        self._events.tell("interrupted", -1, where, position, began, why, failure)
        self.leave()
