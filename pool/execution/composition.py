"""Several parts of a model asked for one answer, with one record of what it took.

Which parts are asked, with what, is for the model's form to say (`pool.execution.placed`). This
module must not choose a browser, and knows no operation's meaning.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from typing import Any

from pool.execution.answering import Tensors
from pool.execution.requests import PartRequests
from pool.models.registry import ModelEntry
from pool.results import Result
from recovery.errors import CallerError
from recovery.levels import LEVELS_ASCENDING, effective_level
from sharding.models.frames import Array
from sharding.models.signature import ModelSpec

_SUMMED = ("in_page_ms", "queue_ms", "bytes_in", "bytes_out", "attempts")


class PartFailed(Exception):
    """A part has no answer, so the operation has none."""


class Composition:
    """One operation on a model in parts, within `seconds` from now."""

    def __init__(
        self, requests: PartRequests, op_id: str, entry: ModelEntry, op: str, seconds: float
    ) -> None:
        self._requests = requests
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
            raise PartFailed(f"{self._seconds:g} s had passed before {spec.name} was asked")
        requests = self._requests
        if self._asked:  # what has begun waits rather than be refused half-way
            requests = replace(requests, rules=replace(requests.rules, wait_when_full=True))
        requests.check_size(spec.name, tensors)
        # The same each time that the operation is asked, so that it isn't computed again.
        op_id = f"{self._op_id}:{spec.name}:{self._asked[spec.name]}"
        self._asked[spec.name] += 1
        result = await requests.request(op_id, self._op, spec, tensors, self._seconds - at)
        self._results.append((at, result))
        if not result.success:
            raise PartFailed(f"{spec.name}: {result.error}")
        return result.values

    async def answer(self, work: Awaitable[Mapping[str, Any]]) -> Result:
        """What `work` makes of the parts' answers, or why it can't.

        Raises `PoolBusy`, and a `CallerError` as long as no part was asked.
        """
        try:
            return self._result(values=await work)
        except PartFailed as ended:
            return self._result(error=str(ended))
        except CallerError as error:
            if not self._asked:
                raise
            return self._result(error=f"what a part answered can't be used: {error}")

    def _result(self, values: Mapping[str, Any] | None = None, error: str = "") -> Result:
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
            level_effective=min(
                levels, key=LEVELS_ASCENDING.index, default=effective_level(self._requests.level, 0)
            ),
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
