import json
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.breaker import (
    BreakerConfig,
    BreakerKey,
    Change,
    CircuitBreakerRegistry,
    CircuitOpenError,
    CircuitState,
    RegistryConfig,
    open_max,
)
from recovery.errors import BadInput, BrowserLost, PageError
from recovery.failures import Category, Scope, Severity
from tests.fakes import failure

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
CONFIG = BreakerConfig(recovery_timeout_jitter=0.0)


class Registry(CircuitBreakerRegistry):
    """A registry with a clock of its own, which keeps the changes that it told of."""

    def __init__(self, *browsers: str, **more) -> None:
        self.now = 100.0
        self.changes: list[Change] = []
        more = {"config": CONFIG, "wall": lambda: 1e9, **more}
        super().__init__(clock=lambda: self.now, on_change=self.changes.append, **more)
        for browser in browsers:
            self.breaker(browser)

    def trip(self, browser: str, model: str = "") -> CircuitState:
        breaker = self.breaker(browser, model)
        for _ in range(breaker.config.failure_threshold):
            breaker.observe(failure())
        return breaker.state


@pytest.fixture
def registry() -> Registry:
    return Registry("a", "b", "c", "d")


def test_breaker_of_a_key_is_made_once(registry):
    assert registry.breaker("a") is registry.breaker("a")
    assert registry.breaker("a", "m") is not registry.breaker("a")
    assert registry.breaker("a", "m").name == "m on a"
    assert len(registry) == 5


def test_models_can_have_a_configuration_of_their_own():
    registry = Registry("a", "b", model_config=BreakerConfig(failure_threshold=1))
    assert registry.breaker("a").config.failure_threshold == 3
    assert registry.breaker("a", "m").config.failure_threshold == 1


# -- the cap ---------------------------------------------------------------------------------------


def test_half_of_the_browsers_may_be_open_at_once(registry):
    assert [registry.trip(browser) for browser in "abcd"] == [OPEN, OPEN, CLOSED, CLOSED]
    assert registry.not_serving() == (BreakerKey("a"), BreakerKey("b"))
    assert registry.breaker("c").get_metrics()["openings_held"] == 1
    assert repr(registry) == "<CircuitBreakerRegistry [4 circuits | 2 open]>"


def test_breaker_that_was_held_opens_once_there_is_room(registry):
    for browser in "abc":
        registry.trip(browser)
    registry.breaker("a").reset()
    registry.breaker("c").observe(failure())
    assert registry.breaker("c").state is OPEN


def test_half_open_breaker_still_takes_its_place_and_may_open_again(registry):
    registry.trip("a")
    registry.trip("b")
    registry.now += 10.0
    permit = registry.breaker("a").allow()
    assert registry.trip("c") is CLOSED
    registry.breaker("a").failure(permit, failure())
    assert registry.breaker("a").state is OPEN


def test_only_browser_never_opens():
    registry = Registry("a")
    assert registry.trip("a") is CLOSED


def test_one_of_two_may_open():
    registry = Registry("a", "b")
    assert [registry.trip("a"), registry.trip("b")] == [OPEN, CLOSED]


def test_model_has_as_peers_the_browsers_that_hold_it_too(registry):
    for browser in "ab":
        registry.breaker(browser, "m")
    registry.breaker("a", "other")
    assert registry.trip("a", "m") is OPEN
    assert registry.trip("b", "m") is CLOSED
    assert registry.trip("a", "other") is CLOSED  # nobody else holds it
    assert registry.trip("a") is OPEN  # a browser's peers are browsers


def test_breakers_elsewhere_count():
    registry = Registry("a")
    registry.note_elsewhere({BreakerKey("b"): CLOSED, BreakerKey("c"): CLOSED})
    assert registry.trip("a") is OPEN
    registry.breaker("a").reset()
    registry.note_elsewhere({BreakerKey("b"): OPEN, BreakerKey("c"): CLOSED})
    assert registry.trip("a") is CLOSED
    assert registry.states() == {
        BreakerKey("a"): CLOSED,
        BreakerKey("b"): OPEN,
        BreakerKey("c"): CLOSED,
    }


def test_share_of_nothing_opens_nothing():
    registry = Registry("a", "b", "c", limits=RegistryConfig(open_share_max=0.0))
    assert registry.trip("a") is CLOSED


@given(st.integers(1, 1000), st.floats(0.0, 1.0))
def test_never_are_all_circuits_open(peers, share):
    assert 0 <= open_max(peers, share) < peers
    assert open_max(peers, share) <= max(peers * share, 1)


@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["fail", "call", "wait", "observe"])),
        max_size=80,
    ),
)
def test_whatever_fails_one_circuit_keeps_serving(browsers, story):
    registry = Registry(*(f"b{n}" for n in range(browsers)))
    for n, what in story:
        breaker = registry.breaker(f"b{n % browsers}")
        try:
            if what == "wait":
                registry.now += 6.0
            elif what == "observe":
                breaker.observe(failure())
            else:
                with breaker.guard():
                    if what == "fail":
                        raise BrowserLost("gone")
        except (BrowserLost, CircuitOpenError):
            pass
        assert len(registry.not_serving()) <= open_max(browsers, 0.5)


def test_threads_cannot_open_more_than_the_cap_together():
    registry = Registry(*"abcdefgh", lock=threading.Lock())
    threads = [threading.Thread(target=registry.trip, args=(browser,)) for browser in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.not_serving()) == 4


# -- both guards -----------------------------------------------------------------------------------


def fail(registry: Registry, error: Exception) -> None:
    with pytest.raises(type(error)), registry.guard("a", "m"):
        raise error


def test_answer_counts_for_the_browser_and_for_the_model(registry):
    with registry.guard("a", "m"):
        pass
    for breaker in (registry.breaker("a"), registry.breaker("a", "m")):
        assert breaker.get_metrics()["successes"] == 1


async def test_guard_is_async_too(registry):
    async with registry.guard("a", "m"):
        pass
    with pytest.raises(BrowserLost):
        async with registry.guard("a", "m"):
            raise BrowserLost("gone")
    assert registry.get_metrics()["executions"] == 4


def test_error_of_one_operation_counts_against_the_model_alone(registry):
    registry.breaker("b", "m")
    for _ in range(3):
        fail(registry, PageError("no such input"))
    assert registry.breaker("a", "m").state is OPEN
    assert registry.breaker("a").get_metrics()["executions"] == 0


def test_crash_counts_against_both(registry):
    registry.breaker("b", "m")
    for _ in range(3):
        fail(registry, BrowserLost("gone"))
    assert registry.breaker("a", "m").state is registry.breaker("a").state is OPEN


def test_callers_fault_counts_against_neither(registry):
    fail(registry, BadInput("yours"))
    assert registry.get_metrics()["executions"] == 0


def test_models_refusal_gives_the_browsers_probe_back(registry):
    registry.breaker("b", "m")
    registry.trip("a")
    registry.breaker("a", "m").force_open()
    registry.now += 10.0
    with pytest.raises(CircuitOpenError, match="m on a"), registry.guard("a", "m"):
        pass
    assert registry.breaker("a").state is HALF_OPEN
    registry.breaker("a").allow()  # the place is free


# -- bounds, metrics, moving house -----------------------------------------------------------------


def test_closed_breaker_that_was_asked_for_longest_ago_makes_room():
    registry = Registry("a", "b", "c", limits=RegistryConfig(breakers_max=3))
    registry.trip("a")
    registry.breaker("b")
    registry.breaker("d")
    assert [key.browser for key in registry.states()] == ["a", "b", "d"]


def test_forgotten_browser_takes_its_models_along(registry):
    registry.breaker("a", "m")
    registry.breaker("b", "m")
    registry.note_elsewhere({BreakerKey("a", "other"): OPEN})
    registry.forget("b", "m")
    registry.forget("a")
    assert list(registry.states()) == [BreakerKey("b"), BreakerKey("c"), BreakerKey("d")]


@pytest.mark.parametrize("limits", [{"open_share_max": 1.5}, {"breakers_max": 0}], ids=str)
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(BadInput):
        RegistryConfig(**limits)


def test_metrics_are_unified(registry):
    registry.breaker("b").execute(int)
    registry.trip("a")
    registry.now += 10.0
    registry.breaker("a").execute(int)
    registry.breaker("a").execute(int)
    registry.trip("b")
    metrics = registry.get_metrics()
    assert metrics["circuits_by_state"] == {
        "closed": 3,
        "open": 1,
        "half_open": 0,
        "forced_open": 0,
        "disabled": 0,
    }
    assert (metrics["executions"], metrics["successes"], metrics["failures"]) == (9, 3, 6)
    assert metrics["success_rate"] == pytest.approx(1 / 3)
    assert (metrics["circuit_open_count"], metrics["recoveries"]) == (2, 1)
    assert (metrics["recovery_rate"], metrics["avg_downtime_seconds"]) == (0.5, 10.0)
    assert set(metrics["circuits"]) == set("abcd")
    json.dumps(metrics)


def test_metrics_of_nothing():
    metrics = Registry().get_metrics()
    assert (metrics["success_rate"], metrics["avg_downtime_seconds"]) == (0.0, 0.0)


def test_changes_of_all_are_told_by_name(registry):
    registry.breaker("b", "m")
    registry.trip("a")
    registry.trip("a", "m")
    assert [change.name for change in registry.changes] == ["a", "m on a"]


def test_replaced_browser_goes_on_where_it_was(registry):
    registry.breaker("b", "m")
    registry.trip("a", "m")
    registry.trip("a")
    snapshots = pickle.loads(pickle.dumps(registry.snapshot("a")))
    assert set(snapshots) == {BreakerKey("a"), BreakerKey("a", "m")}
    again = Registry()
    again.now = 5.0
    again.restore(snapshots)
    assert again.breaker("a").state is again.breaker("a", "m").state is OPEN
    with pytest.raises(CircuitOpenError) as caught:
        again.breaker("a").allow()
    assert caught.value.retry_after == pytest.approx(10.0)


def test_severity_of_the_failure_reaches_both_breakers(registry):
    mild = failure(Category.CONNECTION_FAILURE, severity=Severity.MILD, scope=Scope.PAGE)
    registry.breaker("a").failure(registry.breaker("a").allow(), mild, retried=True)
    assert registry.breaker("a").breaker.failures == 0
