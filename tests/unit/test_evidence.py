"""A fault happened if others say so; a word of the injector alone is none."""

from __future__ import annotations

import pytest

from pool.chaos.evidence import GONE, STOPPED, Noticed, Seen, evidence, judged
from recovery.failures import Category
from recovery.faults import FAULTS, Fault, FaultKind, Injected, Intensity


def made(kind, how=Intensity.MODERATE, pids=(7,)):
    return Injected(Fault(kind, how, "chrome-0"), 100.0, "words", "chrome-0", 3, pids)


def failure(category, epoch=3, model=""):
    return Noticed("chrome-0", epoch, category, "fact", 100.1, model)


@pytest.mark.parametrize("kind", FaultKind)
@pytest.mark.parametrize("how", Intensity)
def test_nothing_seen_is_no_evidence_of_any_fault(kind, how):
    assert evidence(made(kind, how), Seen({7: "there"})) == ""
    assert evidence(made(kind, how, ()), Seen()) == ""


@pytest.mark.parametrize(
    ("kind", "how", "seen"),
    [
        (FaultKind.TAB_CRASH, Intensity.MILD, Seen({7: GONE})),
        (FaultKind.NODE_DEATH, Intensity.SEVERE, Seen({7: GONE})),
        (FaultKind.TIMEOUT, Intensity.MILD, Seen({7: STOPPED})),
        (FaultKind.MACHINE_SUSPENDED, Intensity.SEVERE, Seen({7: STOPPED, 8: GONE})),
        (FaultKind.TIMEOUT, Intensity.MODERATE, Seen(noticed=[failure("timeout")])),
        (FaultKind.LAUNCH_FAILURE, Intensity.MILD, Seen(noticed=[failure("launch_failure", 4)])),
        (FaultKind.API_ERROR, Intensity.MILD, Seen(noticed=[failure("api_error", 4, "m")])),
        (FaultKind.FULL_DISK, Intensity.MILD, Seen({7: "mute"})),
        (FaultKind.MEMORY_EXHAUSTION, Intensity.SEVERE, Seen({7: "limited"})),
        (FaultKind.MEMORY_EXHAUSTION, Intensity.MILD, Seen(grown_bytes=400 << 20)),
        (FaultKind.TAB_HIDDEN, Intensity.MILD, Seen(visibility="hidden")),
        (FaultKind.WRONG_ANSWER, Intensity.SEVERE, Seen(answers=["wrong"])),
        (FaultKind.MESSAGE_OVER_LIMIT, Intensity.MILD, Seen(answers=["too_large"])),
        (FaultKind.SUPERVISOR_DEATH, Intensity.MILD, Seen(term_before=1, term_after=2)),
        (FaultKind.CLOCK_STEP, Intensity.SEVERE, Seen(skew_seconds=-86_399.0)),
    ],
)
def test_what_shows_it(kind, how, seen):
    assert evidence(made(kind, how, tuple(seen.processes) or (7,)), seen)


@pytest.mark.parametrize(
    ("kind", "how", "seen"),
    [
        (FaultKind.TAB_CRASH, Intensity.MILD, Seen({7: GONE, 8: "there"})),  # a spare one went
        (FaultKind.BROWSER_CRASH, Intensity.MILD, Seen({7: "there"}, [failure("crash")])),
        (FaultKind.CLOCK_STEP, Intensity.SEVERE, Seen(skew_seconds=0.1)),
        (FaultKind.CLOCK_STEP, Intensity.MODERATE, Seen(skew_seconds=-86_400.0)),
        (FaultKind.MEMORY_EXHAUSTION, Intensity.MILD, Seen(grown_bytes=10 << 20)),
        (FaultKind.TAB_HIDDEN, Intensity.MILD, Seen(visibility="visible")),
        (
            FaultKind.SUPERVISOR_DEATH,
            Intensity.MILD,
            Seen({7: "there"}, term_before=2, term_after=2),
        ),
        (FaultKind.LAUNCH_FAILURE, Intensity.MILD, Seen({7: GONE}, [failure("crash")])),
    ],
)
def test_what_does_not(kind, how, seen):
    assert evidence(made(kind, how, tuple(seen.processes)), seen) == ""


def test_a_fault_is_judged_by_what_it_must_be_noticed_as():
    crash = made(FaultKind.TAB_CRASH)
    assert judged(crash, [failure(Category.CRASH)])
    assert not judged(crash, [failure(Category.TIMEOUT)])
    assert not judged(crash, [])
    assert not judged(crash, [failure(Category.CRASH, epoch=4)]), "another incarnation's"
    launch = made(FaultKind.LAUNCH_FAILURE)
    assert judged(launch, [failure(Category.CRASH), failure(Category.LAUNCH_FAILURE, epoch=4)])
    hidden = made(FaultKind.TAB_HIDDEN)
    assert judged(hidden, [])
    assert not judged(hidden, [failure(Category.CRASH)]), "it hurts nobody"
    assert judged(made(FaultKind.GPU_PROCESS_CRASH), []), "it may go by unnoticed"


def test_every_fault_that_must_be_noticed_has_a_way_to_be_shown():
    for kind, facts in FAULTS.items():
        for how, dose in facts.doses.items():
            for category in dose.noticed:
                seen = Seen({7: GONE}, [failure(category, 4, "m")], answers=["too_large"])
                if evidence(made(kind, how), seen):
                    break
            else:
                assert not dose.noticed or kind in (
                    FaultKind.MACHINE_SUSPENDED,  # by the state of its processes
                ), (kind, how)
