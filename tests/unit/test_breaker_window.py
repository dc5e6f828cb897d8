from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.circuits import BY_COUNT, BY_SLOWNESS, BY_TIME, CLOSED, MILD, OPEN, TIMEOUT, Story


@pytest.fixture
def story() -> Story:
    return Story()


def test_rate_needs_a_minimum_of_calls():
    story = Story(BY_COUNT)
    for _ in range(9):
        assert story.fail().state is CLOSED
    assert story.fail().state is OPEN


def test_success_can_complete_the_minimum_of_calls():
    story = Story(BY_COUNT)
    for _ in range(6):
        story.fail()
    for _ in range(3):
        assert story.succeed().state is CLOSED
    assert story.succeed().state is OPEN


def test_window_by_count_forgets_the_oldest_call():
    story = Story(BY_COUNT)
    for _ in range(4):
        story.fail()
    for _ in range(10):
        story.succeed()
    for _ in range(4):
        story.fail()
    assert story.breaker.calls.window[:3] == (10, 4, 0)
    assert story.fail().state is OPEN


def test_window_by_time_forgets_what_is_too_long_ago():
    story = Story(BY_TIME)
    story.at = 1000.0
    for _ in range(3):
        story.fail()
    for _ in range(3):
        story.succeed(after=10.0)
    assert story.breaker.calls.window[:2] == (1, 0)
    for _ in range(2):
        story.succeed(after=0.1)
        assert story.fail(after=0.1).state is CLOSED
    assert story.breaker.calls.window[:2] == (5, 2)
    assert story.fail(after=0.1).state is OPEN


def test_slow_calls_open_the_breaker_though_they_succeed():
    story = Story(BY_SLOWNESS)
    story.succeed(after=0.1)
    story.succeed(after=0.1)
    assert story.succeed(after=2.0).state is CLOSED
    assert story.succeed(after=2.0).state is OPEN
    assert story.breaker.calls.slow == 2


def test_slow_probe_cannot_close_what_slowness_opened():
    story = Story(replace(BY_SLOWNESS, recovery_timeout_jitter=0.0))
    assert story.succeed(story.half_open(), after=2.0).state is OPEN


def test_unrecorded_failure_stays_out_of_the_window():
    story = Story(BY_COUNT)
    story.fail(category=TIMEOUT, severity=MILD, retried=True)
    assert story.breaker.calls.window.calls == 0


def test_window_starts_afresh_when_the_breaker_closes():
    story = Story(replace(BY_COUNT, recovery_timeout_jitter=0.0))
    story.succeed(story.half_open())
    story.succeed()
    assert (story.breaker.state, story.breaker.calls.window.calls) == (CLOSED, 0)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=60),
    st.sampled_from([BY_COUNT, BY_TIME]),
)
def test_window_agrees_with_counting_by_hand(calls, config):
    story = Story(replace(config, minimum_calls=1, failure_rate_threshold=0.0))
    story.at = 100.0
    told = []
    for after, failed in calls:
        if failed:
            story.fail(after=after)
        else:
            story.succeed(after=after)
        told.append((story.at, failed))
    window = story.breaker.calls.window
    if config.window_calls:
        shown = told[-10:]
        assert (window.calls, window.failed) == (len(shown), sum(failed for _, failed in shown))
    else:  # it slides by tenths, of which the first and the last are in part out of sight
        least = [failed for at, failed in told if at > story.at - 9.0 + 1e-6]
        most = [failed for at, failed in told if at > story.at - 11.0 - 1e-6]
        assert len(least) <= window.calls <= len(most)
        assert sum(least) <= window.failed <= sum(most)
