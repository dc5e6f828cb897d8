"""One part of a model, or a whole one, asked through the answering loop.

This module must not choose a browser, and knows no operation's meaning.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from pool.execution.answering import Answering, Question, Rules, Simulate, Tensors
from pool.execution.latency import Latencies
from pool.results import Result
from pool.routing import Routing
from recovery.errors import MessageTooLarge
from recovery.failures import Failure
from recovery.kinds import Level
from recovery.levels import REDUNDANT
from recovery.records import HostRef
from sharding.models.frames import Array, Frame, encoded_size
from sharding.models.inputs import unequal_dimensions
from sharding.models.signature import ModelSpec


@dataclass(frozen=True)
class PartRequests:
    """How one operation's requests are sent and answered. `simulation`: the native last resort."""

    routing: Routing
    latencies: Latencies
    rng: random.Random
    client: str
    level: Level
    rules: Rules
    message_bytes_max: int
    on_wrong: Callable[[HostRef, Failure], None]
    on_audit: Callable[[asyncio.Task[None]], None]
    on_stuck: Callable[[str], str]
    simulation: Callable[[ModelSpec], Simulate | None]

    def check_size(self, model: str, tensors: Tensors) -> int:
        """The bytes that these inputs take on the wire. Raises `MessageTooLarge`."""
        size = encoded_size(Frame("run", tensors=tensors, body={"model": model}))
        if size > self.message_bytes_max:
            raise MessageTooLarge(
                f"these inputs make a message of {size} bytes; the limit (message_bytes_max) is "
                f"{self.message_bytes_max}. Send a smaller batch, or raise the limit.",
                expected=self.message_bytes_max,
                got=size,
            )
        return size

    async def request(
        self, op_id: str, op: str, spec: ModelSpec, tensors: Tensors, seconds: float
    ) -> Result:
        """The one answer of one part within `seconds`: its outputs, in the order of its graph.

        Raises `PoolBusy`, and `MessageTooLarge`.
        """
        size = self.check_size(spec.name, tensors)
        kind = (spec.digest, op, self.level, size)
        late = self.latencies.late_after(kind) if self.level in REDUNDANT else math.inf
        answering = Answering(
            Question(op_id, spec.name, op, self.level, spec.digest, self.client, spec.tolerance),
            replace(self.rules, late_seconds=min(late, seconds / 2)),
            self.routing,
            self.rng,
            on_wrong=self.on_wrong,
            on_audit=self.on_audit,
            on_stuck=partial(self.on_stuck, spec.name),
            simulate=self.simulation(spec),
        )
        result, reply = await answering.run(tensors, seconds)
        if result.success and reply is not None:
            result = replace(result, values=in_graph_order(spec, reply.outputs or {}))
            if result.original_error is None:  # of a late one, so long at least
                self.latencies.note(kind, result.metrics["duration_ms"] / 1e3)
        elif unequal := unequal_dimensions(spec, tensors):
            result = replace(result, error=f"{result.error} (of these inputs, {unequal})")
        return replace(result, metrics={**result.metrics, "bytes_in": float(size)})


def in_graph_order(spec: ModelSpec, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs as the graph declares them: on their way they were sorted by element size."""
    declared = [output.name for output in spec.outputs if output.name in outputs]
    return {**{name: outputs[name] for name in declared}, **outputs}
