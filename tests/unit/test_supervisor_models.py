"""What clients want loaded, woken and unloaded."""

import asyncio
import dataclasses
from typing import Any

import pytest

from actors.supervisor.models import Models
from actors.supervisor.orders import MemoryOrders
from actors.supervisor.records import ModelOrder
from recovery.control import (
    ModelUnwanted,
    ModelWanted,
    Phase,
)
from recovery.errors import (
    BadInput,
    PoolClosed,
    PoolError,
    SetupError,
)
from recovery.log.segments import LogUnavailable
from recovery.records import HostRef
from tests.fakes import (
    NUMERIC,
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import Parts, opened


@in_virtual_time
async def test_model_is_loaded_on_every_browser_before_load_returns():
    async with opened("b-0", "b-1") as pool:
        await pool.supervisor.load(order())
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert [route.status.models for route in table.routes] == [{"m": NUMERIC}] * 2
        assert table.models["m"].entry == {"config": {"of": "m"}}


@in_virtual_time
async def test_unload_takes_the_model_out_of_the_table():
    async with opened() as pool:
        await pool.supervisor.load(order())
        await pool.supervisor.unload("m")
        await eventually(lambda: pool.hosts["b-0"].unloads == [(HostRef("b-0", 0), "m")])
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert table.models == {}
        assert [route.status.models for route in table.routes] == [{}]


@in_virtual_time
async def test_load_and_unload_of_one_name_at_once_leave_nothing_half_done():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        await pool.supervisor.load(order())
        pool.log.gate.clear()
        unloading = asyncio.create_task(pool.supervisor.unload("m"))
        await eventually(lambda: pool.journal.is_busy)
        loading = asyncio.create_task(pool.supervisor.load(order()))
        await asyncio.sleep(0.1)
        pool.log.gate.set()
        await asyncio.gather(unloading, loading)
        assert "m" in pool.state.models
        assert await pool.orders.load("m", order().spec.digest) is not None


@in_virtual_time
async def test_parked_model_is_loaded_again_when_somebody_asks():
    async with opened(care_seconds=1.0) as pool:
        await pool.supervisor.load(order())
        host = pool.hosts["b-0"]
        host.usage_said, host.available_bytes = {"models": {"m": 99.0}}, 1 << 28
        await pool.changes.until(lambda: "m" in pool.state.parked)
        assert (await pool.supervisor.watch("client", -1, 0.0)).models.keys() == {"m"}
        host.available_bytes = 1 << 33
        big = dataclasses.replace(order().spec, load_peak_bytes=1 << 40)
        pool.supervisor._models._orders["m"] = dataclasses.replace(order(), spec=big)
        with pytest.raises(SetupError, match="is not loaded"):
            await pool.supervisor.reload("m")
        pool.supervisor._models._orders["m"] = order()
        await pool.supervisor.reload("m")
        assert pool.state.parked == {}
        await pool.loaded("b-0", epoch=0)


@in_virtual_time
async def test_load_that_memory_does_not_allow_is_refused_before_any_browser_is_touched():
    async with opened() as pool:
        await pool.until("b-0", Phase.READY, 0)
        big = order()
        big = dataclasses.replace(big, spec=dataclasses.replace(big.spec, load_peak_bytes=1 << 40))
        with pytest.raises(SetupError, match="is not loaded"):
            await pool.supervisor.load(big)
        assert pool.hosts["b-0"].loads == []
        assert pool.state.models == {}


class Refused(PoolError):
    """What a test's own `admit` raises."""


def models(parts: Parts, **options: Any) -> Models:
    async def admit(order: ModelOrder) -> None:
        if order.spec.name == "big":
            raise Refused("too big")

    store = options.pop("store", None) or MemoryOrders()
    require_open = options.pop("require_open", lambda: None)
    return Models(store, parts.journal, parts.changes, parts.tasks, require_open, admit)


@in_virtual_time
async def test_order_is_in_the_store_before_the_event_that_wants_the_model():
    parts, store = Parts(), MemoryOrders()
    await parts.open()
    parts.log.full = True
    with pytest.raises(LogUnavailable):
        await models(parts, store=store).load(order())
    assert await store.load("m", "d") == order()
    assert parts.journal.state.models == {}


@in_virtual_time
async def test_order_that_was_refused_leaves_the_one_before():
    parts = Parts()
    await parts.open()
    ours = models(parts)
    await ours.load(order())
    parts.log.full = True
    other = dataclasses.replace(order(), entry={"other": 1})
    with pytest.raises(LogUnavailable):
        await ours.load(other)
    with pytest.raises(LogUnavailable):
        await ours.load(order("n"))
    assert ours.orders() == {"m": order()}


@in_virtual_time
async def test_another_model_of_the_same_name_is_refused():
    parts = Parts()
    await parts.open()
    ours = models(parts)
    await ours.load(order())
    with pytest.raises(BadInput, match="a different model called 'm'"):
        await ours.load(order(digest="other"))


@in_virtual_time
async def test_model_that_is_not_admitted_is_nowhere():
    parts, store = Parts(), MemoryOrders()
    await parts.open()
    ours = models(parts, store=store)
    with pytest.raises(Refused):
        await ours.load(order("big"))
    assert ours.orders() == {}
    assert await store.load("big", "d") is None


@in_virtual_time
async def test_orders_of_the_term_before_are_restored_and_a_lost_one_is_told_of():
    parts, store = Parts(), MemoryOrders()
    await parts.open()
    await parts.happen(ModelWanted("m", "d"), ModelWanted("n", "d"))
    await store.save(order())
    ours = models(parts, store=store)
    await ours.restore()
    assert ours.orders() == {"m": order()}
    assert parts.logged[-1] == ModelUnwanted("n")
    assert list(parts.tasks.faults) == ["model n: its order is lost; call load() again"]


@in_virtual_time
async def test_closing_pool_takes_no_order():
    def closing() -> None:
        raise PoolClosed("it is closing")

    parts = Parts()
    await parts.open()
    ours = models(parts, require_open=closing)
    for asked in (ours.load(order()), ours.reload("m"), ours.unload("m")):
        with pytest.raises(PoolClosed):
            await asked
