"""What must hold of every operation, and what allows that one failed.

This module must not ask any operation itself (`tests.simulator.story` does).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from actors.messages import RunRequest
from pool.results import Result
from recovery.answering import is_reported
from recovery.failures import Failure
from recovery.kinds import Level
from recovery.levels import COPIES
from tests.simulator.clocks import Clocks
from tests.simulator.verdict import Verdict

DEADLINE = 30.0  # of each operation


class Judge:
    """Knows what operations went through, and when nobody could answer them."""

    def __init__(self, level: Level, clocks: Clocks, verdict: Verdict) -> None:
        self._level = level
        self._clocks = clocks
        self._verdict = verdict
        self._hung: set[str] = set()
        self._stalled: Counter[str] = Counter()  # seconds that operations waited for silent workers
        self._outages: list[tuple[float, bool]] = []  # samples: whether nobody could answer
        self._none_left = -1.0  # when that was last so

    def hangs(self, request: RunRequest) -> None:
        self._hung.add(_op(request))

    def stalled(self, request: RunRequest, seconds: float) -> None:
        self._stalled[_op(request)] += seconds

    def sample(self, *, outage: bool) -> None:
        self._outages.append((self._clocks.now, outage))

    def none_is_left(self) -> None:
        """No browser has the model now, or may yet load it."""
        self._none_left = self._clocks.now

    def judge(self, result: Result, began: float, ended: float) -> None:
        """What must hold of one operation."""
        failures = [step.failure for step in result.recovery if step.failure is not None]
        if not result.success and not self._may_fail(result, failures, began, ended):
            self._verdict.violated(f"an operation failed without need: {_brief(result)}")
        if self._level is Level.NONE and result.recovered:
            self._verdict.violated(f"level none recovered: {result}")

    def _may_fail(
        self, result: Result, failures: Sequence[Failure], began: float, ended: float
    ) -> bool:
        if self._level is Level.NONE and failures:
            return True
        if self._level is Level.LOW and any(not is_reported(failure) for failure in failures):
            return True  # its own browser has to answer, and that may be gone
        if len(failures) >= 3 * COPIES[self._level] or result.op_id in self._hung:
            return True
        said = [failure.message for failure in failures if is_reported(failure)]
        if len(said) > len(set(said)):
            return True
        if ended - began >= DEADLINE:
            samples = [out for at, out in self._outages if began <= at <= ended]
            outage = DEADLINE * sum(samples) / max(len(samples), 1)
            return self._stalled[result.op_id] + outage >= DEADLINE / 2
        # Clients hear a little later what is so.
        return self._none_left >= began - 1.0 and "no browser is left" in result.error


def _op(request: RunRequest) -> str:
    return request.op_id.split("/")[-1]  # without its client


def _brief(result: Result) -> str:
    steps = [f"{step.at:.3f} {step.what} {step.where} {step.outcome}" for step in result.recovery]
    return f"{result.op_id} after {result.metrics['duration_ms']:.0f} ms, {steps}: {result.error}"
