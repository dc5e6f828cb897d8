"""The rungs, by level, strategy, failure, breaker and history."""

import pytest

from recovery.breaker import CircuitState
from recovery.errors import BadInput
from recovery.failures import Category, Scope
from recovery.kinds import Level, RecoveryLevel
from recovery.plan import (
    INEFFECTIVE_ATTEMPTS,
    LEVEL_RUNGS,
    START_RUNG,
    STRATEGIES,
    StrategyOrder,
    Tally,
    plan,
    register_strategy,
    strategy_order,
)
from tests.fakes import failure

PROGRESSIVE = STRATEGIES["progressive"]
IN_TOUCH = failure(Category.CONNECTION_FAILURE, scope=Scope.PAGE)


def rungs(*arguments, **options) -> list[tuple[int, ...]]:
    return [tuple(int(r) for r in step) for step in plan(*arguments, **options).steps]


@pytest.mark.parametrize(
    ("category", "scope", "first"),
    [
        (Category.CONNECTION_FAILURE, Scope.PAGE, 1),
        (Category.CONNECTION_FAILURE, Scope.BROWSER, 2),
        (Category.TIMEOUT, Scope.OPERATION, 1),
        (Category.TIMEOUT, Scope.PAGE, 2),  # it hangs, and would not answer
        (Category.LAUNCH_FAILURE, Scope.BROWSER, 2),
        (Category.CRASH, Scope.PAGE, 2),
        (Category.INTERNAL_ERROR, Scope.BROWSER, 2),
        (Category.RESOURCE_EXHAUSTION, Scope.PAGE, 3),
        (Category.GPU_ERROR, Scope.PAGE, 3),
        (Category.API_ERROR, Scope.OPERATION, 3),
    ],
)
def test_progressive_climbs_from_the_start_rung_of_the_failure(category, scope, first):
    seen = failure(category, scope=scope)
    assert rungs(Level.MEDIUM, PROGRESSIVE, seen) == [(n,) for n in range(first, 5)]


def test_every_category_has_a_start_rung():
    assert START_RUNG.keys() == set(Category)
    assert LEVEL_RUNGS.keys() == set(Level)


@pytest.mark.parametrize(
    ("breaker", "first"),
    [(CircuitState.CLOSED, 1), (CircuitState.HALF_OPEN, 2), (CircuitState.OPEN, 4)],
)
def test_breaker_raises_the_start(breaker, first):
    assert rungs(Level.MEDIUM, PROGRESSIVE, IN_TOUCH, breaker)[0] == (first,)


@pytest.mark.parametrize(
    ("level", "steps"),
    [(Level.NONE, []), (Level.LOW, [(1,)]), (Level.MEDIUM, [(1,), (2,), (3,), (4,)])],
)
def test_level_says_which_rungs_there_are(level, steps):
    assert rungs(level, PROGRESSIVE, IN_TOUCH) == steps


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [
        ("reconnect", [(1,)]),
        ("restart", [(2,), (3,)]),
        ("failover", [(4,)]),
        ("parallel", [(1, 2, 4)]),
        ("coordinated", [(2,), (3,), (4,)]),
    ],
)
def test_strategy_is_an_order_of_rungs(strategy, steps):
    assert rungs(Level.MEDIUM, STRATEGIES[strategy], IN_TOUCH) == steps


def test_strategy_without_a_rung_high_enough_does_the_most_that_it_has():
    assert rungs(Level.MEDIUM, STRATEGIES["restart"], failure(Category.WRONG_ANSWER)) == [(3,)]


def test_history_passes_by_what_rarely_works_unless_nothing_else_is_left():
    ineffective = {RecoveryLevel.MODERATE: Tally(INEFFECTIVE_ATTEMPTS, 1)}
    crash = failure()
    assert rungs(Level.MEDIUM, PROGRESSIVE, crash, history=ineffective) == [(3,), (4,)]
    assert rungs(Level.MEDIUM, STRATEGIES["restart"], crash, history=ineffective) == [(3,)]
    every = dict.fromkeys(RecoveryLevel, Tally(INEFFECTIVE_ATTEMPTS, 0))
    assert rungs(Level.MEDIUM, PROGRESSIVE, crash, history=every) == [(2,), (3,), (4,)]
    few = {RecoveryLevel.MODERATE: Tally(INEFFECTIVE_ATTEMPTS - 1, 0)}
    assert rungs(Level.MEDIUM, PROGRESSIVE, crash, history=few)[0] == (2,)


def test_told_start_overrides_the_usual_one():
    assert rungs(Level.MEDIUM, PROGRESSIVE, failure(), start=RecoveryLevel.FALLBACK) == [(4,)]


def test_simulation_is_no_step_of_a_browsers_repair():
    order = StrategyOrder("any", (RecoveryLevel.MINIMAL, RecoveryLevel.SIMULATION))
    assert rungs(Level.MEDIUM, order, IN_TOUCH) == [(1,)]


def test_reason_says_where_it_begins_and_why():
    reason = plan(Level.MEDIUM, PROGRESSIVE, IN_TOUCH, CircuitState.OPEN).reason
    assert "starts at rung 1" in reason
    assert "breaker open" in reason


def test_registered_strategy_is_found_and_nonsense_is_refused():
    register_strategy("careful", [1, 2])
    assert rungs(Level.MEDIUM, strategy_order("careful"), IN_TOUCH) == [(1,), (2,)]
    del STRATEGIES["careful"]
    for name, order in (("", [1]), ("progressive", [1]), ("twice", [1, 1]), ("empty", [])):
        with pytest.raises(BadInput):
            register_strategy(name, order)
    with pytest.raises(BadInput, match="register_strategy"):
        strategy_order("nobody's")


def test_browser_that_lied_is_restarted_if_no_other_kind_can_take_its_place():
    steps = plan(Level.CRITICAL, STRATEGIES["progressive"], failure(Category.WRONG_ANSWER)).steps
    assert steps == ((RecoveryLevel.FALLBACK,), (RecoveryLevel.MODERATE,))
    steps = plan(Level.CRITICAL, STRATEGIES["failover"], failure(Category.WRONG_ANSWER)).steps
    assert steps == ((RecoveryLevel.FALLBACK,),)
