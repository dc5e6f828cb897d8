"""Loads and unloads on one host each, and what a pool makes of those that fail."""

import asyncio
from collections.abc import Mapping

from actors.supervisor.loads import Loads
from actors.supervisor.records import ModelOrder
from recovery.control import (
    Load,
    ModelLoaded,
    ModelPhase,
    ModelWanted,
    Phase,
    Unload,
)
from recovery.errors import (
    InternalError,
)
from recovery.failures import Category
from recovery.records import HostRef
from tests.fakes import (
    NUMERIC,
    FakeHosts,
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import Parts, opened


@in_virtual_time
async def test_model_that_one_browser_cannot_load_is_served_by_the_other():
    async with opened("b-0", "b-1", hosts=FakeHosts(b_0=[{"fail_load": {0, 1}}])) as pool:
        await pool.supervisor.load(order())
        assert pool.state.browsers["b-0"].models == {"m": ModelPhase.FAILED}
        assert pool.state.browsers["b-0"].load_failures["m"].category is Category.API_ERROR
        assert pool.state.browsers["b-1"].models == {"m": ModelPhase.LOADED}


@in_virtual_time
async def test_load_that_fails_by_a_fault_of_ours_does_not_hang():
    script = {"fail_load": {0, 1}, "load_error": InternalError("a broken promise")}
    async with opened(hosts=FakeHosts(b_0=[script])) as pool:
        await pool.supervisor.load(order())
        assert pool.state.browsers["b-0"].models == {"m": ModelPhase.FAILED}


@in_virtual_time
async def test_crash_while_a_model_loads_loads_it_in_the_next_epoch():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        host = pool.hosts["b-0"]
        host.load_gate.clear()
        loading = asyncio.create_task(pool.supervisor.load(order()))
        await eventually(lambda: len(host.loads) == 1)
        host.crash()
        await eventually(lambda: len(host.loads) == 2)
        host.load_gate.set()
        await loading
        await pool.loaded("b-0", epoch=1)


def loads(parts: Parts, orders: Mapping[str, ModelOrder]) -> Loads:
    return Loads(orders.get, parts.hosts, parts.journal, parts.term, parts.wall)


@in_virtual_time
async def test_load_is_reported_with_what_the_model_is_run_by():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    await parts.happen(ModelWanted("m", "d"))
    await loads(parts, {"m": order()}).load(Load("b-0", 0, "m"))
    assert host.loads == [(HostRef("b-0", 0), "m")]
    assert parts.logged[-1] == ModelLoaded("b-0", 0, "m", NUMERIC)


@in_virtual_time
async def test_load_without_an_order_or_a_worker_does_nothing():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    await parts.happen(ModelWanted("m", "d"))
    logged = len(parts.logged)
    await loads(parts, {}).load(Load("b-0", 0, "m"))
    parts.watches.let_go("b-0")
    await loads(parts, {"m": order()}).load(Load("b-0", 0, "m"))
    await loads(parts, {"m": order()}).unload(Unload("b-0", 0, "m"))
    assert host.loads == []
    assert len(parts.logged) == logged


@in_virtual_time
async def test_load_that_is_lost_with_its_worker_is_no_failure_of_the_model():
    parts = Parts()
    await parts.open("b-0")
    host = await parts.serve("b-0")
    await parts.happen(ModelWanted("m", "d"))
    logged = len(parts.logged)
    host.die()
    await loads(parts, {"m": order()}).load(Load("b-0", 0, "m"))
    assert len(parts.logged) == logged
