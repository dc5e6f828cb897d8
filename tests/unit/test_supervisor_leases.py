"""The lease of a pool's creator."""

import asyncio

from actors.supervisor.leases import CreatorLease
from recovery.control import (
    Phase,
)
from tests.fakes import (
    in_virtual_time,
)
from tests.supervised import opened


@in_virtual_time
async def test_pool_whose_creator_is_gone_closes_itself():
    async with opened(persistent=False) as pool:
        loop = asyncio.get_running_loop()
        await pool.until("b-0", Phase.READY, 0)
        for _ in range(4):  # as long as its creator asks, it lives
            await asyncio.sleep(10)
            await pool.supervisor.watch("creator", -1, 0.0)
        assert pool.closed == 0
        await pool.supervisor.watch("somebody else", -1, 0.0)
        await asyncio.sleep(15.1)
        assert pool.closed == 1
        assert pool.hosts["b-0"].killed
        assert loop.time() < 60


@in_virtual_time
async def test_persistent_pool_outlives_its_creator():
    async with opened(persistent=True) as pool:
        await asyncio.sleep(3600)
        assert pool.closed == 0
        assert pool.phase("b-0") == (Phase.READY, 0)


@in_virtual_time
async def test_lease_is_over_when_its_creator_has_not_asked_for_so_long():
    loop = asyncio.get_running_loop()
    lease = CreatorLease("creator", 15.0, loop.time)
    lease.renew("creator")
    over = asyncio.create_task(lease.over())
    await asyncio.sleep(10)
    lease.renew("creator")
    await asyncio.sleep(10)
    lease.renew("somebody else")
    assert not over.done()
    await over
    assert loop.time() == 25.0


@in_virtual_time
async def test_creator_may_take_longer_than_the_lease_to_hear_that_its_pool_is_open():
    loop = asyncio.get_running_loop()
    lease = CreatorLease("creator", 15.0, loop.time)
    lease.begin()
    over = asyncio.create_task(lease.over())
    await asyncio.sleep(50)
    assert not over.done()
    lease.renew("creator")  # from here on it polls
    await asyncio.sleep(14.9)
    assert not over.done()
    await asyncio.sleep(0.2)
    assert over.done()


@in_virtual_time
async def test_creator_that_never_hears_is_given_up():
    lease = CreatorLease("creator", 15.0, asyncio.get_running_loop().time)
    lease.begin()
    await asyncio.wait_for(lease.over(), 60.1)
