"""Every difference between a log and the living, one at a time.

The whole is in test_supervisor_takeover.
"""

import pytest

from recovery.breaker import CircuitBreaker
from recovery.control import (
    BreakersMoved,
    BrowserFailed,
    BrowserFound,
    BrowserReady,
    BrowserRecord,
    BrowserStopped,
    Drain,
    Launch,
    Load,
    ModelLoaded,
    ModelPhase,
    Phase,
    PoolState,
    Reconciliation,
    Reconnect,
    Seen,
    Stop,
    Unload,
    reconcile,
)
from recovery.failures import Category
from recovery.kinds import BrowserType, Readiness
from tests.fakes import FACTS, NUMERIC, failure

CHROME = BrowserType.CHROME


def state(phase: Phase, epoch: int = 3, **fields) -> PoolState:
    record = BrowserRecord("b", CHROME, epoch, phase, 0.0, **fields)
    return PoolState(browsers={"b": record}, models={"m": "digest"})


def ready(epoch: int = 3, digest: str = "digest", **fields) -> Seen:
    return Seen(epoch, Readiness.READY, FACTS, {"m": digest}, {"m": NUMERIC}, **fields)


LOADED = {"m": ModelPhase.LOADED}
LOADING = {"m": ModelPhase.LOADING}


@pytest.mark.parametrize(
    ("log", "seen", "orders"),
    [
        (state(Phase.READY, models=LOADED), ready(), ()),
        (state(Phase.STARTING), None, (Launch("b", CHROME, 3),)),
        (state(Phase.STARTING), Seen(3, Readiness.STARTING), (Launch("b", CHROME, 3),)),
        (state(Phase.STARTING), Seen(2, Readiness.DEAD), (Launch("b", CHROME, 3),)),
        (state(Phase.STARTING), Seen(3, Readiness.DEAD), (Launch("b", CHROME, 3),)),
        (state(Phase.RECONNECTING, models=LOADED), ready(), (Reconnect("b", 3),)),
        (state(Phase.DRAINING), ready(), (Drain("b", 3),)),
        (state(Phase.READY, models=LOADED), ready(digest="old"), (Load("b", 3, "m"),)),
        (state(Phase.GIVEN_UP), ready(), (Stop("b", 3),)),
        (state(Phase.STOPPED), None, ()),
        (state(Phase.REPLACING), ready(), ()),
    ],
)
def test_orders_that_may_not_have_arrived_are_given_again(log, seen, orders):
    found = reconcile(log, {"b": seen} if seen else {}, at=9.0)
    assert found == Reconciliation((), orders)


@pytest.mark.parametrize(
    ("log", "seen", "events"),
    [
        (state(Phase.STARTING), ready(), (BrowserReady("b", 3, FACTS),)),
        (
            state(Phase.READY, models=LOADING),
            ready(),
            (ModelLoaded("b", 3, "m", NUMERIC),),
        ),
        (state(Phase.DRAINING), None, (BrowserStopped("b"),)),
    ],
)
def test_outcomes_that_were_never_logged_are_news(log, seen, events):
    found = reconcile(log, {"b": seen} if seen else {}, at=9.0)
    assert found == Reconciliation(events, ())


def test_worker_that_is_gone_has_failed():
    (event,) = reconcile(state(Phase.READY), {}, at=9.0).events
    assert isinstance(event, BrowserFailed)
    assert (event.epoch, event.failure.evidence["what"], event.failure.at) == (
        3,
        "worker_exited",
        9.0,
    )


def test_cause_of_a_death_that_nobody_saw_is_taken_over():
    why = failure(Category.GPU_ERROR)
    seen = {"b": Seen(3, Readiness.DEAD, cause=why)}
    assert reconcile(state(Phase.READY), seen, 9.0).events == (BrowserFailed("b", 3, why),)


def test_page_that_is_out_of_touch_is_a_failure_of_a_browser_that_lives():
    why = failure(Category.CONNECTION_FAILURE)
    found = reconcile(state(Phase.READY, models=LOADED), {"b": ready(cause=why)}, 9.0)
    assert found.events == (BrowserFailed("b", 3, why),)


def test_incarnation_that_the_log_has_lost_is_found_and_started_again():
    first, second = reconcile(state(Phase.READY), {"b": ready(epoch=5)}, 9.0).events
    assert first == BrowserFound("b", 5)
    assert isinstance(second, BrowserFailed)
    assert second.epoch == 5


def test_model_that_nobody_wants_any_more_is_unloaded():
    log = PoolState(browsers={"b": BrowserRecord("b", CHROME, 3, Phase.READY, 0.0)})
    assert reconcile(log, {"b": ready()}, 9.0).orders == (Unload("b", 3, "m"),)


def test_circuit_that_moved_unseen_is_news_and_one_that_did_not_is_none():
    breaker = CircuitBreaker("b", failure_threshold=1)
    closed = breaker.snapshot()
    log = state(Phase.READY, models=LOADED)
    assert reconcile(log, {"b": ready(breakers={"": closed})}, 9.0) == Reconciliation()
    breaker.observe(failure())
    opened = breaker.snapshot()
    found = reconcile(log, {"b": ready(breakers={"": opened})}, 9.0)
    assert found.events == (BreakersMoved("b", {"": opened}),)
