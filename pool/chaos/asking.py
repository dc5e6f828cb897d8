"""Sends the operations of a chaos run and records the result of each, as its caller saw it.

This module must not inject a fault, nor know why an operation failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from pool.chaos.attribution import Strike
from pool.chaos.plan import Progress
from pool.chaos.records import OpRecord
from pool.chaos.workload import Question, Workload
from pool.pool import BrowserPool
from pool.results import Result
from recovery.errors import PoolBusy, PoolError, SequenceLost
from recovery.levels import LEVELS_ASCENDING

OnBadResult = Callable[[int, Question, Result, str], None]

_RAISED = (PoolError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class Asker:
    """Sends the operations of one run, each with a deadline of `seconds`, and records them in
    `progress`.

    `elapsed` returns the seconds since the run began. `on_step` is awaited at each token of a
    sequence. `on_bad_result` is called with each failed or wrong result.
    """

    def __init__(
        self,
        pool: BrowserPool,
        workload: Workload,
        progress: Progress,
        *,
        seconds: float,
        elapsed: Callable[[], float],
        on_step: Callable[[], Awaitable[None]],
        on_bad_result: OnBadResult,
    ) -> None:
        self._pool = pool
        self._workload = workload
        self._progress = progress
        self._seconds = seconds
        self._elapsed = elapsed
        self._on_step = on_step
        self._on_bad_result = on_bad_result
        self._answers: dict[str, int] = {}
        self._strikes: list[Strike] = []

    @property
    def strikes(self) -> Sequence[Strike]:
        """The failed attempts of all operations."""
        return self._strikes

    async def ask(self, number: int) -> None:
        """Send operation `number` and record its result."""
        question, op_id = self._workload.of(number), f"chaos-{number}"
        began, refused = self._elapsed(), ""
        result: Result | None = None
        try:
            result = await self._answer(question, op_id)
        except PoolBusy as error:
            refused = str(error)
        except _RAISED as error:  # any operation that raises has failed
            result = _failed(error, op_id, question)
        took = self._elapsed() - began
        record = OpRecord(number, op_id, question.model, str(question.type), began, took)
        if result is None:
            self._progress.operations.append(replace(record, refused=True, error=refused))
            return
        self._answers[op_id] = self._answers.get(op_id, 0) + 1
        wrong = result.success and not self._workload.right(number, result)
        strikes = strikes_of(number, result)
        self._strikes += strikes
        record = replace(
            record,
            success=result.success,
            wrong=wrong,
            recovered=result.recovered,
            simulated=result.simulated,
            answers=self._answers[op_id],
            browser_id=result.browser_id,
            engine=str(result.browser_type or ""),
            level_effective=str(result.level_effective),
            struck=tuple((s.category, s.browser_id, s.epoch) for s in strikes),
            error=result.error,
        )
        self._progress.operations.append(record)
        if wrong or not result.success:
            self._on_bad_result(number, question, result, "wrong" if wrong else "failed")

    async def _answer(self, question: Question, op_id: str) -> Result:
        if question.op != "generate":
            return await self._pool.run_with_recovery(
                question.model, question.op, question.inputs, deadline=self._seconds, op_id=op_id
            )
        ended: list[Result] = []
        stream = self._pool.stream(
            question.model, question.inputs, op_id=op_id, on_result=ended.append
        )
        with contextlib.suppress(SequenceLost):
            async with contextlib.aclosing(stream) as tokens:
                async for _ in tokens:
                    await self._on_step()
        return ended[0]


def strikes_of(number: int, result: Result) -> list[Strike]:
    """The failed attempts before this result, and the browser of each."""
    found = []
    for step in result.recovery:
        failure = step.failure
        if failure is not None and failure.ref is not None:
            too_large = failure.evidence.get("what") == "too_large"
            word = "too_large" if too_large else str(failure.category)
            ref = failure.ref
            found.append(Strike(number, word, ref.browser_id, ref.epoch, failure.at))
    return found


def _failed(error: Exception, op_id: str, question: Question) -> Result:
    message, none = repr(error), LEVELS_ASCENDING[0]
    return Result(
        op_id, question.model, question.op, success=False, level_effective=none, error=message
    )
