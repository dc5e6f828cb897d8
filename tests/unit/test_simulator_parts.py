"""The parts of `tests.simulator` that say what must hold, each by itself."""

import asyncio
from dataclasses import replace

import pytest

from pool.results import Result
from recovery.control import BrowserRecord, ModelPhase, Phase, PoolState
from recovery.errors import BrowserLost
from recovery.kinds import BrowserType, Level
from recovery.log.codec import state_to_plain
from tests.simulator.clocks import Clocks
from tests.simulator.invariants import any_left, broken, why_given_up
from tests.simulator.judging import DEADLINE, Judge
from tests.simulator.log import Store
from tests.simulator.verdict import Verdict
from tests.stories import LIMIT, serving_story

READY = BrowserRecord("b", BrowserType.CHROME, 3, Phase.READY, 0.0)


@pytest.fixture
async def verdict() -> Verdict:
    return Verdict(asyncio.get_running_loop())


def pool(record: BrowserRecord) -> PoolState:
    return PoolState(limit=LIMIT, browsers={record.id: record})


async def test_first_finding_counts(verdict):
    verdict.require(True, "nothing")
    assert not verdict.failed.done()
    verdict.violated("this")
    verdict.violated("that")
    assert verdict.failed.result() == "this"


async def test_error_that_nobody_took_is_a_finding_unless_it_is_a_lost_browser(verdict):
    loop = asyncio.get_running_loop()
    verdict.unseen(loop, {"message": "m", "exception": BrowserLost("gone")})
    assert not verdict.failed.done()
    verdict.unseen(loop, {"message": "m", "exception": ZeroDivisionError()})
    assert "ZeroDivisionError" in verdict.failed.result()


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (replace(READY, epoch=2), "epoch 2 after 3"),
        (replace(READY, models={"m": ModelPhase.LOADED}), "are wanted"),
        (replace(READY, phase=Phase.STOPPED, models={"m": ModelPhase.LOADED}), "it has models"),
        (replace(READY, phase=Phase.REPLACING), "without a repair"),
        (replace(READY, phase=Phase.GIVEN_UP), "given up too early"),
        (replace(READY, restarts=(0.0,) * 3), "more restarts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_that_does_not_hold_is_noticed(record, what):
    assert broken(pool(READY), pool(READY), 1.0) == ""
    assert what in broken(pool(READY), pool(record), 1.0)


def test_record_that_vanishes_while_its_browser_lives_is_noticed():
    assert "is gone" in broken(pool(READY), PoolState(limit=LIMIT), 1.0)


def test_browser_is_given_up_after_launches_that_failed_or_restarts_that_were_too_many():
    given_up = replace(READY, phase=Phase.GIVEN_UP)
    failed = replace(given_up, launches_failed=LIMIT.launches_failed_max)
    restarted = replace(given_up, restarts=(0.0, 1.0))
    assert why_given_up(pool(given_up), given_up, 1.0) == ""
    assert "launches in a row" in why_given_up(pool(failed), failed, 1.0)
    assert "restarts within" in why_given_up(pool(restarted), restarted, 1.0)


def test_browser_is_left_while_any_may_yet_have_the_model():
    assert any_left(pool(replace(READY, phase=Phase.STARTING)))
    assert not any_left(pool(replace(READY, models={"m": ModelPhase.FAILED})))


@pytest.mark.parametrize(("outage", "ended"), [(True, DEADLINE), (False, DEADLINE), (True, 1.0)])
async def test_operation_may_fail_only_at_its_deadline_and_in_an_outage(verdict, outage, ended):
    judge = Judge(Level.MEDIUM, Clocks(asyncio.get_running_loop()), verdict)
    began = asyncio.get_running_loop().time()
    judge.sample(outage=outage)
    result = Result("op", "m", "inference", False, Level.MEDIUM, metrics={"duration_ms": 1.0})
    judge.judge(result, began, began + ended)
    assert verdict.failed.done() != (outage and ended == DEADLINE)


def test_log_is_read_again_from_its_last_checkpoint():
    story = serving_story()
    store = Store()
    for event in story.events[:3]:
        store.write(event)
    store.checkpoint = 3, state_to_plain(store.replayed)
    for event in story.events[3:]:
        store.write(event)
    store.lines[0] = b"nobody reads this again"
    assert store.recovered() == store.replayed == story.state
