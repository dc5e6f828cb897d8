"""The supervisor as a whole, over fake hosts, in virtual time."""

import asyncio

import pytest

from recovery.control import Phase
from recovery.errors import PoolClosed
from recovery.failures import Category
from recovery.records import HostRef
from tests.fakes import FakeHosts, eventually, in_virtual_time, order
from tests.supervised import CHROME, opened


@in_virtual_time
async def test_every_browser_comes_up():
    async with opened("b-0", "b-1", "b-2") as pool:
        for browser_id in ("b-0", "b-1", "b-2"):
            await pool.until(browser_id, Phase.READY, 0)
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert {str(route.status.ref) for route in table.routes} == {"b-0#0", "b-1#0", "b-2#0"}
        assert pool.supervisor.reports().keys() == {"b-0", "b-1", "b-2"}
        assert await pool.supervisor.memory() == dict.fromkeys(("b-0", "b-1", "b-2"), 1 << 20)


@in_virtual_time
async def test_browser_that_crashes_comes_back_as_the_next_epoch_with_its_models():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.hosts["b-0"].crash()
        await pool.loaded("b-0", epoch=1)
        host = pool.hosts["b-0"]
        assert [str(launch.ref) for launch in host.launches] == ["b-0#0", "b-0#1"]
        assert host.loads == [(HostRef("b-0", 0), "m"), (HostRef("b-0", 1), "m")]
        assert len(pool.hosts.made["b-0"]) == 1  # its worker lives on
        (repair,) = pool.state.repairs
        assert repair.failure.category is Category.CRASH
        assert repair.ready is not None


@in_virtual_time
async def test_one_crash_disturbs_no_other_browser():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        pool.hosts["b-0"].crash()
        await pool.loaded("b-0", epoch=1)
        assert pool.phase("b-1") == (Phase.READY, 0)
        assert len(pool.hosts["b-1"].launches) == len(pool.hosts["b-1"].loads) == 1


@in_virtual_time
async def test_drained_browser_that_is_wanted_again_is_a_new_worker():
    async with opened("b-0", "b-1") as pool:
        await pool.until("b-0", Phase.READY, 0)
        await pool.supervisor.drain("b-0")
        await pool.supervisor.want({"b-0": CHROME})
        await pool.until("b-0", Phase.READY, 1)
        assert [host.killed for host in pool.hosts.made["b-0"]] == [True, False]


@in_virtual_time
async def test_close_stops_every_browser_and_then_refuses_orders():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        await pool.supervisor.close()
        assert all(host.stopped and host.killed for host in pool.hosts.all)
        await pool.supervisor.close()  # again is no error
        for refused in (
            pool.supervisor.want({"b-2": CHROME}),
            pool.supervisor.load(order("n")),
            pool.supervisor.unload("m"),
            pool.supervisor.drain("b-0"),
        ):
            with pytest.raises(PoolClosed):
                await refused
        assert pool.hosts["b-0"].launches[1:] == []


@in_virtual_time
async def test_close_in_the_middle_of_launches_leaves_nothing_behind():
    hosts = FakeHosts(b_1=[{"fail_launch": {0}}])
    async with opened("b-0", "b-1", hosts=hosts) as pool:
        await pool.until("b-0", Phase.READY, 0)
        await pool.until("b-1", Phase.STARTING, 1)  # waits before it tries again
        hosts.gate.clear()
        await pool.supervisor.want({"b-2": CHROME})
        await eventually(lambda: "b-2" in hosts.asked_for)
        await pool.supervisor.close()
        hosts.gate.set()
        await asyncio.sleep(60)
        assert all(host.killed for host in hosts.all)
        assert len(hosts["b-1"].launches) == 1
        assert all(record.phase is Phase.STOPPED for record in pool.state.browsers.values())


@in_virtual_time
async def test_close_waits_until_a_browser_that_died_meanwhile_is_gone_too():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.launch_gate.clear()
        host.crash()
        await eventually(lambda: len(host.launches) == 2)
        closing = asyncio.create_task(pool.supervisor.close())
        host.fail_launch = {1}
        host.launch_gate.set()
        await closing
        assert host.killed


@in_virtual_time
async def test_superseded_supervisor_gives_no_orders():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.term = 2  # it has met a newer one
        host.crash()
        faults = pool.supervisor.faults
        await eventually(lambda: any(f.startswith("launch b-0: StaleTerm") for f in faults))
        assert len(host.launches) == 1
        assert not host.killed


@in_virtual_time
async def test_watch_answers_at_once_when_there_is_news_and_in_time_when_there_is_none():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        loop = asyncio.get_running_loop()
        table = await pool.supervisor.watch("client", -1, 0.0)
        begun = loop.time()
        same = await pool.supervisor.watch("client", table.version, 4.0)
        assert same.version == table.version
        assert loop.time() - begun == 4.0
        waiting = asyncio.create_task(pool.supervisor.watch("client", table.version, 30.0))
        await eventually(lambda: not waiting.done())
        pool.hosts["b-0"].crash()
        newer = await waiting
        assert newer.version > table.version
        assert loop.time() - begun == 4.0


@in_virtual_time
async def test_crash_storm_over_many_browsers_ends_in_order():
    names = [f"b-{n}" for n in range(20)]
    async with opened(*names) as pool:
        await pool.supervisor.load(order())
        for number, name in enumerate(names):
            if number % 2:
                pool.hosts[name].crash()
            elif number % 4:
                pool.hosts[name].die()
        for number, name in enumerate(names):
            await pool.loaded(name, epoch=1 if number % 4 else 0)
        assert list(pool.supervisor.faults) == []
