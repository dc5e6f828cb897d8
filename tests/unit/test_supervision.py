from hypothesis import given
from hypothesis import strategies as st

from recovery.supervision import GiveUp, Restart, RestartLimit, record_restart

LIMIT = RestartLimit(
    restarts_max=3, period_seconds=10.0, delay_first_seconds=1.0, delay_max_seconds=3.0
)


def test_restarts_within_the_limit_go_on_and_wait_longer_each_time():
    first = record_restart((), 0.0, LIMIT)
    second = record_restart(first.history, 1.0, LIMIT)
    third = record_restart(second.history, 2.0, LIMIT)
    assert first == Restart((0.0,), delay=1.0)
    assert second == Restart((0.0, 1.0), delay=2.0)
    assert third == Restart((0.0, 1.0, 2.0), delay=3.0)  # not 4: delay_max_seconds


def test_one_restart_too_many_in_the_period_gives_up():
    assert record_restart((0.0, 1.0, 2.0), 3.0, LIMIT) == GiveUp((0.0, 1.0, 2.0, 3.0))


def test_old_restarts_are_forgotten():
    assert record_restart((0.0, 1.0, 2.0), 11.5, LIMIT) == Restart((2.0, 11.5), delay=2.0)
    assert record_restart((0.0,), 10.0, LIMIT).history == (10.0,)  # exactly a period ago


def test_a_limit_of_none_gives_up_at_once():
    assert isinstance(record_restart((), 0.0, RestartLimit(restarts_max=0)), GiveUp)


@given(st.lists(st.floats(0, 20), max_size=30))
def test_never_more_than_the_limit_in_any_period(gaps):
    at, history, allowed = 0.0, (), []
    for gap in gaps:
        at += gap
        verdict = record_restart(history, at, LIMIT)
        history = verdict.history
        if isinstance(verdict, GiveUp):
            break
        allowed.append(at)
        assert 0 < verdict.delay <= LIMIT.delay_max_seconds
    for start in allowed:
        in_period = [t for t in allowed if 0 <= t - start < LIMIT.period_seconds]
        assert len(in_period) <= LIMIT.restarts_max
