"""A pool for the tests of `pool.chaos` that breaks as it is told, without a browser.

Its control log is a real one in a folder. This module must not look at what a test is to find out.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.messages import PageDiagnostics
from pool.chaos.workload import Question
from pool.results import Result
from recovery.control import (
    Body,
    BrowserFailed,
    BrowserRecord,
    Event,
    ModelWanted,
    Phase,
    PoolState,
    Repair,
)
from recovery.errors import BrowserLost, PoolError
from recovery.failures import Category
from recovery.faults import Fault, Injected
from recovery.kinds import BrowserType, Level, ModelType, Readiness
from recovery.log.segments import event_line
from recovery.plan import Plan as RepairPlan
from recovery.records import HostRef
from tests.fakes import FACTS, failure

LOST = BrowserLost("the supervisor is away")


def record(browser_id: str = "chrome-0", **more: Any) -> BrowserRecord:
    kind = BrowserType(browser_id.split("-")[0])
    told = {"epoch": 0, "phase": Phase.READY, "since": 0.0, "facts": FACTS, **more}
    return BrowserRecord(browser_id, kind, **told)


def state_of(*records: BrowserRecord, **more: Any) -> PoolState:
    return PoolState(browsers={each.id: each for each in records}, **more)


def repair(browser_id: str = "chrome-0", epoch: int = 0, **more: Any) -> Repair:
    told = {"began": 100.5, "plan": RepairPlan((), "test"), **more}
    return Repair(browser_id, epoch, failure(), **told)


class FakePool:
    """A pool of `control_state`, whose log is in `folder`.

    `inject_fault` makes what `made` has for the fault (an `Injected`, or an error to raise), by
    default something that happened just now; `on_injected` is called then. `away` calls to the
    supervisor fail first. `results` are what operations get, by the number of the call: a result, a
    function of the operation's id, or an error to raise.
    """

    def __init__(self, folder: Path | None = None, state: PoolState | None = None) -> None:
        self.log_folder = folder
        self.control_state = state_of(record()) if state is None else state
        self.loaded = ("m",)
        self.made: dict[Fault, Injected | PoolError] = {}
        self.on_injected: Callable[[Injected], None] = lambda _: None
        self.injected: list[tuple[Fault, bool]] = []
        self.away = 0
        self.launches: dict[str, Any] = {}
        self.memory_bytes: dict[str, int] = {}
        self.pids: dict[str, int] = {}
        self.visibility = "hidden"
        self.ahead = 0.0  # of the supervisor's clock
        self.results: dict[int, Any] = {}
        self.asked: list[str] = []
        self.tokens = 0
        self._seq = 0

    # -- the log ----------------------------------------------------------------------------------

    def log(self, body: Body) -> int:
        """Have an event logged; returns its number."""
        if self.log_folder is None:
            return 0
        self._seq += 1
        event = Event(self._seq, 1, time.time() + self.ahead, body)
        with (self.log_folder / "00000001.jsonl").open("ab") as file:
            file.write(event_line(event))
        return self._seq

    def log_failure(
        self, browser_id: str = "chrome-0", epoch: int = 0, category: Category = Category.CRASH
    ) -> int:
        at = time.time() + self.ahead
        seen = failure(category, at=at, evidence={"what": "fact"})
        return self.log(BrowserFailed(browser_id, epoch, seen))

    def models(self) -> tuple[str, ...]:
        return self.loaded

    async def order_again(self, name: str) -> None:
        self.log(ModelWanted(name, "digest"))

    # -- the supervisor ---------------------------------------------------------------------------

    async def control(self) -> PoolState:
        if self.away > 0:
            self.away -= 1
            raise LOST
        return self.control_state

    async def state(self) -> Any:
        return SimpleNamespace(
            control=await self.control(), launches=self.launches, memory_bytes=self.memory_bytes
        )

    async def control_pids(self) -> Mapping[str, int]:
        if self.away > 0:
            raise LOST
        return self.pids

    async def diagnose(self, browser_id: str, *, screenshot: bool) -> PageDiagnostics:
        assert not screenshot, "it takes long, and nobody looks at it"
        return PageDiagnostics(HostRef(browser_id), Readiness.READY, self.visibility)

    async def inject_fault(self, fault: Fault, *, gated: bool) -> Injected:
        self.injected.append((fault, gated))
        made = self.made.get(fault, injected(fault, time.time()))
        if isinstance(made, PoolError):
            raise made
        self.on_injected(made)
        return made

    # -- operations -------------------------------------------------------------------------------

    async def run_with_recovery(
        self, model: str, op: str, inputs: Mapping[str, Any], *, deadline: float, op_id: str
    ) -> Result:
        return self._next(op_id)

    async def stream(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        op_id: str,
        on_result: Callable[[Result], None],
    ) -> AsyncIterator[int]:
        for token in range(self.tokens):
            yield token
        on_result(self._next(op_id))

    def _next(self, op_id: str) -> Result:
        made = self.results.get(len(self.asked), answered)
        self.asked.append(op_id)
        if isinstance(made, Exception):
            raise made
        result = made(op_id) if callable(made) else made
        assert isinstance(result, Result)
        return result


def injected(fault: Fault, at: float = 100.0, **more: Any) -> Injected:
    """A fault that was made of the first incarnation of its target."""
    return replace(Injected(fault, at, fault.dose.what, fault.target, 0), **more)


def answered(op_id: str = "chaos-0", **more: Any) -> Result:
    told = {
        "success": True,
        "level_effective": Level.HIGH,
        "browser_id": "chrome-0",
        "browser_type": BrowserType.CHROME,
        "values": {"y": np.ones(1)},
        **more,
    }
    return Result(op_id, "m", "inference", **told)


class FakeWorkload:
    """One question, again and again; the answer is right unless `wrong` has its number."""

    def __init__(self, op: str = "inference") -> None:
        self.question = Question("m", ModelType.TEXT, op, {})
        self.wrong: set[int] = set()

    def of(self, number: int) -> Question:
        return self.question

    def right(self, number: int, result: Result) -> bool:
        return number not in self.wrong
