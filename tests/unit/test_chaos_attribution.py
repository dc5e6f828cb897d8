"""What was seen in a run belongs to the fault that it came of, and to no other."""

from __future__ import annotations

from dataclasses import replace

from pool.chaos.attribution import Gathered, Repaired, Strike, attributed
from pool.chaos.evidence import GONE, Noticed, Seen
from pool.chaos.records import FaultRecord
from recovery.control import StepOutcome
from recovery.faults import Due, Fault, FaultKind, Intensity
from recovery.kinds import RecoveryLevel
from tests.chaos import injected, repair
from tests.unit.test_chaos_report import op

CRASH = Fault(FaultKind.TAB_CRASH, Intensity.SEVERE, "chrome-0")
LIE = Fault(FaultKind.WRONG_ANSWER, Intensity.SEVERE, "chrome-0")
DROP = Fault(FaultKind.SOCKET_DROP, Intensity.MILD, "chrome-0")


def made(number: int, fault: Fault = CRASH, **more) -> FaultRecord:
    """Fault `number` happened at 100, 200, ... to incarnation `number` of its target."""
    what = injected(fault, 100.0 * (number + 1), pids=(7,), **{"epoch": number, **more})
    return FaultRecord(number, Due(10.0, fault), "unseen", injected=what)


def noticed(seq: int, epoch: int = 0, category: str = "crash", at: float = 100.5) -> Noticed:
    return Noticed("chrome-0", epoch, category, "fact", at, seq=seq)


def strike(at: float, epoch: int = 0, number: int = 1, category: str = "crash") -> Strike:
    return Strike(number, category, "chrome-0", epoch, at)


def finished(*faults: FaultRecord, **more) -> list[FaultRecord]:
    told = {
        "noticed": (), "strikes": (), "operations": (), "repairs": (), "seen": {},
        "marks": {each.number: 10 * (each.number + 1) for each in faults}, **more,
    }  # fmt: skip
    return attributed(faults, Gathered(**told))


def test_a_fault_that_was_not_made_stays_as_it_is():
    refused = FaultRecord(0, Due(10.0, CRASH), "refused", why="its circuit is open")
    assert finished(refused) == [refused]


def test_a_fault_that_nothing_shows_is_unseen():
    (fault,) = finished(made(0))
    assert (fault.outcome, fault.evidence, fault.noticed, fault.right) == ("unseen", "", (), False)
    assert (fault.noticed_ms, fault.repair_seconds, fault.ladder) == (None, None, ())


def test_what_the_kernel_says_shows_it():
    (fault,) = finished(made(0), seen={0: Seen({7: GONE})})
    assert (fault.outcome, fault.evidence) == ("happened", "processes 7 ended")


def test_failures_are_told_apart_by_their_place_in_the_log():
    early, own, last, late = noticed(10), noticed(11), noticed(20), noticed(21)
    first, second = finished(made(0), made(1, epoch=0), noticed=(early, own, last, late))
    assert first.noticed == ("crash", "crash"), "after its mark, up to that of the next"
    assert (first.noticed_ms, first.right) == (500.0, True)
    assert second.noticed == ("crash",)


def test_failures_of_earlier_incarnations_and_other_browsers_are_none_of_its():
    other = replace(noticed(25, 1), browser_id="chrome-1")
    refused = FaultRecord(0, Due(10.0, CRASH), "refused")
    _, fault = finished(refused, made(1), noticed=(noticed(24, 0), other))
    assert fault.noticed == ()
    _, fault = finished(refused, made(1), noticed=(noticed(24, 2, "timeout"),))
    assert (fault.noticed, fault.right) == (("timeout",), False)


def test_a_fault_of_another_browser_or_one_that_was_not_made_ends_nothing():
    elsewhere = made(1, replace(CRASH, target="chrome-1"), epoch=0)
    refused = FaultRecord(2, Due(10.0, CRASH), "refused")
    fault, *_ = finished(made(0), elsewhere, refused, noticed=(noticed(11), noticed(99)))
    assert len(fault.noticed) == 2


def test_attempts_that_it_cost_are_those_of_its_incarnation_from_then_on():
    strikes = (
        strike(99.0, number=1),
        strike(99.995, number=2),
        strike(150.0, number=3),
        strike(150.1, number=3),
        strike(150.0, epoch=1, number=4),
        strike(200.0, number=5),
    )
    first, second = finished(made(0), made(1, epoch=0), strikes=strikes)
    assert first.struck == (2, 3), "clocks differ a little, and each operation counts once"
    assert second.struck == (5,)


def test_answers_show_what_only_answers_can():
    wrong = op(4, wrong=True, browser_id="chrome-0")
    assert finished(made(0, LIE))[0].outcome == "unseen"
    assert finished(made(0, LIE), operations=(wrong,))[0].outcome == "happened"
    elsewhere = replace(wrong, browser_id="chrome-1")
    assert finished(made(0, LIE), operations=(elsewhere,))[0].outcome == "unseen"
    large = Fault(FaultKind.MESSAGE_OVER_LIMIT, Intensity.MILD, "chrome-0")
    strikes = (strike(150.0, category="too_large"),)
    assert finished(made(0, large), strikes=strikes)[0].outcome == "happened"


def test_its_repair_is_the_last_one_begun_because_of_it():
    steps = (
        StepOutcome((RecoveryLevel.MINIMAL, RecoveryLevel.MODERATE), 0.0, 1.0, None),
        StepOutcome((RecoveryLevel.AGGRESSIVE,), 1.0, 2.0, RecoveryLevel.AGGRESSIVE),
    )
    repairs = [
        Repaired(50.0, 51.0, repair()),
        Repaired(101.0, None, repair()),
        Repaired(102.0, 104.5, repair(steps=steps)),
        Repaired(103.0, 104.0, repair(epoch=1)),
        Repaired(103.0, 104.0, repair("chrome-1")),
        Repaired(200.0, 201.0, repair()),
    ]
    fault, after = finished(made(0), made(1, epoch=0), repairs=repairs)
    assert fault.repair_seconds == 2.5
    assert fault.ladder == ("1 MINIMAL and 2 MODERATE (failed)", "3 AGGRESSIVE")
    assert after.repair_seconds == 1.0
    (fault,) = finished(made(0), repairs=repairs[:2])
    assert (fault.repair_seconds, fault.ladder) == (None, ()), "it never ended well"


def test_a_fault_of_the_supervisor_is_not_judged_by_what_it_noticed():
    death = Fault(FaultKind.SUPERVISOR_DEATH)
    seen = Seen(term_before=1, term_after=2)
    (fault,) = finished(made(0, death), seen={0: seen})
    assert (fault.outcome, fault.right) == ("happened", None)


def test_what_was_seen_is_of_the_fault_with_that_number():
    first, second = finished(made(0, DROP), made(1, CRASH), seen={1: Seen({7: GONE})})
    assert (first.outcome, second.outcome) == ("unseen", "happened")
