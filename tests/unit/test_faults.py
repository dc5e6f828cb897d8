"""The table of faults, the gate, and schedules."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from recovery.breaker import CircuitState
from recovery.errors import BadInput
from recovery.faults import (
    FAULTS,
    Clock,
    Due,
    Fault,
    FaultKind,
    Intensity,
    Schedule,
    draw_schedule,
    may_inject,
    read_schedule,
    schedule_from_json,
)
from recovery.kinds import BrowserType

SLOTS = {
    "chrome-0": BrowserType.CHROME,
    "firefox-0": BrowserType.FIREFOX,
    "safari-0": BrowserType.SAFARI,
}


def test_every_kind_has_three_doses_in_words_of_their_own():
    assert FAULTS.keys() == set(FaultKind)
    words = [dose.what for facts in FAULTS.values() for dose in facts.doses.values()]
    assert all(facts.doses.keys() == set(Intensity) for facts in FAULTS.values())
    assert len(words) == len(set(words)) == 3 * len(FaultKind)


@pytest.mark.parametrize(
    ("circuit", "allowed"),
    [
        (CircuitState.CLOSED, "mild moderate severe"),
        (CircuitState.DISABLED, "mild moderate severe"),
        (CircuitState.HALF_OPEN, "mild moderate"),
        (CircuitState.OPEN, ""),
        (CircuitState.FORCED_OPEN, ""),
    ],
)
def test_the_gate(circuit, allowed):
    assert [how for how in Intensity if may_inject(circuit, how)] == allowed.split()


def test_a_seed_draws_its_schedule_and_no_other():
    first, again = (draw_schedule(4, SLOTS, until=400, every=10) for _ in range(2))
    assert first == again != draw_schedule(5, SLOTS, until=400, every=10)
    assert [due.when for due in first.faults] == [10.0 * n for n in range(1, 41)]


def test_kinds_are_dealt_equally_often_and_only_to_engines_that_can_have_them():
    schedule = draw_schedule(1, SLOTS, until=21 * 40, every=4)
    counts = Counter(due.fault.kind for due in schedule.faults)
    assert set(counts.values()) == {10}
    for due in schedule.faults:
        if due.fault.target:
            assert SLOTS[due.fault.target] in FAULTS[due.fault.kind].engines
    only = draw_schedule(1, {"safari-0": BrowserType.SAFARI}, until=100, every=1)
    assert FaultKind.GPU_PROCESS_CRASH not in {due.fault.kind for due in only.faults}


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(BadInput, match="over 0"):
        draw_schedule(1, SLOTS, until=10, every=0)
    with pytest.raises(BadInput, match="applies to safari-0"):
        draw_schedule(
            1,
            {"safari-0": BrowserType.SAFARI},
            until=10,
            every=1,
            kinds=[FaultKind.GPU_PROCESS_CRASH],
        )


def test_a_schedule_comes_back_from_its_file(tmp_path):
    schedule = draw_schedule(9, SLOTS, until=100, every=10, clock=Clock.SECONDS)
    assert schedule_from_json(schedule.to_json()) == schedule
    (tmp_path / "plan.json").write_text(schedule.to_json())
    assert read_schedule(tmp_path / "plan.json") == schedule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"seed": 1, "faults": [{"when": 1, "fault": {"kind": "no such"}}]}',
        '{"seed": 1, "faults": [{"when": "soon", "fault": {"kind": "timeout"}}]}',
    ],
)
def test_what_is_no_schedule_is_refused(text, tmp_path):
    with pytest.raises(BadInput, match="not a fault schedule"):
        schedule_from_json(text)
    with pytest.raises(BadInput, match="can't be read"):
        read_schedule(tmp_path / "missing.json")


def test_a_fault_says_what_it_is():
    fault = Fault(FaultKind.TAB_CRASH, Intensity.SEVERE, "chrome-0")
    assert str(fault) == "severe tab_crash of chrome-0"
    assert "SIGKILL" in fault.dose.what
    assert Schedule(1, (Due(1.0, fault),)).faults[0].clock is Clock.OPERATIONS


def test_document_has_the_table_as_it_is():
    rows = []
    for kind, facts in FAULTS.items():
        some = len(facts.engines) < len(BrowserType)
        engines = f" ({', '.join(sorted(facts.engines))})" if some else ""
        for how, dose in facts.doses.items():
            noticed = ", ".join(sorted(dose.noticed)) or "nothing"
            also = ", or not at all" if dose.quiet else ""
            cells = (f"`{kind}`{engines}", how, dose.what, f"`{dose.level}`", noticed + also)
            rows.append(f"| {' | '.join(cells)} |")
    lines = (Path(__file__).parents[2] / "docs" / "chaos.md").read_text().splitlines()
    missing = [row for row in rows if row not in lines]
    assert not missing, "docs/chaos.md lacks:\n" + "\n".join(missing)
