"""One stage of one sequence: gets its answer to every step, wherever it runs.

It joins four parts: the browsers at work (`copies`), the kept inputs and caches (`history`), the
rebuilding of a copy (`rebuild`), and the `race` of each step. This module must not know of other
stages.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from recovery.levels import REDUNDANT
from recovery.records import HostRef
from sharding.models.frames import Array
from sharding.sequences.barrier import Barrier
from sharding.sequences.caches import StepOrder
from sharding.sequences.context import StageContext
from sharding.sequences.copies import Copies, Copy, StageStatus
from sharding.sequences.history import BoundedStageHistory, RecordedStep, StageHistory
from sharding.sequences.hosts import StagePlacement, StepReply
from sharding.sequences.race import Race
from sharding.sequences.rebuild import Rebuild


class StageWorker:
    """A stage at work on a sequence. `choice` as in `StepOrder`, for every step."""

    def __init__(
        self,
        context: StageContext,
        choice: int | None,
        load: Counter[HostRef],
        barrier: Barrier | None,
    ) -> None:
        self.stage = context.stage
        self._context = context
        self._choice = choice
        rules = context.rules
        kept = StageHistory(
            context.stage, copies=rules.level in REDUNDANT, copy_bytes_max=rules.copy_bytes_max
        )
        self._history = BoundedStageHistory(kept, rules, context.events.statistics)
        self._copies = Copies(context, load)
        self._rebuild = Rebuild(context, kept, barrier)

    @property
    def at(self) -> HostRef | None:
        """The browser that gave its last answer."""
        return self._copies.at

    async def take(self, step: RecordedStep) -> Mapping[str, Array]:
        """The answer to a step: what the stage sends on, or its choice. Raises `SequenceLost`."""
        self._history.note(step)
        deltas = self._history.copying  # the same for every copy

        async def advance(copy: Copy, seconds: float, pause: float) -> StepReply:
            return await self._advance(copy, step, deltas, seconds, pause)

        race = Race(self._context, self._copies, step, advance)
        try:
            answer = await race.run()
        finally:
            race.release()
        self._history.copy(answer)
        return answer

    def place(self, position: int) -> StagePlacement | None:
        """Where the stage is, if it is in one browser only, at `position`."""
        copy = self._copies.only_at(position)
        if copy is None:
            return None
        return StagePlacement(self.stage, copy.ref, copy.fence, self._choice, self._history.copying)

    def absorb(self, step: RecordedStep, answer: Mapping[str, Array]) -> None:
        """Keep a step that was taken by the chain. Raises `SequenceLost`: too much is kept."""
        self._history.note(step)
        self._history.copy(answer)

    def moved(self, position: int) -> None:
        """The chain has moved the stage to `position`."""
        self._copies.moved(position)

    def end(self) -> None:
        """Have every browser forget the sequence, in the background."""
        self._copies.end()

    def status(self) -> StageStatus:
        """Where it is now, for monitoring."""
        return self._copies.status()

    async def _advance(
        self, copy: Copy, step: RecordedStep, deltas: bool, seconds: float, pause: float
    ) -> StepReply:
        """The copy's answer to a step, after it has caught up with the step's position."""
        hosts, model, clock = self._context.hosts, self.stage.model, self._context.events.clock
        copy.lag += 1
        try:
            async with copy.lock:  # also during the pause: the next step must not overtake this one
                await asyncio.sleep(pause)
                if copy.dropped:
                    return StepReply(busy=True)  # the reply is not used
                if copy.position < step.position:
                    lost = await self._rebuild.catch_up(copy, step.position, seconds)
                    if lost is not None:
                        return lost
                order = StepOrder(
                    self._context.sequence,
                    "step",
                    copy.fence,
                    step.position,
                    step.tokens,
                    self._choice,
                    deltas,
                )
                began = clock()
                reply = await hosts.take(copy.ref, model, order, step.tensors, seconds)
                if reply.tensors is not None:
                    copy.position, copy.built = step.position + step.tokens, True
                    hosts.took(model, step.tokens, clock() - began)
                return reply
        finally:
            copy.lag -= 1
