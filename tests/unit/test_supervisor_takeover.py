"""The death of a supervisor, and what the next one takes over."""

import asyncio
from functools import reduce

import pytest

from actors.messages import LaunchOrder
from actors.supervisor.takeover import Takeover
from recovery.control import (
    BrowserFailed,
    BrowserReady,
    Event,
    Launch,
    ModelPhase,
    Phase,
    PoolState,
    apply,
)
from recovery.kinds import Readiness
from recovery.records import HostRef
from tests.fakes import (
    FACTS,
    NUMERIC,
    FakeHost,
    FakeHosts,
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import CHROME, Parts, Pool, opened


@in_virtual_time
async def test_new_supervisor_takes_over_what_lives():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        known = await pool.supervisor.watch("client", -1, 0.0)
        pool.die()
        await pool.resume()
        assert pool.state.term == 2
        table = await pool.supervisor.watch("client", known.version, 30.0)
        assert table.version > known.version, "a client must not take it for an older one"
        assert [route.status.models for route in table.routes] == [{"m": NUMERIC}] * 2
        assert table.models["m"] == order()
        assert [len(host.launches) for host in pool.hosts.all] == [1, 1]
        pool.hosts["b-0"].crash()  # and it goes on watching
        await pool.loaded("b-0", epoch=1)


@in_virtual_time
async def test_browser_that_died_while_nobody_watched_is_repaired():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.die()
        pool.hosts["b-0"].crash()
        await pool.resume()
        await pool.loaded("b-0", epoch=1)
        assert pool.state.repairs[0].failure.evidence["what"] == "browser_exited"


@in_virtual_time
async def test_worker_that_died_while_nobody_watched_is_replaced():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.die()
        pool.hosts["b-0"].die()
        await pool.resume()
        await pool.loaded("b-0", epoch=1)


@in_virtual_time
async def test_model_whose_order_is_lost_is_unloaded():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.die()
        await pool.orders.remove("m")
        await pool.resume()
        await eventually(lambda: pool.hosts["b-0"].models == {})
        assert pool.state.models == {}


@in_virtual_time
async def test_pool_that_was_closing_is_closed():
    async with opened("b-0", "b-1") as pool:
        await pool.until("b-0", Phase.READY, 0)
        closing = asyncio.create_task(pool.supervisor.close())
        await eventually(lambda: pool.state.closing)
        closing.cancel()
        pool.die()
        await pool.resume()
        await asyncio.sleep(30)
        assert pool.closed == 1
        assert all(host.killed for host in pool.hosts.all)


class Killed(Exception):
    """The supervisor's process ends at this event."""


@pytest.mark.parametrize("acknowledged", [True, False], ids=["logged", "not-logged"])
@pytest.mark.parametrize("fault", ["crash", "die", "drop_sockets", "no restart"])
def test_supervisor_killed_at_every_step_of_a_repair_finishes_or_repeats_it(fault, acknowledged):
    """Exhaustively: at each event, before or after it is on disk, until no step is left."""

    async def story(at_event: int) -> bool:
        pool = Pool(FakeHosts())
        await pool.supervisor.open({"chrome-0": CHROME, "chrome-1": CHROME})
        await pool.supervisor.load(order())
        base = len(pool.log.events)
        append, dead = pool.log.append, asyncio.Event()

        async def append_and_die(event: Event) -> None:
            if event.seq == base + at_event and not dead.is_set():
                if acknowledged:
                    await append(event)
                dead.set()
                raise Killed
            await append(event)

        pool.log.append = append_and_die  # type: ignore[method-assign]
        host = pool.hosts["chrome-0"]
        if fault == "no restart":
            host.fail_launch = {1, 2}
            host.crash()
        else:
            getattr(host, fault)()

        def repaired() -> bool:
            records = [r for r in pool.state.browsers.values() if r.phase is not Phase.STOPPED]
            serving = [r for r in records if r.phase is Phase.READY]
            return (
                len(serving) == 2
                and all(r.models == {"m": ModelPhase.LOADED} for r in serving)
                and all(r.repair is None for r in records)
                and len(pool.state.repairs) >= 1
            )

        async def kill_when_due() -> None:
            await dead.wait()
            pool.die()
            await pool.resume()

        killer = asyncio.create_task(kill_when_due())
        async with asyncio.timeout(300):
            while not repaired():  # noqa: ASYNC110  # whoever is asked may die meanwhile
                await asyncio.sleep(0.25)
        await asyncio.sleep(60)
        assert repaired()
        killer.cancel()
        serving = {r.id: r.epoch for r in pool.state.browsers.values() if r.phase is Phase.READY}
        living = {h.ref.browser_id: h.ref.epoch for h in pool.hosts.all if not h.killed}
        assert living.items() >= serving.items()
        assert set(living) == set(serving) | ({"chrome-0"} & set(living)), "nothing is left over"
        ready = [h for h in pool.hosts.all if h.readiness is Readiness.READY]
        assert {h.ref.browser_id for h in ready} == set(serving)
        assert reduce(apply, pool.log.events, PoolState()) == pool.state
        pool.die()
        return dead.is_set()

    reached = 0
    while in_virtual_time(story)(reached + 1):
        reached += 1
    assert reached >= 3


def takeover(parts: Parts) -> Takeover:
    return Takeover(
        parts.hosts,
        parts.watches,
        parts.journal,
        parts.tasks,
        parts.term,
        parts.wall,
        parts.instructions.append,
    )


async def living(browser_id: str, epoch: int = 0) -> FakeHost:
    host = FakeHost(browser_id)
    await host.launch(LaunchOrder(HostRef(browser_id, epoch), 1))
    return host


@in_virtual_time
async def test_of_two_workers_the_newer_is_taken_over_and_strangers_are_ended():
    parts = Parts(term=2)
    await parts.open("b-0")
    await parts.happen(BrowserReady("b-0", 0, FACTS))
    old, new, stranger = await living("b-0", 0), await living("b-0", 1), await living("x")

    async def find():
        return {"b-0": [old, new], "x": [stranger]}

    await takeover(parts).run(find)
    assert parts.hosts.get("b-0") is new
    assert (old.killed, new.killed, stranger.killed) == (True, False, True)
    assert "x" not in parts.hosts
    parts.end()


@in_virtual_time
async def test_worker_that_does_not_greet_is_ended():
    parts = Parts(term=2)
    await parts.open("b-0")
    await parts.happen(BrowserReady("b-0", 0, FACTS))
    host = await living("b-0")

    async def hello(term):
        await asyncio.Event().wait()

    async def find():
        return {"b-0": [host]}

    host.hello = hello
    await takeover(parts).run(find)
    assert host.killed
    assert parts.tasks.faults[0].startswith("hello to b-0: TimeoutError")
    assert isinstance(parts.logged[-1], BrowserFailed)


@in_virtual_time
async def test_what_was_ordered_and_may_not_have_arrived_is_ordered_again():
    parts = Parts(term=2)
    await parts.open("b-0")
    parts.instructions.clear()

    async def find():
        return {}

    await takeover(parts).run(find)
    assert parts.instructions == [Launch("b-0", CHROME, 0)]
