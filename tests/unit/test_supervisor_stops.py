"""Drains and stops."""

import asyncio

from actors.supervisor.stops import Stops
from recovery.control import (
    BrowserStopped,
    Phase,
    PoolClosing,
    Stop,
)
from recovery.kinds import Readiness
from tests.fakes import (
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import Parts, opened


@in_virtual_time
async def test_drain_waits_for_what_is_in_flight():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        host = pool.hosts["b-0"]
        host.run_gate.clear()
        drained = asyncio.create_task(pool.supervisor.drain("b-0"))
        await eventually(lambda: host.drained)
        table = await pool.supervisor.watch("client", -1, 0.0)
        readiness = {r.status.ref.browser_id: r.status.readiness for r in table.routes}
        assert readiness == {"b-0": Readiness.DRAINING, "b-1": Readiness.READY}
        assert not host.stopped
        host.run_gate.set()
        await drained
        assert pool.phase("b-0") == (Phase.STOPPED, 0)
        assert host.stopped
        assert host.killed


@in_virtual_time
async def test_drain_of_a_browser_that_dies_meanwhile_returns():
    async with opened("b-0", "b-1") as pool:
        await pool.until("b-0", Phase.READY, 0)
        pool.hosts["b-0"].run_gate.clear()
        drained = asyncio.create_task(pool.supervisor.drain("b-0"))
        await eventually(lambda: pool.hosts["b-0"].drained)
        pool.hosts["b-0"].die()
        await drained
        assert pool.phase("b-0") == (Phase.STOPPED, 0)
        assert len(pool.hosts.made["b-0"]) == 1


@in_virtual_time
async def test_worker_that_does_not_stop_in_time_is_killed_and_told_of():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    await parts.happen(PoolClosing())

    async def stop():
        await asyncio.Event().wait()

    host.stop = stop
    stops = Stops(parts.hosts, parts.watches, parts.journal, parts.tasks, parts.term)
    stops.begin(Stop("b-0", 0))
    assert len(stops.under_way) == 1
    await asyncio.sleep(10.1)
    assert stops.under_way == frozenset()
    assert host.killed
    assert "b-0" not in parts.hosts
    assert parts.tasks.faults[0].startswith("stop b-0: TimeoutError")
    assert parts.logged[-1] == BrowserStopped("b-0")


@in_virtual_time
async def test_stop_of_an_older_epoch_touches_nothing():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    stops = Stops(parts.hosts, parts.watches, parts.journal, parts.tasks, parts.term)
    stops.begin(Stop("b-0", -1))
    await eventually(lambda: not stops.under_way)
    assert not host.stopped
    assert "b-0" in parts.hosts
