"""The pool's browsers as a sequence sees them: `sharding.sequences.pipeline`'s host of stages.

This module must not choose a browser or a token: the pipeline does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.messages import RunRequest
from actors.relay import Hop
from pool.execution.latency import Latencies
from pool.routing import Routing
from recovery.errors import BrowserError
from recovery.failures import Failure, categorize_browser_failure
from recovery.records import HostRef, HostStatus
from sharding.models.frames import Array
from sharding.sequences.caches import StepOrder
from sharding.sequences.hosts import Chain, StagePlacement, StepReply

_FROZEN_GRACE_SECONDS = 1.0  # past a step's limit, before its browser is taken for frozen


class RoutedStages:
    """The pool's browsers, as a sequence sees them."""

    def __init__(
        self,
        routing: Routing,
        latencies: Latencies,
        client: str,
        digests: Mapping[str, str],
        *,
        on_wrong: Callable[[HostRef, Failure], None],
        on_stuck: Callable[[str], str],
    ) -> None:
        self._routing = routing
        self._latencies = latencies
        self._prefix = f"{client}/" if client else ""
        self._digests = digests
        self._on_wrong = on_wrong
        self._on_stuck = on_stuck
        self._orders = 0
        self._seen = routing.changes

    def hosts(self) -> Sequence[HostStatus]:
        self._seen = self._routing.changes
        return self._routing.candidates()

    async def take(
        self,
        ref: HostRef,
        model: str,
        order: StepOrder,
        tensors: Mapping[str, Array],
        seconds: float,
    ) -> StepReply:
        """One order to one browser; an error of it is a failure in the reply."""
        # Each order is asked under its own name: whether it was carried out already is for the
        # page to say, which has the caches.
        self._orders += 1
        op_id = f"{self._prefix}{order.sequence}:{self._orders}"
        digest = self._digests.get(model, "")
        request = RunRequest(op_id, ref, model, max(seconds, 0.001), digest, stage=order)
        try:
            async with asyncio.timeout(seconds + _FROZEN_GRACE_SECONDS):
                reply = await self._routing.run(ref, request, tensors)
        except (BrowserError, TimeoutError) as error:
            fields = error.fields if isinstance(error, BrowserError) else {}
            return StepReply(failure=self._failure(error, ref, op_id, **fields))
        if reply is None:
            return StepReply(failure=self._failure("it was replaced", ref, op_id, what="replaced"))
        await self._routing.learn(reply.status)
        if reply.failure is not None:
            return StepReply(failure=reply.failure)
        if reply.busy:
            return StepReply(busy=True)
        return StepReply(reply.outputs or {}, in_page_ms=reply.in_page_ms)

    def _failure(self, error: Exception | str, ref: HostRef, op_id: str, **facts: Any) -> Failure:
        return categorize_browser_failure(
            error, {**facts, "ref": ref, "op_id": op_id, "at": time.time()}
        )

    async def chain(
        self, sequence: str, placements: Sequence[StagePlacement], *, copies: bool, seconds: float
    ) -> Chain | None:
        hops = []
        for number, place in enumerate(placements):
            later = {spec.name for other in placements[number + 1 :] for spec in other.stage.shared}
            hops.append(
                Hop(
                    number,
                    place.ref,
                    place.stage.model,
                    self._digests.get(place.stage.model, ""),
                    place.fence,
                    tuple(spec.name for spec in (*place.stage.shared, *place.stage.receives)),
                    tuple(sorted(later)),
                    place.choice,
                    place.deltas,
                    copies,
                    seconds,
                )
            )
        return await self._routing.chain(sequence, hops)

    async def change(self, seconds: float) -> None:
        for model in self._digests:
            self._on_stuck(model)  # it may be parked
        await self._routing.change(seconds, self._seen)

    async def exclude(self, ref: HostRef) -> None:
        await self._routing.exclude(ref)

    def outvoted(self, ref: HostRef, failure: Failure) -> None:
        self._on_wrong(ref, failure)

    def took(self, model: str, tokens: int, seconds: float) -> None:
        self._latencies.note(_kind(model, tokens), seconds)

    def late_after(self, model: str, tokens: int) -> float:
        return self._latencies.late_after(_kind(model, tokens))

    def layers(self, model: str) -> tuple[int, int] | None:
        """Which layers of the uncut model a stage has, from and to (exclusive)."""
        order = self._routing.models().get(model)
        return order.spec.span if order is not None else None

    def ready(self) -> int:
        """How many browsers each stage has at least."""
        return min(
            sum(status.serves(model) for status in self._routing.candidates())
            for model in self._digests
        )


def _kind(model: str, tokens: int) -> object:
    return (model, tokens.bit_length())
