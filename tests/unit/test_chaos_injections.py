"""Faults are made when they are due, one at a time, and each is written down."""

from __future__ import annotations

import asyncio

import pytest

from pool.chaos.injections import Injections
from pool.chaos.plan import Plan, Progress
from pool.chaos.watch import Before
from recovery.errors import BadInput, FaultRefused
from recovery.faults import Clock, Due, Fault, FaultKind, Intensity, Schedule
from tests.chaos import LOST, FakePool

CRASH = Fault(FaultKind.TAB_CRASH, Intensity.SEVERE, "chrome-0")
DROP = Fault(FaultKind.SOCKET_DROP, Intensity.MILD, "chrome-1")


class Parts:
    """Observer, log, clock and watch in one, which note in what order they are asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.last_seq = 0
        self.started: list[tuple[int, str]] = []
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()

    def engine_of(self, browser_id: str) -> str:
        return f"engine of {browser_id}"

    async def until_noticed(self, injected) -> None:
        self.calls.append(f"noticed {injected.fault.kind}")

    async def until_repaired(self) -> bool:
        self.calls.append("whole")
        await self.gate.wait()
        return True

    async def read(self) -> None:
        self.last_seq += 10

    def note(self, fault) -> None:
        self.calls.append(f"made {fault.kind}")

    async def before(self, due) -> Before:
        if self.away:
            raise LOST
        return Before()

    def start(self, number, injected, before) -> None:
        self.started.append((number, injected.target))


class Run:
    """Injections on a fake pool, and all that they work with."""

    def __init__(self, *due: Due, **more) -> None:
        self.pool, self.parts, self.progress = FakePool(), Parts(), Progress()
        self.injections = Injections(
            self.pool,
            Plan(Schedule(0, due), 100, **more),
            self.progress,
            observer=self.parts,
            log=self.parts,
            clock=self.parts,
            watch=self.parts,
        )

    @property
    def kinds(self) -> list[FaultKind]:
        return [fault.kind for fault, _ in self.pool.injected]


async def test_faults_wait_until_as_many_operations_have_begun():
    run = Run(Due(5.0, CRASH), Due(6.0, DROP), Due(9.0, CRASH))
    await run.injections.on_operation(4)
    assert run.kinds == []
    await run.injections.on_operation(7)
    assert run.kinds == [CRASH.kind, DROP.kind], "what was passed over is made, too"
    await run.injections.on_operation(7)
    assert len(run.kinds) == 2


async def test_tokens_are_counted_by_their_own_clock():
    run = Run(Due(2.0, CRASH, Clock.STEPS), Due(1.0, DROP))
    await run.injections.on_step()
    assert run.kinds == []
    await run.injections.on_step()
    assert run.kinds == [CRASH.kind]


async def test_faults_of_the_wall_clock_are_made_in_time():
    run = Run(Due(2.0, CRASH, Clock.SECONDS), Due(1.0, DROP, Clock.SECONDS))
    await run.injections.in_time(lambda: 3.0)
    assert run.kinds == [DROP.kind, CRASH.kind]
    waits = Run(Due(60.0, CRASH, Clock.SECONDS))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await waits.injections.in_time(lambda: 0.0)
    assert waits.kinds == []


async def test_a_fault_that_was_made_is_written_down_and_watched():
    run = Run(Due(1.0, CRASH), Due(2.0, DROP))
    await run.injections.on_operation(2)
    first, second = run.progress.faults
    assert (first.number, first.outcome, first.due) == (0, "unseen", Due(1.0, CRASH))
    assert first.injected is not None
    assert first.engine == "engine of chrome-0"
    assert second.number == 1
    assert run.parts.started == [(0, "chrome-0"), (1, "chrome-1")]
    assert run.injections.marks == {0: 10, 1: 20}, "the log is read before each"


async def test_the_next_fault_waits_until_the_last_was_noticed_and_mended():
    run = Run(Due(1.0, CRASH), Due(2.0, DROP))
    await run.injections.on_operation(2)
    assert run.parts.calls == [
        "whole", f"made {CRASH.kind}", f"noticed {CRASH.kind}", "whole", f"made {DROP.kind}",
    ]  # fmt: skip
    overlapping = Run(Due(1.0, CRASH), Due(2.0, DROP), settle=False)
    await overlapping.injections.on_operation(2)
    assert overlapping.parts.calls == [f"made {CRASH.kind}", f"made {DROP.kind}"]


async def test_whoever_comes_meanwhile_waits_until_it_has_happened():
    run = Run(Due(1.0, CRASH))
    run.parts.gate.clear()
    first = asyncio.create_task(run.injections.on_operation(1))
    second = asyncio.create_task(run.injections.on_operation(2))
    await asyncio.sleep(0.01)
    assert run.progress.waiting_for == "all browsers to be ready"
    assert not first.done()
    assert not second.done()
    run.parts.gate.set()
    await asyncio.gather(first, second)
    assert run.kinds == [CRASH.kind]
    assert run.progress.waiting_for == ""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (FaultRefused("its circuit is open", what="circuit_open"), "refused"),
        (FaultRefused("it has no GPU", what="impossible"), "impossible"),
        (BadInput("it is not in service"), "refused"),
    ],
)
async def test_a_fault_that_can_not_be_made_is_written_down_with_the_reason(error, outcome):
    run = Run(Due(1.0, CRASH))
    run.pool.made[CRASH] = error
    await run.injections.on_operation(1)
    (record,) = run.progress.faults
    assert (record.outcome, record.why, record.injected) == (outcome, str(error), None)
    assert run.parts.started == []
    assert f"made {CRASH.kind}" not in run.parts.calls


async def test_a_fault_is_not_made_if_nobody_can_say_how_things_were():
    run = Run(Due(1.0, CRASH))
    run.parts.away = True
    await run.injections.on_operation(1)
    assert run.kinds == []
    assert run.progress.faults[0].outcome == "refused"


@pytest.mark.parametrize("gated", [True, False])
async def test_the_gate_is_as_the_plan_says(gated):
    run = Run(Due(1.0, CRASH), gated=gated)
    await run.injections.on_operation(1)
    assert run.pool.injected == [(CRASH, gated)]


async def test_only_the_last_fault_that_was_made_is_waited_for():
    run = Run(Due(1.0, CRASH), Due(2.0, DROP), settle=False)
    await run.injections.until_noticed()
    assert run.parts.calls == []
    run.pool.made[DROP] = FaultRefused("no")
    await run.injections.on_operation(2)
    await run.injections.until_noticed()
    assert run.parts.calls[-1] == f"noticed {CRASH.kind}"
