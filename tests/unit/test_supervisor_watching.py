"""The watch over the workers."""

import asyncio
from itertools import pairwise

from recovery.breaker import BreakerKey, CircuitState
from recovery.control import (
    BrowserFailed,
    BrowserReady,
    Phase,
)
from tests.fakes import (
    FakeHosts,
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import LEASE_SECONDS, Parts, opened


@in_virtual_time
async def test_worker_that_dies_is_replaced_by_a_new_one():
    async with opened() as pool:
        await pool.supervisor.load(order())
        dead = pool.hosts["b-0"]
        dead.die()
        await pool.loaded("b-0", epoch=1)
        assert pool.hosts["b-0"] is not dead
        assert pool.state.browsers["b-0"].failure.evidence["what"] == "worker_exited"


@in_virtual_time
async def test_host_is_asked_for_news_also_while_it_launches():
    """By asking, the supervisor renews the host's lease, which may be shorter than a launch."""
    hosts = FakeHosts()
    hosts.gate.clear()
    async with opened(hosts=hosts) as pool:
        await asyncio.sleep(1)
        hosts.gate.set()
        await eventually(lambda: "b-0" in hosts.made)
        host = hosts["b-0"]
        asked: list[float] = []
        inner = host.next_event

        async def next_event(*asking):
            asked.append(asyncio.get_running_loop().time())
            return await inner(*asking)

        host.next_event = next_event
        host.launch_gate.clear()
        host.crash()
        await asyncio.sleep(60)
        assert pool.phase("b-0") == (Phase.STARTING, 1)
        assert max(b - a for a, b in pairwise(asked)) <= 5.0
        assert len(asked) >= 10


@in_virtual_time
async def test_news_of_a_host_becomes_an_event_once():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    parts.watches.begin("b-0", host)
    parts.watches.begin("b-0", host)  # it is watched already
    host.crash()
    await asyncio.sleep(60)
    assert sum(isinstance(body, BrowserFailed) for body in parts.logged) == 1
    assert len(parts.tasks.running) == 1
    parts.end()


@in_virtual_time
async def test_worker_that_is_silent_for_a_lease_is_killed_and_reported():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")

    async def next_event(*asking):
        await asyncio.Event().wait()

    host.next_event = next_event
    parts.watches.begin("b-0", host)
    await asyncio.sleep(LEASE_SECONDS + 0.1)
    assert host.killed
    assert "b-0" not in parts.hosts
    death = parts.hosts.death("b-0")
    assert death is not None
    assert parts.logged[-1] == BrowserFailed("b-0", 0, death)
    assert death.evidence["what"] == "worker_exited"


@in_virtual_time
async def test_new_worker_has_more_time_for_its_first_answer_only():
    """Its process starts slowly on a busy machine; once it answers, its lease counts."""
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    asked: list[float] = []

    async def next_event(*asking):
        asked.append(parts.wall())
        await (asyncio.sleep(40) if len(asked) == 1 else asyncio.Event().wait())

    host.next_event = next_event
    parts.watches.begin("b-0", host, new=True)
    await asyncio.sleep(41)
    assert not host.killed
    await asyncio.sleep(LEASE_SECONDS)
    assert host.killed
    assert len(asked) == 2


@in_virtual_time
async def test_new_worker_that_never_answers_is_given_up():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")

    async def next_event(*asking):
        await asyncio.Event().wait()

    host.next_event = next_event
    parts.watches.begin("b-0", host, new=True)
    await asyncio.sleep(61)
    assert host.killed


@in_virtual_time
async def test_worker_that_is_let_go_is_watched_no_more():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    parts.watches.begin("b-0", host)
    await asyncio.sleep(1)
    parts.watches.let_go("b-0")
    host.die()
    await asyncio.sleep(60)
    assert not parts.tasks.running
    assert isinstance(parts.logged[-1], BrowserReady)


@in_virtual_time
async def test_host_is_told_the_circuits_of_the_others():
    parts = Parts()
    await parts.open("b-0", "b-1")
    host = await parts.serve("b-0")
    await parts.serve("b-1")
    told = []

    async def next_event(term, seconds, after, peers):
        told.append((term, seconds, after, peers))
        await asyncio.Event().wait()

    host.next_event = next_event
    parts.watches.take_on("b-0", host, seen=7)
    parts.watches.begin("b-0", host)
    await eventually(lambda: bool(told))
    peers = {BreakerKey("b-1", ""): CircuitState.CLOSED}
    assert told == [(1, LEASE_SECONDS / 3, 7, peers)]
    parts.end()


@in_virtual_time
async def test_superseded_watch_ends_and_kills_nobody():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    host.term = 2
    parts.watches.begin("b-0", host)
    await eventually(lambda: bool(parts.tasks.faults))
    assert parts.tasks.faults[0].startswith("watch b-0: StaleTerm")
    assert not host.killed
