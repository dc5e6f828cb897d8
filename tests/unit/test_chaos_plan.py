"""What a run is asked for, and how far it has come."""

from __future__ import annotations

from pool.chaos.plan import Plan, Progress
from recovery.faults import Clock, Due, Fault, FaultKind, Schedule
from tests.unit.test_chaos_report import op

CRASH = Fault(FaultKind.TAB_CRASH, target="chrome-0")


def test_faults_are_due_by_their_clock_the_first_one_first():
    late, soon = Due(9.0, CRASH), Due(2.0, CRASH)
    timed, counted = Due(1.0, CRASH, Clock.SECONDS), Due(3.0, CRASH, Clock.STEPS)
    plan = Plan(Schedule(1, (late, timed, soon, counted)), 10)
    assert plan.due(Clock.OPERATIONS) == [soon, late]
    assert plan.due(Clock.SECONDS) == [timed]
    assert plan.due(Clock.STEPS) == [counted]


def test_an_operation_that_a_full_pool_refused_has_not_failed():
    operations = [
        op(0),
        op(1, wrong=True),
        op(2, success=False),
        op(3, success=False, refused=True),
    ]
    progress = Progress(operations=operations)
    assert (progress.failed, progress.wrong) == (1, 1)
