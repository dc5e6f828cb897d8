"""Moments of a clock that was stepped are told by ours."""

from __future__ import annotations

from pool.chaos.clock import SupervisorClock
from recovery.faults import CLOCK_STEP_SECONDS, Fault, FaultKind, Intensity

MINUTE = CLOCK_STEP_SECONDS[Intensity.MILD]
DAY = CLOCK_STEP_SECONDS[Intensity.MODERATE]
NOW = 1_000_000.0


def clock(*faults: Fault) -> SupervisorClock:
    made = SupervisorClock(lambda: NOW)
    for fault in faults:
        made.note(fault)
    return made


def step(how: Intensity) -> Fault:
    return Fault(FaultKind.CLOCK_STEP, how)


def test_a_clock_that_nobody_stepped_is_ours():
    assert clock().ours(NOW - 3.0) == NOW - 3.0
    assert clock(Fault(FaultKind.TAB_CRASH)).ours(NOW + MINUTE) == NOW + MINUTE


def test_moments_before_and_after_a_step_are_both_told():
    stepped = clock(step(Intensity.MODERATE))
    assert stepped.ours(NOW - 3.0) == NOW - 3.0
    assert stepped.ours(NOW + DAY - 3.0) == NOW - 3.0


def test_steps_add_up_until_the_supervisor_dies():
    twice = (step(Intensity.MODERATE), step(Intensity.MILD))
    assert clock(*twice).ours(NOW + DAY + MINUTE - 3.0) == NOW - 3.0
    death = Fault(FaultKind.SUPERVISOR_DEATH)
    again = clock(*twice, death, step(Intensity.SEVERE))
    assert again.ours(NOW - DAY - 3.0) == NOW - 3.0, "the next one's clock was right"
