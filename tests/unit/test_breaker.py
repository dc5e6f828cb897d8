import asyncio
import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pydantic import TypeAdapter

from recovery.breaker import (
    Abandoned,
    Asked,
    Breaker,
    BreakerConfig,
    Change,
    CircuitBreaker,
    CircuitOpenError,
    CircuitState,
    Event,
    Failed,
    Permit,
    Repaired,
    Snapshot,
    Succeeded,
    Switched,
    Ticked,
    admit,
    is_recorded,
    open_seconds,
    step,
)
from recovery.errors import (
    BadInput,
    BrowserError,
    BrowserLost,
    IllegalTransition,
    OperationFailed,
    PageError,
    PoolBusy,
)
from recovery.failures import Category, Scope, Severity
from tests.fakes import failure

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
FORCED_OPEN, DISABLED = CircuitState.FORCED_OPEN, CircuitState.DISABLED
SEVERE, MODERATE, MILD = Severity.SEVERE, Severity.MODERATE, Severity.MILD
CRASH, TIMEOUT, API_ERROR = Category.CRASH, Category.TIMEOUT, Category.API_ERROR

DEFAULT = BreakerConfig()
CONFIG = BreakerConfig(recovery_timeout_jitter=0.0)  # so that 10 s are 10 s
BY_COUNT = BreakerConfig(
    failure_threshold=1000, window_calls=10, minimum_calls=10, failure_rate_threshold=0.5
)
BY_TIME = BreakerConfig(
    failure_threshold=1000, window_seconds=10.0, minimum_calls=4, failure_rate_threshold=0.5
)
BY_SLOWNESS = BreakerConfig(
    window_calls=10, minimum_calls=4, slow_call_rate_threshold=0.5, slow_call_seconds=2.0
)
EVERYTHING = BreakerConfig(
    half_open_max_calls=2,
    window_seconds=30.0,
    minimum_calls=5,
    failure_rate_threshold=0.5,
    slow_call_rate_threshold=0.5,
    slow_call_seconds=4.0,
    probe_timeout=8.0,
)


class Story:
    """A breaker that calls happen to, one second apart unless said otherwise."""

    def __init__(self, config: BreakerConfig = CONFIG) -> None:
        self.config = config
        self.breaker = Breaker()
        self.at = 0.0

    def tell(self, event: Callable[[float], Event], after: float = 1.0) -> Breaker:
        self.at += after
        self.breaker = step(self.breaker, event(self.at), self.config)
        return self.breaker

    def ask(self, after: float = 0.0) -> Permit | None:
        self.at += after
        self.breaker, permit = admit(self.breaker, self.at, self.config)
        return permit

    def asked(self, after: float = 0.0) -> Permit:
        permit = self.ask(after)
        assert permit is not None
        return permit

    def succeed(self, permit: Permit | None = None, after: float = 1.0) -> Breaker:
        permit = permit or self.asked()
        return self.tell(lambda at: Succeeded(at, permit), after)

    def fail(
        self,
        permit: Permit | None = None,
        category: Category = CRASH,
        severity: Severity = SEVERE,
        after: float = 1.0,
        **more,
    ) -> Breaker:
        permit = permit or self.asked()
        return self.tell(lambda at: Failed(at, permit, category, severity, **more), after)

    def open(self) -> Breaker:
        while self.breaker.state is CLOSED:
            self.fail()
        assert self.breaker.state is OPEN
        return self.breaker

    def half_open(self) -> Permit:
        return self.asked(after=self.open().outage.until - self.at)


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
    ("category", "severity", "cured", "components", "recorded"),
    [
        (TIMEOUT, SEVERE, True, 1, True),  # severe: always
        (CRASH, MILD, True, 1, True),  # a crash: always
        (TIMEOUT, MODERATE, False, 1, True),  # failed for the caller
        (TIMEOUT, MODERATE, True, 1, False),
        (TIMEOUT, MODERATE, True, 2, True),  # more than one component
        (TIMEOUT, MILD, False, 1, True),
        (TIMEOUT, MILD, True, 1, False),  # mild and cured: never
        (TIMEOUT, MILD, True, 2, False),
    ],
)
def test_what_is_recorded_while_closed(category, severity, cured, components, recorded):
    event = Failed(1.0, None, category, severity, cured, components)
    assert is_recorded(Breaker(), event) is recorded
    after = step(Breaker(), event, CONFIG)
    assert (after.failures, after.calls.recorded, after.calls.failures) == (recorded, recorded, 1)


def test_second_of_the_same_category_in_a_row_is_always_recorded(story):
    cured = {"severity": MILD, "cured": True}
    assert story.fail(category=TIMEOUT, **cured).failures == 0
    assert story.fail(category=TIMEOUT, **cured).failures == 1
    assert story.fail(category=API_ERROR, **cured).failures == 1  # another category
    story.succeed()
    assert story.fail(category=API_ERROR, **cured).failures == 0  # not in a row


def test_anything_is_recorded_while_half_open(story):
    probe = story.half_open()
    assert story.fail(probe, TIMEOUT, MILD, cured=True).state is OPEN


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


# -- windows ---------------------------------------------------------------------------------------


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
    story.fail(category=TIMEOUT, severity=MILD, cured=True)
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


# -- configuration ---------------------------------------------------------------------------------


def test_defaults_are_those_of_the_source():
    assert (
        DEFAULT.failure_threshold,
        DEFAULT.recovery_timeout,
        DEFAULT.half_open_max_calls,
        DEFAULT.success_threshold,
        DEFAULT.metrics_window_size,
        DEFAULT.min_samples_for_stats,
    ) == (3, 10.0, 1, 2, 100, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"failure_threshold": 0},
        {"failure_threshold": 2.5},
        {"recovery_timeout": -1.0},
        {"recovery_timeout": float("nan")},
        {"probe_timeout": float("inf")},
        {"recovery_timeout_jitter": 1.5},
        {"half_open_max_calls": "one"},
        {"window_calls": 100, "window_seconds": 10.0},
        {"failure_rate_threshold": 0.5},
        {"window_calls": 100, "slow_call_rate_threshold": 0.5},
        {"window_calls": 5, "failure_rate_threshold": 0.5},
        {"failure_treshold": 3},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(BadInput):
        CircuitBreaker("b", **settings)


# -- the shell -------------------------------------------------------------------------------------


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Shell(CircuitBreaker):
    """A breaker with a clock of its own, which keeps the changes that it told of."""

    __slots__ = ("changes", "clock")

    def __init__(self, **more) -> None:
        self.changes: list[Change] = []
        self.clock = Clock()
        more = {"recovery_timeout_jitter": 0.0, "on_change": self.changes.append, **more}
        super().__init__("chrome-0", browser="chrome-0", clock=self.clock, wall=lambda: 1e9, **more)

    def trip(self) -> None:
        while self.state is CLOSED:
            self.observe(failure())

    def told(self) -> list[tuple[CircuitState, CircuitState]]:
        return [(change.before, change.after) for change in self.changes]


@pytest.fixture
def shell() -> Shell:
    return Shell()


def crash(error: BaseException | None = None) -> None:
    raise error or BrowserLost("gone")


async def crash_later() -> None:
    await asyncio.sleep(0)
    raise BrowserLost("gone")


async def answer_later() -> int:
    await asyncio.sleep(0)
    return 42


class AsyncCallable:
    async def __call__(self) -> int:
        return 42


def test_execute_calls_and_returns(shell):
    assert shell.execute(divmod, 7, 2) == (3, 1)
    assert shell.get_metrics()["successes"] == 1


@pytest.mark.parametrize(
    "fn",
    [answer_later, AsyncCallable(), partial(answer_later), lambda: answer_later()],
    ids=["function", "callable", "partial", "lambda"],
)
async def test_execute_awaits_whatever_is_async(shell, fn):
    assert await shell.execute(fn) == 42
    assert shell.get_metrics()["successes"] == 1


async def test_execute_of_an_async_function_asks_when_it_is_awaited(shell):
    call = shell.execute(answer_later)
    shell.trip()
    with pytest.raises(CircuitOpenError):
        await call


def test_errors_pass_through_execute_and_open_the_breaker(shell):
    for _ in range(3):
        with pytest.raises(BrowserLost, match="gone"):
            shell.execute(crash)
    with pytest.raises(CircuitOpenError):
        shell.execute(crash)
    assert (shell.get_metrics()["executions"], shell.get_metrics()["refused"]) == (3, 1)


@pytest.mark.parametrize("fn", [crash_later, lambda: crash_later()], ids=["function", "lambda"])
async def test_errors_pass_through_async_execute_and_open_the_breaker(shell, fn):
    for _ in range(3):
        with pytest.raises(BrowserLost, match="gone"):
            await shell.execute(fn)
    assert shell.state is OPEN


async def test_decorator_keeps_sync_sync_and_async_async(shell):
    @shell
    def add(a: int, b: int = 1) -> int:
        """Adds."""
        return a + b

    assert (add(1, b=2), add.__name__, add.__doc__) == (3, "add", "Adds.")
    assert await shell(answer_later)() == 42
    assert asyncio.iscoroutinefunction(shell(answer_later))
    assert shell.get_metrics()["successes"] == 2


async def test_guard_protects_a_block_sync_and_async(shell):
    with shell.guard():
        pass
    async with shell.guard():
        await asyncio.sleep(0)
    with pytest.raises(BrowserLost):
        async with shell.guard():
            crash()
    assert (shell.get_metrics()["successes"], shell.get_metrics()["failures"]) == (2, 1)


def test_manual_form_with_a_failure_that_a_retry_cured(shell):
    shell.success(shell.allow())
    mild = failure(TIMEOUT, severity=MILD)
    shell.failure(shell.allow(), mild, cured=True)
    metrics = shell.get_metrics()
    assert (metrics["failures"], metrics["recorded_failures"]) == (1, 0)


def test_failure_of_a_whole_node_affects_more_than_one_component(shell):
    wide = failure(TIMEOUT, severity=MODERATE, scope=Scope.NODE)
    shell.failure(shell.allow(), wide, cured=True)
    assert shell.breaker.failures == 1


@pytest.mark.parametrize(
    "error",
    [BadInput("yours"), PoolBusy("full"), asyncio.CancelledError(), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_are_not_its_fault_count_as_nothing_and_free_the_probe(shell, error):
    shell.trip()
    shell.clock.now += 10.0
    before = shell.get_metrics()["executions"]
    with pytest.raises(type(error)):
        shell.execute(crash, error)
    assert shell.state is HALF_OPEN
    assert shell.get_metrics()["executions"] == before
    assert shell.execute(int) == 0


def test_refusal_of_another_breaker_inside_is_no_failure_of_this_one(shell):
    inner = Shell()
    inner.trip()
    with pytest.raises(CircuitOpenError):
        shell.execute(inner.execute, int)
    assert shell.get_metrics()["executions"] == 0


def test_failed_operation_counts_as_the_failure_that_it_carries(shell):
    error = OperationFailed("no answer", failure=failure(TIMEOUT, severity=MODERATE))
    with pytest.raises(OperationFailed):
        shell.execute(crash, error)
    assert shell.breaker.category is TIMEOUT


def test_refusal_says_when_to_try_again_and_survives_pickling(shell):
    shell.trip()
    shell.clock.now += 4.0
    with pytest.raises(CircuitOpenError, match=r"of chrome-0 is open \(crash\).* in 6 s") as caught:
        shell.allow()
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, BrowserError)
    assert str(again) == str(caught.value)
    assert again.retry_after == 6.0
    assert again.fields == {"breaker": "chrome-0", "state": "open", "retry_after": 6.0}


def test_refusal_while_probed_and_while_forced_open(shell):
    shell.trip()
    shell.clock.now += 10.0
    shell.allow()
    shell.clock.now += 1.0
    with pytest.raises(CircuitOpenError, match=r"being probed.* in 29 s") as caught:
        shell.allow()
    assert caught.value.retry_after == 29.0
    shell.force_open()
    with pytest.raises(CircuitOpenError, match="forced open") as caught:
        shell.allow()
    assert caught.value.retry_after is None
    shell.disable()
    shell.success(shell.allow())
    shell.reset()
    assert shell.get_state() == "closed"


def test_changes_are_told_once_and_refusals_never(shell):
    shell.trip()
    for _ in range(5):
        with pytest.raises(CircuitOpenError):
            shell.allow()
    shell.clock.now += 10.0
    shell.execute(int)
    shell.execute(int)
    assert shell.told() == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]
    assert shell.changes[0] == Change("chrome-0", CLOSED, OPEN, 1, 1e9, 10.0, CRASH)
    assert shell.changes[2] == Change("chrome-0", HALF_OPEN, CLOSED, 3, 1e9)


def test_hanging_probe_is_told_as_one_change(shell):
    shell.trip()
    shell.clock.now += 10.0
    shell.allow()
    shell.clock.now += 30.0
    shell.tick()
    shell.tick()
    assert shell.told()[2:] == [(HALF_OPEN, OPEN)]


def test_breaker_that_may_not_open_asks_again_at_each_failure():
    answers = iter([False, False, True])
    shell = Shell(may_open=lambda: next(answers))
    for _ in range(4):
        shell.observe(failure())
    assert (shell.state, shell.breaker.ledger.held) == (CLOSED, 2)
    shell.observe(failure())
    assert shell.state is OPEN


def test_slow_success_that_may_not_open_it_is_held_too():
    shell = Shell(
        may_open=lambda: False,
        window_calls=2,
        minimum_calls=1,
        slow_call_rate_threshold=0.5,
        slow_call_seconds=1.0,
    )
    permit = shell.allow()
    shell.clock.now += 1.0
    shell.success(permit)
    assert (shell.state, shell.breaker.ledger.held) == (CLOSED, 1)


async def test_calls_that_overlap_hold_no_lock_and_each_reports_to_its_own_generation(shell):
    gate = asyncio.Event()

    async def wait_at_the_gate(fails: bool) -> None:
        await gate.wait()
        if fails:
            raise BrowserLost("gone")

    calls = [asyncio.ensure_future(shell.execute(wait_at_the_gate, n < 3)) for n in range(50)]
    await asyncio.sleep(0)
    assert shell.execute(int) == 0  # all 50 are inside, and nobody waits
    gate.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(result, BrowserLost) for result in results) == 3
    # The 47 answers after the third failure came too late to be counted.
    assert (shell.state, shell.breaker.calls.successes) == (OPEN, 1)


async def test_only_the_allowed_probes_of_many_tasks_go_through(shell):
    shell.trip()
    shell.clock.now += 10.0
    results = await asyncio.gather(
        *(shell.execute(answer_later) for _ in range(20)), return_exceptions=True
    )
    assert results.count(42) == 1
    assert sum(isinstance(result, CircuitOpenError) for result in results) == 19


async def test_cancelled_probe_frees_its_place(shell):
    shell.trip()
    shell.clock.now += 10.0
    probe = asyncio.ensure_future(shell.execute(asyncio.Event().wait))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert await shell.execute(answer_later) == 42


def test_threads_that_share_a_breaker_lose_no_count_with_a_lock():
    shell = Shell(lock=threading.Lock())

    def work() -> None:
        for _ in range(500):
            shell.execute(int)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shell.get_metrics()["successes"] == 4000


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_of_an_outage_and_its_recovery(shell):
    for _ in range(7):
        shell.execute(int)
    shell.trip()
    shell.repaired("restart")
    shell.clock.now += 10.0
    shell.execute(int)
    shell.clock.now += 5.0
    shell.execute(int)
    metrics = shell.get_metrics()
    assert metrics["current_state"] == "closed"
    assert (metrics["executions"], metrics["successes"], metrics["failures"]) == (12, 9, 3)
    assert metrics["success_rate"] == pytest.approx(0.75)
    assert metrics["enough_samples"]
    assert (metrics["circuit_open_count"], metrics["recoveries"]) == (1, 1)
    assert (metrics["recovery_rate"], metrics["avg_downtime_seconds"]) == (1.0, 15.0)
    assert metrics["current_downtime_seconds"] == 0.0
    (recovery,) = metrics["recovery_history"]
    assert recovery == {
        "timestamp": "2001-09-09T01:46:40+00:00",
        "recovery_method": "restart",
        "browser": "chrome-0",
        "downtime_seconds": 15.0,
    }
    json.dumps(metrics)


def test_metrics_while_open(shell):
    shell.trip()
    shell.clock.now += 4.0
    metrics = shell.get_metrics()
    assert (metrics["current_state"], metrics["seconds_in_state"]) == ("open", 4.0)
    assert (metrics["retry_after_seconds"], metrics["current_downtime_seconds"]) == (6.0, 4.0)
    assert (metrics["recovery_rate"], metrics["avg_downtime_seconds"]) == (0.0, 0.0)


def test_metrics_of_nothing_claim_nothing(shell):
    metrics = shell.get_metrics()
    assert (metrics["success_rate"], metrics["enough_samples"]) == (0.0, False)
    assert metrics["recovery_history"] == []


def test_success_rate_is_that_of_the_latest_calls():
    shell = Shell(metrics_window_size=4, failure_threshold=100)
    for _ in range(4):
        with pytest.raises(BrowserLost):
            shell.execute(crash)
    for _ in range(3):
        shell.execute(int)
    assert shell.get_metrics()["success_rate"] == 0.75


def test_history_of_recoveries_is_bounded():
    shell = Shell(recovery_history_max=2, success_threshold=1)
    for _ in range(5):
        shell.trip()
        shell.clock.now += 10.0
        shell.execute(int)
    metrics = shell.get_metrics()
    assert (metrics["recoveries"], len(metrics["recovery_history"])) == (5, 2)


def test_repr_tells_state_and_counts(shell):
    shell.execute(int)
    assert repr(shell) == "<CircuitBreaker chrome-0 [closed | 1 succeeded, 0 failed, 0 refused]>"


# -- moving house ----------------------------------------------------------------------------------


def moved(shell: Shell, now: float, away: float = 0.0) -> Shell:
    """The breaker of the next epoch, in a process whose clock shows `now`."""
    snapshot = pickle.loads(pickle.dumps(shell.snapshot()))
    again = Shell()
    again.clock.now = now
    again.restore(replace(snapshot, at=snapshot.at - away))
    return again


def test_replaced_browsers_breaker_goes_on_where_it_was(shell):
    shell.execute(int)
    shell.trip()
    shell.clock.now += 4.0
    again = moved(shell, now=7.0, away=1.0)
    with pytest.raises(CircuitOpenError) as caught:
        again.allow()
    assert caught.value.retry_after == pytest.approx(5.0)
    again.clock.now += 5.001
    again.execute(int)
    again.execute(int)
    assert again.state is CLOSED
    assert again.get_metrics()["avg_downtime_seconds"] == pytest.approx(10.001)
    assert again.get_metrics()["executions"] == 6


def test_two_failures_before_the_move_and_one_after_open_it(shell):
    shell.observe(failure())
    shell.observe(failure())
    again = moved(shell, now=0.0)
    again.observe(failure())
    assert again.state is OPEN


def test_call_admitted_before_the_move_is_late_after_it(shell):
    permit = shell.allow()
    again = moved(shell, now=100.0)
    again.success(permit)
    assert again.get_metrics()["executions"] == 0
    assert again.changes == []


def test_probe_under_way_is_let_go_by_the_move(shell):
    shell.trip()
    shell.clock.now += 10.0
    probe = shell.allow()
    again = moved(shell, now=50.0)
    assert again.state is HALF_OPEN
    again.success(probe)
    again.success(again.allow())
    assert again.state is HALF_OPEN  # the old probe did not count
    again.success(again.allow())
    assert again.state is CLOSED


def test_wall_clock_that_was_set_back_does_not_lengthen_the_outage(shell):
    shell.trip()
    with pytest.raises(CircuitOpenError) as caught:
        moved(shell, now=3.0, away=-3600.0).allow()
    assert caught.value.retry_after == pytest.approx(10.0)


def test_window_by_time_moves_along():
    shell = Shell(window_seconds=10.0, failure_rate_threshold=0.5)
    for _ in range(5):
        shell.execute(int)
        shell.clock.now += 1.0
    snapshot = shell.snapshot()
    again = Shell(window_seconds=10.0, failure_rate_threshold=0.5)
    again.clock.now = 1e6
    again.restore(snapshot)
    again.execute(int)
    assert again.breaker.calls.window.calls == 6
    again.clock.now += 11.0
    again.execute(int)
    assert again.breaker.calls.window.calls == 1


def test_snapshot_crosses_json(shell):
    for _ in range(200):
        shell.execute(int)
        with pytest.raises(PageError):
            shell.execute(crash, PageError("no"))
    shell.trip()
    shell.clock.now += 10.0
    shell.execute(int)
    adapter = TypeAdapter(Snapshot)
    snapshot = shell.snapshot()
    assert adapter.validate_json(adapter.dump_json(snapshot)) == snapshot


def test_everything_that_crosses_processes_pickles(shell):
    shell.trip()
    things = [
        EVERYTHING,
        shell.breaker,
        shell.snapshot(),
        *shell.changes,
        Asked(1.0),
        Succeeded(1.0, Permit(0, 0, 0.0)),
        Failed(1.0, None, CRASH, SEVERE),
        Abandoned(1.0, Permit(0, 0, 0.0)),
        Ticked(1.0),
        Repaired(1.0, "restart"),
        Switched(1.0, DISABLED),
    ]
    assert pickle.loads(pickle.dumps(things)) == things
    assert pickle.loads(pickle.dumps(EVERYTHING)).window_mask == EVERYTHING.window_mask
