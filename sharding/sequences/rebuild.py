"""Rebuilding a lost stage: its caches are restored from copies, or made by replaying steps.

The steps are replayed as they were first run, since other steps give other bits. This module must
not choose the browser (`sharding.sequences.copies` does) nor decide that a stage is lost.
"""

from __future__ import annotations

import contextlib

from sharding.sequences.barrier import Barrier
from sharding.sequences.caches import StepOrder
from sharding.sequences.context import StageContext
from sharding.sequences.copies import Copy
from sharding.sequences.history import StageHistory
from sharding.sequences.hosts import StepReply


class Rebuild:
    """Brings copies of one stage to the current position, from the kept `history`."""

    def __init__(
        self, context: StageContext, history: StageHistory, barrier: Barrier | None
    ) -> None:
        self._context = context
        self._history = history
        self._barrier = barrier

    async def catch_up(self, copy: Copy, position: int, seconds: float) -> StepReply | None:
        """Bring a new copy to `position`. Returns the reply that failed, if one did."""
        context = self._context
        hosts, model, sequence = context.hosts, context.stage.model, context.sequence
        began, covered = context.events.clock(), self._history.covered
        with self._barrier.rebuilding() if self._barrier else contextlib.nullcontext():
            if covered:
                caches = self._history.caches()
                order = StepOrder(sequence, "restore", copy.fence, covered)
                reply = await hosts.take(copy.ref, model, order, caches, seconds)
                if reply.tensors is None:
                    return reply
                copy.position = covered
            rest = self._history.rest(position)
            for step in rest:
                if step.position < copy.position:
                    continue
                order = StepOrder(sequence, "step", copy.fence, step.position, step.tokens)
                reply = await hosts.take(copy.ref, model, order, step.tensors, seconds)
                if reply.tensors is None:
                    return reply
                copy.position = step.position + step.tokens
        what = "restored" if covered else "replayed"
        outcome = f"{covered} positions copied, {len(rest)} steps replayed"
        context.record(what, copy.ref, position, began, outcome)
        return None
