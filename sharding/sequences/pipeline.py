"""The generation of one sequence over the stages of a model, step by step, despite failures.

`Generation` is the coordinator of one sequence. It runs in the caller and holds all that is needed
to continue: a worker for each stage (`stage_worker`), the chain that a step may take (`chain`), and
the statistics and events (`events`). This module must not know how a browser is
reached (`StageHosts` does), and must not repair one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from recovery.errors import PageError, SequenceLost
from recovery.failures import Failure
from recovery.records import HostRef
from sharding.models.frames import Array
from sharding.sequences.barrier import Barrier
from sharding.sequences.caches import CHOICE_IDS, CHOICE_SCORES
from sharding.sequences.chain import ChainedSteps
from sharding.sequences.context import StageContext
from sharding.sequences.copies import StageStatus
from sharding.sequences.decoding import Decoding, choose
from sharding.sequences.events import Events, SequenceStatistics
from sharding.sequences.history import RecordedStep
from sharding.sequences.hosts import StageHosts
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stage_worker import StageWorker
from sharding.sequences.stages import StagePipeline, inputs_of_stage


@dataclass(frozen=True)
class Token:
    """One new token. `scores` (vocabulary,) if they were asked for."""

    id: int
    position: int
    scores: Array | None = None
    step_ms: float = 0.0  # from the start of the step to its answer
    in_page_ms: float = 0.0  # of these, in all pages


class Generation:
    """One sequence of one model, from its prompt to its last token."""

    def __init__(
        self,
        sequence: str,
        pipeline: StagePipeline,
        hosts: StageHosts,
        rules: PipelineRules,
        decoding: Decoding,
        *,
        barrier: Barrier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipeline = pipeline
        self._decoding = decoding
        self._barrier = barrier
        self._clock = clock
        self.statistics = SequenceStatistics()
        events = Events(self.statistics, clock)
        load: Counter[HostRef] = Counter()  # stages of this sequence, by browser
        self._workers = [
            StageWorker(
                StageContext(sequence, index, stage, hosts, rules, events),
                decoding.candidates if stage.last else None,
                load,
                barrier,
            )
            for index, stage in enumerate(pipeline.stages)
        ]
        self._chained = ChainedSteps(sequence, pipeline.model, hosts, rules, events, self._workers)

    async def tokens(self, prompt: Sequence[int]) -> AsyncGenerator[Token]:
        """The new tokens, each as soon as it is chosen. Raises `SequenceLost`.

        Ends after `max_new_tokens`, or with the first token of `decoding.stop`. In any case
        the browsers are told to forget the sequence.
        """
        ids, position = list(prompt), 0
        try:
            for _ in range(self._decoding.max_new_tokens):
                if self._barrier is not None:
                    await self._barrier.passable()
                began, in_page = self._clock(), self.statistics.in_page_ms
                answer = await self._step(ids, position)
                took_ms = (self._clock() - began) * 1e3
                position += len(ids)
                token = self._chosen(answer, position)
                row = _in_order(answer) if self._decoding.logits else None
                yield Token(token, position, row, took_ms, self.statistics.in_page_ms - in_page)
                if token in self._decoding.stop:
                    return
                ids = [token]
        finally:
            self._chained.leave()
            for worker in self._workers:
                worker.end()

    def _chosen(self, answer: Mapping[str, Array], position: int) -> int:
        try:
            return choose(answer[CHOICE_IDS], answer[CHOICE_SCORES], self._decoding, position)
        except PageError as error:
            raise SequenceLost(f"position {position}: {error}") from error

    def where(self) -> list[HostRef]:
        """The browser of each stage that has answered."""
        return [worker.at for worker in self._workers if worker.at is not None]

    def statuses(self) -> list[StageStatus]:
        """Where every stage is now, for monitoring."""
        return [worker.status() for worker in self._workers]

    @property
    def first_failure(self) -> Failure | None:
        """The earliest failure of any stage of the sequence."""
        return self.statistics.first_failure

    async def _step(self, ids: Sequence[int], position: int) -> Mapping[str, Array]:
        inputs = self._pipeline.inputs_of_step(ids, position)
        answer = await self._chained.take(inputs, position, len(ids))
        if answer is None:
            answer = await self._stage_by_stage(inputs, position, len(ids))
        self.statistics.steps += 1
        return answer

    async def _stage_by_stage(
        self, inputs: Mapping[str, Array], position: int, tokens: int
    ) -> Mapping[str, Array]:
        """The caller runs each stage in turn, and rebuilds it if necessary.

        A page that has already executed this step repeats its answer without computing.
        """
        handed: Mapping[str, Array] = {}
        for worker in self._workers:
            tensors = inputs_of_stage(worker.stage, inputs, handed)
            handed = await worker.take(RecordedStep(position, tokens, tensors))
        return handed


def _in_order(answer: Mapping[str, Array]) -> Array:
    """All scores by token id, from all candidates."""
    row = answer[CHOICE_SCORES].copy()
    row[answer[CHOICE_IDS]] = answer[CHOICE_SCORES]
    return row
