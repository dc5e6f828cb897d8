import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from recovery.breaker import (
    Abandoned,
    Breaker,
    BreakerConfig,
    Failed,
    Permit,
    Repaired,
    Succeeded,
    Switched,
    Ticked,
    admit,
    is_recorded,
    open_seconds,
    step,
)
from recovery.errors import IllegalTransition
from recovery.failures import Category, Severity
from tests.circuits import (
    API_ERROR,
    CLOSED,
    CONFIG,
    CRASH,
    DEFAULT,
    DISABLED,
    EVERYTHING,
    FORCED_OPEN,
    HALF_OPEN,
    MILD,
    MODERATE,
    OPEN,
    SEVERE,
    TIMEOUT,
    Story,
)


@pytest.fixture
def story() -> Story:
    return Story()


# -- closed ----------------------------------------------------------------------------------------


def test_third_failure_in_a_row_opens_the_breaker(story):
    assert story.fail().state is story.fail().state is CLOSED
    assert story.fail().state is OPEN
    assert story.breaker.outage.until == story.at + 10.0


def test_success_ends_the_row_of_failures(story):
    for _ in range(5):
        story.fail()
        story.fail()
        story.succeed()
    assert (story.breaker.state, story.breaker.failures) == (CLOSED, 0)
    assert (story.breaker.calls.failures, story.breaker.calls.successes) == (10, 5)


def test_asking_a_closed_breaker_makes_no_new_state(story):
    before = story.breaker
    assert story.ask() == Permit(0, 0, 0.0)
    assert story.breaker is before


def test_breaker_that_would_be_one_too_many_open_stays_closed_and_opens_when_it_may(story):
    for _ in range(4):
        story.fail(may_open=False)
    assert (story.breaker.state, story.breaker.ledger.held) == (CLOSED, 2)
    assert story.fail().state is OPEN


def test_failure_outside_any_call_counts_too(story):
    for at in range(3):
        story.tell(lambda at: Failed(at, None, CRASH, SEVERE))
    assert story.breaker.state is OPEN
    assert story.tell(lambda at: Failed(at, None, CRASH, SEVERE)).calls.failures == 4
    assert story.breaker.generation == 1


# -- what is recorded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "severity", "retried", "components", "recorded"),
    [
        (TIMEOUT, SEVERE, True, 1, True),  # severe: always
        (CRASH, MILD, True, 1, True),  # a crash: always
        (TIMEOUT, MODERATE, False, 1, True),  # failed for the caller
        (TIMEOUT, MODERATE, True, 1, False),
        (TIMEOUT, MODERATE, True, 2, True),  # more than one component
        (TIMEOUT, MILD, False, 1, True),
        (TIMEOUT, MILD, True, 1, False),  # mild and retried: never
        (TIMEOUT, MILD, True, 2, False),
    ],
)
def test_what_is_recorded_while_closed(category, severity, retried, components, recorded):
    event = Failed(1.0, None, category, severity, retried, components)
    assert is_recorded(Breaker(), event) is recorded
    after = step(Breaker(), event, CONFIG)
    assert (after.failures, after.calls.recorded, after.calls.failures) == (recorded, recorded, 1)


def test_second_of_the_same_category_in_a_row_is_always_recorded(story):
    retried = {"severity": MILD, "retried": True}
    assert story.fail(category=TIMEOUT, **retried).failures == 0
    assert story.fail(category=TIMEOUT, **retried).failures == 1
    assert story.fail(category=API_ERROR, **retried).failures == 1  # another category
    story.succeed()
    assert story.fail(category=API_ERROR, **retried).failures == 0  # not in a row


def test_anything_is_recorded_while_half_open(story):
    probe = story.half_open()
    assert story.fail(probe, TIMEOUT, MILD, retried=True).state is OPEN


# -- open ------------------------------------------------------------------------------------------


def test_open_breaker_refuses_until_it_is_time_and_stays_as_it_is(story):
    story.open()
    before = story.breaker
    assert story.ask(after=9.9) is None
    assert story.breaker is before
    assert story.ask(after=0.1) == Permit(2, 1, story.at)
    assert story.breaker.state is HALF_OPEN


def test_late_answer_of_a_call_admitted_before_the_trip_changes_nothing(story):
    early, other = story.asked(), story.asked()
    opened = story.open()
    assert story.succeed(early) is opened
    assert story.fail(other) is opened
    assert story.tell(lambda at: Abandoned(at, early)) is opened


def test_each_opening_in_a_row_is_twice_as_long_up_to_the_maximum(story):
    lengths = []
    story.open()
    for _ in range(6):
        lengths.append(story.breaker.outage.until - story.breaker.since)
        story.fail(story.asked(after=lengths[-1]))
    assert lengths == [10.0, 20.0, 40.0, 80.0, 120.0, 120.0]


def test_open_time_starts_again_from_the_first_after_a_recovery(story):
    story.fail(story.half_open())
    story.succeed(story.asked(after=20.0))
    story.succeed()
    assert story.breaker.state is CLOSED
    assert story.open().outage.until == story.at + 10.0


def test_recovery_timeout_beyond_the_maximum_is_kept():
    config = BreakerConfig(recovery_timeout=300.0, recovery_timeout_jitter=0.0)
    assert open_seconds(Breaker(), config) == 300.0


@given(seed=st.integers(), generation=st.integers(0), openings=st.integers(0, 10_000))
def test_jitter_only_shortens_and_comes_from_the_seed(seed, generation, openings):
    breaker = Breaker(seed=seed, generation=generation)
    breaker = breaker._replace(outage=breaker.outage._replace(openings=openings))
    seconds = open_seconds(breaker, DEFAULT)
    longest = open_seconds(breaker, CONFIG)
    assert 0.9 * longest <= seconds <= longest <= 120.0
    assert seconds == open_seconds(breaker, DEFAULT)


def test_breakers_with_different_seeds_come_back_at_different_times():
    assert len({open_seconds(Breaker(seed=seed), DEFAULT) for seed in range(20)}) == 20


# -- half-open -------------------------------------------------------------------------------------


def test_two_successful_probes_close_the_breaker(story):
    first = story.half_open()
    assert story.succeed(first).state is HALF_OPEN
    assert story.succeed().state is CLOSED
    assert story.breaker.failures == 0


def test_failed_probe_opens_it_again(story):
    story.succeed(story.half_open())
    assert story.fail().state is OPEN


def test_probes_under_way_are_capped(story):
    story.config = replace(CONFIG, half_open_max_calls=2)
    first = story.half_open()
    assert story.ask() == Permit(first.generation, 2, story.at)
    assert story.ask() is None
    story.succeed(first)
    assert story.ask() == Permit(first.generation, 3, story.at)


def test_probe_that_never_reports_frees_its_place_and_counts_as_a_failure(story):
    probe = story.half_open()
    failures = story.breaker.calls.failures
    assert story.ask(after=29.9) is None
    assert story.breaker.state is HALF_OPEN
    assert story.ask(after=0.1) is None
    assert (story.breaker.state, story.breaker.category) == (OPEN, TIMEOUT)
    assert story.breaker.calls.failures == failures + 1
    opened = story.breaker
    assert story.succeed(probe) is opened  # too late


def test_probe_that_reports_beyond_its_limit_has_failed(story):
    assert story.succeed(story.half_open(), after=31.0).state is OPEN


def test_tick_notices_a_hanging_probe_without_a_call(story):
    story.half_open()
    assert story.tell(Ticked, after=30.0).state is OPEN


def test_abandoned_probe_frees_its_place_and_counts_as_nothing(story):
    probe = story.half_open()
    calls = story.breaker.calls
    story.tell(lambda at: Abandoned(at, probe))
    assert (story.breaker.state, story.breaker.calls) == (HALF_OPEN, calls)
    assert story.ask() is not None


def test_death_while_half_open_opens_it_again(story):
    story.half_open()
    assert story.tell(lambda at: Failed(at, None, CRASH, SEVERE)).state is OPEN


# -- forced open, disabled, reset ------------------------------------------------------------------


def test_forced_open_refuses_for_ever_and_reset_closes_it(story):
    story.tell(lambda at: Switched(at, FORCED_OPEN))
    assert story.ask(after=1e9) is None
    assert story.tell(lambda at: Switched(at, CLOSED)).state is CLOSED
    assert story.breaker.ledger.recoveries == 0


def test_disabled_admits_and_counts_but_never_opens(story):
    story.tell(lambda at: Switched(at, DISABLED))
    for _ in range(10):
        story.fail()
    story.succeed()
    assert (story.breaker.state, story.breaker.calls.failures) == (DISABLED, 10)
    assert story.breaker.calls.recorded == 0


def test_reset_of_an_open_breaker_is_no_recovery(story):
    story.open()
    story.tell(lambda at: Switched(at, CLOSED))
    assert (story.breaker.failures, story.breaker.ledger.recoveries) == (0, 0)
    assert story.breaker.outage == Breaker().outage


# -- illegal transitions ---------------------------------------------------------------------------


def test_illegal_events_raise_and_leave_the_state_alone(story):
    probe = story.half_open()
    half_open = story.breaker
    ahead = probe._replace(generation=9)
    invented = probe._replace(probe=7)
    for event in (
        Succeeded(story.at, ahead),
        Failed(story.at, ahead, CRASH, SEVERE),
        Succeeded(story.at, invented),
        Failed(story.at, invented, CRASH, SEVERE),
        Abandoned(story.at, invented),
        Switched(story.at, OPEN),
        Switched(story.at, HALF_OPEN),
    ):
        with pytest.raises(IllegalTransition):
            step(half_open, event, story.config)
    assert story.breaker is half_open


def test_nobody_can_report_to_an_open_breaker(story):
    story.open()
    forged = Permit(story.breaker.generation, 0, story.at)
    with pytest.raises(IllegalTransition, match="under way while open"):
        story.succeed(forged)


def test_probe_reports_once(story):
    probe = story.half_open()
    story.succeed(probe)
    with pytest.raises(IllegalTransition):
        story.succeed(probe)


# -- any sequence of events ------------------------------------------------------------------------


class AnySequence(RuleBasedStateMachine):
    """Whatever happens in whatever order, these hold."""

    def __init__(self) -> None:
        super().__init__()
        self.config = EVERYTHING
        self.breaker = Breaker(seed=7)
        self.at = 1000.0
        self.under_way: list[Permit] = []
        self.totals = {"succeeded": 0, "failed": 0}

    def move(self, after: Breaker) -> None:
        before = self.breaker
        assert after.generation >= before.generation
        assert (after.generation > before.generation) or after.state is before.state
        assert after.ledger.openings >= before.ledger.openings
        self.breaker = after

    @rule(seconds=st.sampled_from([0.0, 0.001, 1.0, 4.0, 8.0, 9.5, 20.0, 500.0]))
    def time_goes_by(self, seconds):
        self.at += seconds

    @rule()
    def ask(self):
        before = self.breaker
        after, permit = admit(before, self.at, self.config)
        if before.state is OPEN and self.at < before.outage.until:
            assert permit is None
            assert after is before
        if before.state is FORCED_OPEN:
            assert permit is None
        if before.state in (CLOSED, DISABLED):
            assert permit is not None
        if permit is not None:
            assert permit.generation == after.generation
            assert permit not in self.under_way or permit.probe == 0
            self.under_way.append(permit)
        self.move(after)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), how=st.sampled_from(["succeed", "fail", "abandon"]))
    def report(self, data, how):
        permit = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        before = self.breaker
        match how:
            case "succeed":
                event = Succeeded(self.at, permit)
            case "fail":
                event = data.draw(failed(self.at, permit))
            case _:
                event = Abandoned(self.at, permit)
        after = step(before, event, self.config)
        if permit.generation != before.generation:
            assert after is before  # late
        elif before.state in (CLOSED, DISABLED):
            self.totals["succeeded"] += how == "succeed"
            self.totals["failed"] += how == "fail"
            if before.state is CLOSED and how == "fail" and not event.may_open:
                assert after.state is CLOSED
        self.move(after)

    @rule(data=st.data())
    def fail_outside_any_call(self, data):
        self.move(step(self.breaker, data.draw(failed(self.at, None)), self.config))

    @rule(to=st.sampled_from([CLOSED, FORCED_OPEN, DISABLED]))
    def switch(self, to):
        self.move(step(self.breaker, Switched(self.at, to), self.config))
        assert self.breaker.state is to

    @rule()
    def tick(self):
        self.move(step(self.breaker, Ticked(self.at), self.config))

    @rule()
    def repair(self):
        self.move(step(self.breaker, Repaired(self.at, "restart"), self.config))

    @invariant()
    def invariants_hold(self):
        breaker, config = self.breaker, self.config
        calls, outage, ledger = breaker.calls, breaker.outage, breaker.ledger
        assert len(outage.probes) <= config.half_open_max_calls
        assert all(probe.generation == breaker.generation for probe in outage.probes)
        assert not outage.probes or breaker.state is HALF_OPEN
        assert calls.successes >= self.totals["succeeded"]
        assert calls.failures >= self.totals["failed"]
        assert calls.recorded <= calls.failures
        assert calls.recent.bit_count() <= min(calls.failures, config.metrics_window_size)
        assert 0 <= max(calls.window.failed, calls.window.slow) <= calls.window.calls
        assert sum(bucket.calls for bucket in calls.window.buckets) <= calls.window.calls
        assert len(calls.window.buckets) <= 10
        assert ledger.recoveries <= ledger.openings
        assert len(ledger.history) <= config.recovery_history_max
        assert (outage.began is not None) == (breaker.state in (OPEN, HALF_OPEN))
        if breaker.state is OPEN:
            longest = config.recovery_timeout_max
            assert breaker.since < outage.until <= breaker.since + longest
        if breaker.state is HALF_OPEN:
            assert outage.probe_successes < config.success_threshold
        assert pickle.loads(pickle.dumps(breaker)) == breaker


def failed(at: float, permit: Permit | None) -> st.SearchStrategy[Failed]:
    return st.builds(
        Failed,
        st.just(at),
        st.just(permit),
        st.sampled_from(Category),
        st.sampled_from(Severity),
        st.booleans(),
        st.integers(1, 3),
        st.booleans(),
    )


TestAnySequence = AnySequence.TestCase
