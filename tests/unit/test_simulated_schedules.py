"""The schedules of `tabpool chaos`, on the control plane in one process: see `tests.simulator`."""

from __future__ import annotations

import random

import pytest

from recovery.faults import FAULTS as KINDS
from recovery.faults import FaultKind, FaultSite, Intensity, Schedule, draw_schedule
from recovery.kinds import BrowserType, Level
from recovery.supervision import RestartLimit
from tests.simulator import SEEN_OF, main, plan_of, simulate, slots

BROWSERS = {"chrome": 2, "firefox": 1, "safari": 1}
FRESH = random.SystemRandom().randrange(1_000, 1_000_000_000)
SLOTS = slots(BROWSERS)
LIES = (FaultKind.WRONG_ANSWER,)
PATIENT = RestartLimit(restarts_max=1000)  # as chaos runs have: it is we who break them


def drawn(seed: int, *, lies: bool = False) -> Schedule:
    """A fault each 15 operations: at 300 in 300 s, each has time to be repaired."""
    kinds = [kind for kind in FaultKind if lies or kind not in LIES]
    return draw_schedule(seed, SLOTS, until=300, every=15, kinds=kinds)


def run(schedule: Schedule, level: Level):
    try:
        return simulate(
            plan_of(schedule, seconds=300.0), BROWSERS, level, operations=300, limit=PATIENT
        )
    except AssertionError as error:
        raise AssertionError(f"{error}\nthe schedule:\n{schedule.to_json()}") from error


@pytest.mark.parametrize("level", [Level.MEDIUM, Level.HIGH])
@pytest.mark.parametrize("seed", [*range(6), pytest.param(FRESH, id="fresh")])
def test_every_operation_is_answered_under_any_schedule_but_lies(seed, level):
    outcome = run(drawn(seed), level)
    assert outcome.failed == 0
    assert not outcome.given_up
    assert sum(outcome.applied.values()) >= 10


@pytest.mark.parametrize("seed", [*range(4), pytest.param(FRESH, id="fresh")])
def test_at_critical_lies_are_outvoted_too(seed):
    outcome = run(drawn(seed, lies=True), Level.CRITICAL)  # which compares every answer
    assert outcome.failed == 0


def test_every_fault_at_every_intensity_is_told_to_the_control_plane_or_said_to_be_none_of_it():
    assert SEEN_OF.keys() == set(FaultKind)
    for kind, seen in SEEN_OF.items():
        assert seen.keys() == set(Intensity), kind
        for how, what in seen.items():
            dose = KINDS[kind].doses[how]
            hurts = bool(dose.noticed) and not dose.quiet
            assert what is not None or not hurts, f"{how} {kind} is noticed, and not modelled"


def test_a_saved_schedule_is_run_from_its_file(tmp_path, capsys):
    path = tmp_path / "plan.json"
    schedule = draw_schedule(3, {"chrome-0": BrowserType.CHROME}, until=100, every=25)
    path.write_text(schedule.to_json())
    with pytest.raises(SystemExit) as end:
        main(["--schedule", str(path)])
    assert end.value.code == 0
    assert "seed 3: 151 operations" in capsys.readouterr().out


def test_what_is_aimed_at_the_supervisor_has_no_target():
    for due in drawn(1).faults:
        assert bool(due.fault.target) == (KINDS[due.fault.kind].place is FaultSite.BROWSER)
