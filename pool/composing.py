"""One part of a model asked through the pool, and several parts asked for one answer.

`Asking` takes a part (or a whole model) through the answering loop; `Composition` keeps the one
account of an operation that asks several (`pool.models.components` says which, with what). This
module must not choose a browser, and knows no operation's meaning.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from pool.answering import Answering, Question, Rules, Simulate, Tensors
from pool.latency import Latencies
from pool.models.registry import ModelEntry
from pool.results import Result
from pool.routing import Routing
from recovery.errors import CallerError, MessageTooLarge
from recovery.failures import Failure
from recovery.kinds import Level
from recovery.levels import ORDER, REDUNDANT, held
from recovery.records import HostRef
from recovery.voting import Closeness
from sharding.models.frames import Array, Frame, encoded_size
from sharding.models.signature import ModelSpec

_SUMMED = ("in_page_ms", "queue_ms", "bytes_in", "bytes_out", "attempts")


@dataclass(frozen=True)
class Asking:
    """How the parts of one operation are asked. `simulation` gives the native last resort."""

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

    async def ask(
        self, op_id: str, op: str, spec: ModelSpec, tensors: Tensors, seconds: float
    ) -> Result:
        """The one answer of one part within `seconds`, its outputs as they are.

        Raises `PoolBusy`, and `MessageTooLarge`.
        """
        size = self.check_size(spec.name, tensors)
        kind = (spec.digest, op, self.level, size)
        late = self.latencies.late_after(kind) if self.level in REDUNDANT else math.inf
        tolerance = Closeness(spec.tolerance.rtol, spec.tolerance.atol)
        answering = Answering(
            Question(op_id, spec.name, op, self.level, spec.digest, self.client, tolerance),
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
            result = replace(result, values=reply.outputs or {})
            if result.original_error is None:  # of a late one, so long at least
                self.latencies.note(kind, result.metrics["duration_ms"] / 1e3)
        return replace(result, metrics={**result.metrics, "bytes_in": float(size)})


class _Ended(Exception):
    """A part has no answer, so the operation has none."""


class Composition:
    """One operation on a model in parts, within `seconds` from now."""

    def __init__(
        self, asking: Asking, op_id: str, entry: ModelEntry, op: str, seconds: float
    ) -> None:
        self._asking = asking
        self._op_id = op_id
        self._entry = entry
        self._op = op
        self._seconds = seconds
        self._began = time.monotonic()
        self._asked: Counter[str] = Counter()
        self._results: list[tuple[float, Result]] = []  # and when each was asked

    async def ask(self, spec: ModelSpec, tensors: Tensors) -> Mapping[str, Array]:
        """The outputs of one part. Only within `answer`'s work, which ends if there are none."""
        at = time.monotonic() - self._began
        if at >= self._seconds:
            raise _Ended(f"{self._seconds:g} s had passed before {spec.name} was asked")
        asking = self._asking
        if self._asked:  # what has begun waits rather than be refused half-way
            asking = replace(asking, rules=replace(asking.rules, wait_when_full=True))
        asking.check_size(spec.name, tensors)
        # The same each time that the operation is asked, so that it isn't computed again.
        op_id = f"{self._op_id}:{spec.name}:{self._asked[spec.name]}"
        self._asked[spec.name] += 1
        result = await asking.ask(op_id, self._op, spec, tensors, self._seconds - at)
        self._results.append((at, result))
        if not result.success:
            raise _Ended(f"{spec.name}: {result.error}")
        return result.values

    async def answer(self, work: Awaitable[Mapping[str, Array]]) -> Result:
        """What `work` makes of the parts' answers, or why it can't.

        Raises `PoolBusy`, and a `CallerError` as long as no part was asked.
        """
        try:
            return self._result(values=await work)
        except _Ended as ended:
            return self._result(error=str(ended))
        except CallerError as error:
            if not self._asked:
                raise
            return self._result(error=f"what a part answered can't be used: {error}")

    def _result(self, values: Mapping[str, Array] | None = None, error: str = "") -> Result:
        results = [result for _, result in self._results]
        answered = [result for result in results if result.success]
        last = answered[-1] if answered else None
        levels = [result.level_effective for result in results]
        # A part that is asked again and again may move: it is then in several browsers.
        used = dict.fromkeys((result.model, result.browser_id) for result in answered)
        steps = [
            replace(step, at=step.at + at, where=f"{step.where} ({result.model})".lstrip())
            for at, result in self._results
            for step in result.recovery
        ]
        metrics = {
            name: sum(result.metrics.get(name, 0.0) for result in results) for name in _SUMMED
        }
        failures = (result.original_error for result in results)
        return Result(
            self._op_id,
            self._entry.name,
            self._op,
            success=not error,
            level_effective=min(levels, key=ORDER.index, default=held(self._asking.level, 0)),
            browser_id=last.browser_id if last else "",
            browser_type=last.browser_type if last else None,
            epoch=last.epoch if last else 0,
            backend=last.backend if last else None,
            recovery=tuple(sorted(steps, key=lambda step: step.at)),
            original_error=next((failure for failure in failures if failure), None),
            error=error,
            simulated=not error and any(result.simulated for result in results),
            metrics={"duration_ms": (time.monotonic() - self._began) * 1e3, **metrics},
            values=values or {},
            stages=tuple(browser_id for _, browser_id in used),
        )
