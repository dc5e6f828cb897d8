"""Handles to actors: Ray's own errors stop there."""

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError, RpcError

from actors.ray.handles import RayHost, result
from recovery.errors import BadInput, BrowserLost, InternalError, PoolError, StaleTerm
from recovery.records import HostRef


async def raises(error: Exception) -> None:
    raise error


async def outcome(error: Exception) -> PoolError:
    with pytest.raises(PoolError) as caught:
        await result(raises(error), "chrome-0")
    return caught.value


async def test_error_of_ours_is_raised_as_it_was():
    ours = StaleTerm("term 1 was superseded by 2")
    assert await outcome(RayTaskError("launch", "", ours)) is ours


async def test_other_error_in_an_actor_is_a_fault_of_ours():
    error = await outcome(RayTaskError("launch", "", ZeroDivisionError()))
    assert isinstance(error, InternalError)
    assert "chrome-0 failed" in str(error)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RayActorError(), "worker_exited"),
        (ActorUnavailableError("away", None), "socket_closed"),
        (RpcError("no route"), "socket_closed"),
    ],
    ids=["dead", "away", "unreachable"],
)
async def test_lost_worker_says_whether_it_may_come_back(error, what):
    lost = await outcome(error)
    assert isinstance(lost, BrowserLost)
    assert lost.fields == {"what": what}


class Actor:
    """Its methods fail as those of a Ray actor do."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> "Actor":
        return self

    def remote(self, *arguments: object) -> object:
        return raises(self._error)


async def test_handle_to_a_host_raises_no_error_of_rays():
    refused = BadInput("no such fault")
    host = RayHost(Actor(RayTaskError("inject", "", refused)))
    with pytest.raises(BadInput, match="no such fault"):
        await host.inject(HostRef("chrome-0", 0), {"what": "x"})
    with pytest.raises(BrowserLost, match="the worker of chrome-0#0 is gone"):
        await RayHost(Actor(RayActorError())).unload(HostRef("chrome-0", 0), 1, "m")
