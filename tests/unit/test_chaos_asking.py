"""Every operation is written down as its caller saw it."""

from __future__ import annotations

import pytest

from pool.chaos.asking import Asker, strikes_of
from pool.chaos.attribution import Strike
from pool.chaos.plan import Progress
from pool.results import RecoveryStep
from recovery.errors import PageError, PoolBusy, SequenceLost
from recovery.failures import Category
from recovery.records import HostRef
from tests.chaos import FakePool, FakeWorkload, answered
from tests.fakes import failure


class Run:
    """An asker on a fake pool, and all that it works with."""

    def __init__(self, op: str = "inference") -> None:
        self.pool, self.workload, self.progress = FakePool(), FakeWorkload(op), Progress()
        self.told: list[tuple[int, str]] = []
        self.steps = 0
        self.seconds = 0.0
        self.asker = Asker(
            self.pool,
            self.workload,
            self.progress,
            seconds=5.0,
            elapsed=self.elapsed,
            on_step=self.on_step,
            on_bad_result=lambda number, question, result, why: self.told.append((number, why)),
        )

    def elapsed(self) -> float:
        self.seconds += 1.5
        return self.seconds

    async def on_step(self) -> None:
        self.steps += 1

    async def ask(self, number: int = 0):
        await self.asker.ask(number)
        return self.progress.operations[-1]


def failed_step(category: Category, epoch: int = 2, **evidence) -> RecoveryStep:
    found = failure(category, ref=HostRef("chrome-0", epoch), at=101.0, evidence=evidence)
    return RecoveryStep("failed", "chrome-0", 0.0, 1.0, "no answer", found)


async def test_a_right_answer_is_written_down_and_not_told():
    run = Run()
    record = await run.ask(3)
    assert (record.number, record.op_id, record.model) == (3, "chaos-3", "m")
    assert (record.at, record.seconds) == (1.5, 1.5)
    assert (record.success, record.wrong, record.answers) == (True, False, 1)
    assert (record.browser_id, record.engine) == ("chrome-0", "chrome")
    assert run.told == []


async def test_wrong_and_failed_ones_are_told():
    run = Run()
    run.workload.wrong = {0, 1}
    run.pool.results[1] = lambda op_id: answered(op_id, success=False, error="it died")
    assert (await run.ask(0)).wrong
    record = await run.ask(1)
    assert (record.success, record.wrong, record.error) == (False, False, "it died")
    assert run.told == [(0, "wrong"), (1, "failed")]


async def test_a_full_pool_refuses_and_that_is_no_failure():
    run = Run()
    run.pool.results[0] = PoolBusy("every queue is full")
    record = await run.ask()
    assert (record.refused, record.error) == (True, "every queue is full")
    assert (record.answers, run.told, run.progress.failed) == (0, [], 0)


@pytest.mark.parametrize("error", [PageError("lost"), KeyError("y"), ValueError("x"), OSError()])
async def test_an_operation_that_raises_has_failed(error):
    run = Run()
    run.pool.results[0] = error
    record = await run.ask()
    assert (record.success, record.refused, record.error) == (False, False, repr(error))
    assert run.told == [(0, "failed")]


async def test_a_second_answer_to_one_operation_is_counted():
    run = Run()
    await run.ask(0)
    assert (await run.ask(0)).answers == 2


async def test_attempts_that_failed_are_kept_with_their_place():
    run = Run()
    steps = (
        failed_step(Category.CRASH),
        RecoveryStep("waited", "chrome-1", 1.0, 0.5, "ready"),
        failed_step(Category.API_ERROR, 3, what="too_large"),
    )
    run.pool.results[0] = lambda op_id: answered(op_id, recovery=steps)
    record = await run.ask()
    assert record.struck == (("crash", "chrome-0", 2), ("too_large", "chrome-0", 3))
    assert run.asker.strikes == [
        Strike(0, "crash", "chrome-0", 2, 101.0),
        Strike(0, "too_large", "chrome-0", 3, 101.0),
    ]


def test_a_failure_of_no_browser_strikes_nowhere():
    nowhere = RecoveryStep("failed", "", 0.0, 1.0, "no answer", failure())
    assert strikes_of(0, answered(recovery=(nowhere,))) == []


async def test_each_token_of_a_sequence_is_a_step():
    run = Run("generate")
    run.pool.tokens = 4
    assert (await run.ask()).success
    assert run.steps == 4


async def test_a_sequence_that_is_lost_has_its_result_all_the_same():
    run = Run("generate")

    async def lost(model, inputs, *, op_id, on_result):
        yield 0
        on_result(answered(op_id, success=False, error="lost"))
        raise SequenceLost("it can't go on")

    run.pool.stream = lost
    record = await run.ask()
    assert (record.success, record.error, run.steps) == (False, "lost", 1)
