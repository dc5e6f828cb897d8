"""The account of a sequence: times since it began, and no more than so much of it."""

from recovery.failures import categorize_browser_failure
from sharding.sequences.events import Events, SequenceStatistics, SequenceStep


def told(count: int = 1) -> tuple[SequenceStatistics, Events]:
    now = iter([100.0, *(103.0 + n for n in range(count))])
    statistics = SequenceStatistics()
    return statistics, Events(statistics, lambda: next(now))


def test_what_happened_is_told_by_the_sequence_s_own_clock():
    statistics, events = told()
    events.record("replayed", 2, "a#0", 7, 101.0, "2 steps replayed")
    (step,) = statistics.events
    assert step == SequenceStep("replayed", 2, "a#0", 7, 1.0, 2.0, "2 steps replayed")


def test_first_failure_is_the_earliest_whatever_stage_it_struck():
    statistics, events = told(3)
    assert statistics.first_failure is None
    first, second = (categorize_browser_failure(what, {"what": what}) for what in ("hung", "oom"))
    events.record("restored", 0, "a#0", 1, 101.0, "")
    events.record("failed", 1, "b#0", 1, 101.0, "", first)
    events.record("failed", 0, "a#0", 1, 101.0, "", second)
    assert statistics.first_failure is first


def test_only_the_last_events_are_kept():
    statistics, events = told(1500)
    for position in range(1500):
        events.record("failed", 0, "a#0", position, 101.0, "")
    assert len(statistics.events) == 1000
    assert statistics.events[-1].position == 1499
