"""The account of a sequence: times since it began, and no more than so much of it."""

from recovery.failures import categorize_browser_failure
from sharding.sequences.events import Account, Events, SequenceStep


def told(count: int = 1) -> tuple[Account, Events]:
    now = iter([100.0, *(103.0 + n for n in range(count))])
    account = Account()
    return account, Events(account, lambda: next(now))


def test_what_happened_is_told_by_the_sequence_s_own_clock():
    account, events = told()
    events.tell("replayed", 2, "a#0", 7, 101.0, "2 steps replayed")
    (step,) = account.happened
    assert step == SequenceStep("replayed", 2, "a#0", 7, 1.0, 2.0, "2 steps replayed")


def test_first_failure_is_the_earliest_whatever_stage_it_struck():
    account, events = told(3)
    assert account.first_failure is None
    first, second = (categorize_browser_failure(what, {"what": what}) for what in ("hung", "oom"))
    events.tell("restored", 0, "a#0", 1, 101.0, "")
    events.tell("failed", 1, "b#0", 1, 101.0, "", first)
    events.tell("failed", 0, "a#0", 1, 101.0, "", second)
    assert account.first_failure is first


def test_only_the_last_events_are_kept():
    account, events = told(1500)
    for position in range(1500):
        events.tell("failed", 0, "a#0", position, 101.0, "")
    assert len(account.happened) == 1000
    assert account.happened[-1].position == 1499
