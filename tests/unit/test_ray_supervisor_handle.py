"""The handle to a supervisor: it waits for one that is away, and knows one that is gone."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError

from actors.ray.supervisor_handle import RaySupervisor
from recovery.errors import BrowserLost, PoolClosed
from tests.fakes import in_virtual_time


class Actor:
    """Answers each call by the next of `turns`, and by the last one for ever."""

    def __init__(self, *turns: Callable[[], Any]) -> None:
        self._turns = list(turns)
        self.calls = 0

    def __getattr__(self, name: str) -> "Actor":
        return self

    def remote(self, *arguments: object) -> Any:
        self.calls += 1
        return self._answer(self._turns.pop(0) if len(self._turns) > 1 else self._turns[0])

    async def _answer(self, turn: Callable[[], Any]) -> Any:
        answer = turn()
        return await answer if asyncio.iscoroutine(answer) else answer


def away() -> None:
    raise ActorUnavailableError("away", None)


def gone() -> None:
    raise RayActorError


async def frozen() -> None:
    await asyncio.Event().wait()


@in_virtual_time
async def test_call_is_repeated_until_the_supervisor_is_back():
    actor = Actor(away, away, lambda: "node")
    assert await RaySupervisor(actor).node() == "node"
    assert actor.calls == 3


@in_virtual_time
async def test_supervisor_that_stays_away_is_given_up():
    with pytest.raises(BrowserLost, match="can't be reached"):
        await RaySupervisor(Actor(away)).node()
    assert asyncio.get_running_loop().time() >= 20


@in_virtual_time
async def test_supervisor_that_is_gone_takes_the_pool_with_it():
    actor = Actor(gone)
    with pytest.raises(PoolClosed, match="the pool with it"):
        await RaySupervisor(actor).want({})
    assert actor.calls == 1


@in_virtual_time
async def test_frozen_supervisor_is_out_of_reach():
    supervisor = RaySupervisor(Actor(frozen))
    begun = asyncio.get_running_loop().time()
    with pytest.raises(BrowserLost, match="did not answer within 14 s"):
        await supervisor.watch("client", -1, 4.0)  # not repeated: a watch has its own patience
    assert asyncio.get_running_loop().time() - begun == 14.0


@in_virtual_time
async def test_long_order_is_waited_for_as_long_as_it_takes():
    async def slow() -> None:
        await asyncio.sleep(1000)

    await RaySupervisor(Actor(away, slow)).reload("m")
    assert asyncio.get_running_loop().time() >= 1000
