"""The control plane as a whole, under faults drawn from seeds: see `tests.simulator`."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import actors.supervisor.journal
import pool.execution.answering
from recovery.answering import GiveUp
from recovery.control import DEAD_MAX, BrowserReady, Event, Phase, PoolState, decide
from recovery.kinds import Level
from recovery.supervision import RestartLimit
from tests.simulator import (
    BROWSERS,
    DRAWN,
    Clock,
    Fault,
    FaultPlan,
    Kind,
    SimulationFailed,
    case,
    main,
    make_plan,
    simulate,
)

FRESH = random.SystemRandom().randrange(1_000, 1_000_000_000)


@pytest.mark.parametrize("seed", range(30))
def test_all_that_must_hold_holds_under_these_faults(seed):
    simulate(**case(seed))


def test_all_that_must_hold_holds_under_faults_never_seen_before():
    print(f"tests.simulator, seed {FRESH}")  # noqa: T201  # shown if it fails, or with -s
    simulate(**case(FRESH))


def test_thousands_of_operations_are_answered_while_everything_fails():
    plan = make_plan(2, operations=3000, faults=20, seconds=200.0)
    outcome = simulate(plan, operations=3000, concurrency=24)
    assert len(outcome.results) == 3001
    assert outcome.failed <= outcome.applied.get(Kind.OPERATION_HANGS, 0) + 10
    assert outcome.recovered > 0
    assert outcome.terms > 1
    assert len(outcome.applied) >= 8


def test_same_seed_tells_the_same_story():
    first, again, other = simulate(**case(12)), simulate(**case(12)), simulate(**case(36))
    assert first == again
    assert first.log != other.log


def test_plan_is_its_seed():
    assert make_plan(5) == make_plan(5) != make_plan(6)
    plan = make_plan(5)
    assert eval(repr(plan)) == plan  # as a failure prints it


def test_seeds_cover_every_level_strategy_and_fault():
    cases = [case(seed) for seed in range(30)]
    assert {options["level"] for options in cases} == set(Level)
    assert len({options["strategy"] for options in cases}) == 6
    assert {fault.kind for options in cases for fault in options["plan"].faults} == set(DRAWN)


def test_at_medium_no_operation_is_lost_to_deaths():
    """One after another, each with time to recover; the supervisor's own death among them."""
    kinds = (
        Kind.BROWSER_CRASH,
        Kind.PAGE_CRASH,
        Kind.WORKER_DEATH,
        Kind.SOCKETS_DROPPED,
        Kind.SUPERVISOR_DEATH,
        Kind.LAUNCHES_FAIL,
        Kind.WORKER_SILENT,
        Kind.LOG_FULL,
    )
    faults = tuple(Fault(kind, 5.0 + 20.0 * n, seconds=1.0) for n, kind in enumerate(kinds))
    outcome = simulate(FaultPlan(3, faults, 180.0), operations=600)
    assert outcome.applied == dict.fromkeys(kinds, 1)
    assert outcome.failed == 0
    assert outcome.given_up == {}
    ready = [r for r in outcome.state.browsers.values() if r.phase is Phase.STOPPED]
    assert len(ready) == sum(BROWSERS.values())  # closed in order, none given up


@pytest.mark.parametrize("strategy", ["parallel", "failover"])
def test_pool_that_lives_long_has_no_ever_growing_state(strategy):
    faults = tuple(Fault(Kind.BROWSER_CRASH, 30.0 * n) for n in range(1, 121))
    plan = FaultPlan(7, faults, 3630.0)
    outcome = simulate(plan, {"chrome": 2}, Level.MEDIUM, strategy, 100, 3)
    in_a_window = 2 * 2 * RestartLimit().restarts_max  # two lineages, with a racer each
    assert len(outcome.state.browsers) <= 2 + DEAD_MAX + in_a_window
    assert len(outcome.state.browsers) < 120


# -- that it would notice -------------------------------------------------------------------------

CRASH = FaultPlan(1, (Fault(Kind.BROWSER_CRASH, 5), Fault(Kind.WORKER_DEATH, 20)))


def _no_orders(state: PoolState, event: Event) -> Any:
    """A supervisor that decides and forgets."""
    after, instructions = decide(state, event)
    return after, instructions if event.at < 3 else ()


def _same_epoch(state: PoolState, event: Event) -> Any:
    """The next incarnation is ready under its predecessor's number."""
    after, instructions = decide(state, event)
    if isinstance(event.body, BrowserReady) and event.body.epoch:
        record = after.browsers[event.body.browser_id]
        stale = replace(record, epoch=record.epoch - 1)
        after = replace(after, browsers={**after.browsers, record.id: stale})
    return after, instructions


def _drops_models(state: PoolState, event: Event) -> Any:
    after, instructions = decide(state, event)
    if isinstance(event.body, BrowserReady) and event.body.epoch:
        record = replace(after.browsers[event.body.browser_id], models={})
        after = replace(after, browsers={**after.browsers, record.id: record})
    return after, instructions


@pytest.mark.parametrize("decides", [_no_orders, _same_epoch, _drops_models])
def test_supervisor_that_errs_is_noticed(decides: Callable[..., Any], monkeypatch):
    monkeypatch.setattr(actors.supervisor.journal, "decide", decides)
    with pytest.raises(SimulationFailed):
        simulate(CRASH)


def test_operation_that_is_given_up_too_early_is_noticed(monkeypatch):
    ask = pool.execution.answering.next_action

    def impatient(policy: Any, model: Any, attempts: Any, *facts: Any, **more: Any) -> Any:
        return GiveUp("tired") if attempts else ask(policy, model, attempts, *facts, **more)

    monkeypatch.setattr(pool.execution.answering, "next_action", impatient)
    plan = FaultPlan(1, tuple(Fault(Kind.PAGE_CRASH, n, Clock.OPERATIONS) for n in (20, 40)))
    with pytest.raises(SimulationFailed, match="failed without need") as failed:
        simulate(plan)
    told = str(failed.value)
    assert told.startswith("seed 1: at ")
    assert "Kind.PAGE_CRASH" in told
    assert '"type":"browser_ready"' in told
    assert "again: .venv/bin/python -m tests.simulator 1" in told


def test_wrong_answer_is_noticed(monkeypatch):
    monkeypatch.setattr("tests.simulator.story.np.array_equal", lambda *_: False)
    with pytest.raises(SimulationFailed, match="a wrong answer"):
        simulate(FaultPlan(1, ()))


def test_command_tells_what_came_of_a_seed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["0", "2"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("151 operations") == 2
