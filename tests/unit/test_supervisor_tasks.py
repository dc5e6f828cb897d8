"""The supervisor's background tasks."""

import asyncio

import pytest

from actors.supervisor.tasks import Tasks
from recovery.errors import BrowserLost
from tests.fakes import eventually


async def test_task_that_fails_is_told_of_under_its_name():
    tasks = Tasks()

    async def fail() -> None:
        raise BrowserLost("it is gone")

    await tasks.spawn(fail, "launch b-0")
    assert list(tasks.faults) == ["launch b-0: BrowserLost: it is gone"]


async def test_task_is_kept_while_it_runs_and_no_longer():
    tasks, gate = Tasks(), asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    task = tasks.spawn(wait, "wait")
    assert tasks.running == {task}
    gate.set()
    await eventually(lambda: not tasks.running)


async def test_error_that_is_not_ours_is_not_taken_for_a_fault():
    tasks = Tasks()

    async def err() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await tasks.spawn(err, "err")
    assert not tasks.faults


async def test_of_many_faults_the_last_are_kept():
    tasks = Tasks()
    for number in range(1000):
        tasks.report(str(number), BrowserLost("again"))
    assert len(tasks.faults) == 256
    assert tasks.faults[-1].startswith("999: ")
