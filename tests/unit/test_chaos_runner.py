"""A whole run on a pool without browsers: all parts together."""

from __future__ import annotations

import threading
import time

import pytest

from pool.chaos.plan import Plan
from pool.chaos.runner import ChaosRunner
from pool.results import RecoveryStep
from recovery.errors import FaultRefused
from recovery.failures import Category
from recovery.faults import Clock, Due, Fault, FaultKind, Intensity, Schedule
from recovery.records import HostRef
from tests.chaos import FakePool, FakeWorkload, answered, record, state_of
from tests.fakes import failure

DROP = Fault(FaultKind.SOCKET_DROP, Intensity.MILD, "chrome-0")
HIDDEN = Fault(FaultKind.TAB_HIDDEN, Intensity.SEVERE, "chrome-0")
NONE = Fault(FaultKind.GPU_PROCESS_CRASH, Intensity.MILD, "firefox-0")
AT_ONCE = Fault(FaultKind.TAB_HIDDEN, Intensity.MILD, "firefox-0")


def notice(pool: FakePool) -> None:
    """Have the supervisor log of each fault what it should."""

    def log(made) -> None:
        if made.fault.dose.noticed:
            pool.log_failure(made.target, made.epoch, Category.CONNECTION_FAILURE)

    pool.on_injected = log


@pytest.fixture
def pool(tmp_path):
    made = FakePool(tmp_path, state_of(record(), record("firefox-0")))
    notice(made)
    return made


async def test_a_run_is_an_account_of_all_that_happened(pool):
    due = (
        Due(3.0, DROP),
        Due(5.0, NONE),
        Due(8.0, HIDDEN),
        Due(0.0, AT_ONCE, Clock.SECONDS),
    )
    pool.made[NONE] = FaultRefused("it has none", what="impossible")
    told, workload = [], FakeWorkload()
    workload.wrong = {12}
    plan = Plan(Schedule(7, due), 45, at_once=3, settings={"level": "high"})
    runner = ChaosRunner(pool, workload, plan, on_bad_result=lambda *what: told.append(what[0]))
    run = await runner.run()

    assert (run.seed, run.settings, run.schedule) == (7, {"level": "high"}, plan.schedule)
    assert [op.number for op in run.operations] == list(range(45))
    assert sorted(pool.asked) == sorted(f"chaos-{n}" for n in range(45))
    assert [op.number for op in run.operations if op.wrong] == told == [12]
    outcomes = {fault.due.fault: fault.outcome for fault in run.faults}
    assert outcomes == {
        DROP: "happened", NONE: "impossible", HIDDEN: "happened", AT_ONCE: "happened",
    }  # fmt: skip
    (dropped,) = [fault for fault in run.faults if fault.due.fault is DROP]
    assert (dropped.noticed, dropped.right) == (("connection_failure",), True)
    assert dropped.engine == "chrome"
    assert run.browsers == {"chrome-0": "Fake 1", "firefox-0": "Fake 1"}
    assert sorted(sample.operations for sample in run.memory) == [0, 20, 40, 45]
    assert run.memory[0].operations == 0
    assert run.memory[-1].operations == 45
    assert (run.repaired, run.notes, run.leaked) == (True, (), ())
    assert runner.progress.began == 45
    assert list(run.faults) == runner.progress.faults
    assert await runner.leaked() == ()


async def test_a_fault_is_made_before_its_operation_and_may_cost_it_an_attempt(pool):
    asked_before = []
    made_at = []

    def hit(made) -> None:
        asked_before.append(len(pool.asked))
        made_at.append(made.at)
        pool.log_failure(made.target, made.epoch, Category.CONNECTION_FAILURE)

    def struck(op_id):
        lost = failure(
            Category.CONNECTION_FAILURE, ref=HostRef("chrome-0", 0), at=made_at[0] + 0.001
        )
        return answered(op_id, recovery=(RecoveryStep("failed", "", 0.0, 0.1, "", lost),))

    pool.on_injected = hit
    pool.results[2] = struck
    plan = Plan(Schedule(0, (Due(3.0, DROP),)), 4, at_once=1)
    run = await ChaosRunner(pool, FakeWorkload(), plan).run()
    assert asked_before == [2]
    assert run.faults[0].struck == (2,)
    assert run.operations[2].struck == (("connection_failure", "chrome-0", 0),)


async def test_tokens_make_faults_due_too(pool):
    pool.tokens = 5
    plan = Plan(Schedule(0, (Due(7.0, HIDDEN, Clock.STEPS),)), 3, at_once=1)
    await ChaosRunner(pool, FakeWorkload("generate"), plan).run()
    assert pool.injected == [(HIDDEN, True)]


async def test_an_error_beside_the_run_is_noted_and_does_not_end_it(pool):
    over = threading.Event()

    def no_node() -> None:
        assert over.wait(10.0)
        time.sleep(0.2)  # the run is about to wait for us
        raise RuntimeError("no other node can be started")

    class LastLook(FakePool):
        async def control(self):
            if len(self.asked) == 2:
                over.set()
            return await super().control()

    last = LastLook(pool.log_folder, pool.control_state)
    last.on_injected = lambda made: last.log_failure(made.target)
    death = Fault(FaultKind.NODE_DEATH, Intensity.SEVERE, "chrome-0")
    plan = Plan(Schedule(0, (Due(2.0, death),)), 2, at_once=1)
    run = await ChaosRunner(last, FakeWorkload(), plan, on_node_death=no_node).run()
    assert run.notes == (repr(RuntimeError("no other node can be started")),)
    assert run.faults[0].noticed == ("crash",)
    assert len(run.operations) == 2
