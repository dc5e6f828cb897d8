"""The journal: log first, state next, instructions last."""

import asyncio
from functools import reduce

import pytest

from recovery.control import (
    BreakersMoved,
    BrowserReady,
    BrowserWanted,
    Launch,
    Phase,
    PoolState,
    apply,
)
from recovery.errors import (
    IllegalTransition,
)
from recovery.log.segments import LogUnavailable
from tests.fakes import (
    FACTS,
    FakeHosts,
    eventually,
    in_virtual_time,
    order,
)
from tests.supervised import CHROME, Parts, Pool, opened


@in_virtual_time
async def test_event_is_in_the_log_before_its_instructions_run():
    pool = Pool(FakeHosts())
    pool.log.gate.clear()
    opening = asyncio.create_task(pool.supervisor.open({"b-0": CHROME}))
    await asyncio.sleep(5)
    assert pool.state == PoolState()
    assert pool.hosts.made == {}
    pool.log.gate.set()
    await opening
    await pool.until("b-0", Phase.READY, 0)
    pool.log.gate.clear()
    host = pool.hosts["b-0"]
    host.crash()
    await asyncio.sleep(5)
    assert len(host.launches) == 1
    pool.log.gate.set()
    await pool.until("b-0", Phase.READY, 1)
    pool.die()


@in_virtual_time
async def test_event_whose_asker_is_cancelled_on_its_way_to_the_disk_is_whole():
    async with opened("b-0", "b-1") as pool:
        for browser_id in ("b-0", "b-1"):
            await pool.until(browser_id, Phase.READY, 0)
        pool.log.gate.clear()
        asked = asyncio.create_task(pool.supervisor.drain("b-1"))
        await eventually(lambda: pool.journal.is_busy)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert pool.phase("b-1") == (Phase.READY, 0)  # not before it is on disk
        pool.log.gate.set()
        await pool.until("b-1", Phase.STOPPED, 0)
        assert pool.log.last_seq == pool.journal.seq
        await pool.supervisor.load(order())


@in_virtual_time
async def test_reporter_that_raises_disturbs_nothing():
    raised = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    async with opened(on_repair=lambda record, repair: 1 / 0) as pool:
        await pool.until("b-0", Phase.READY, 0)
        pool.hosts["b-0"].crash()
        await pool.until("b-0", Phase.READY, 1)
        await eventually(lambda: bool(raised))
    assert isinstance(raised[0]["exception"], ZeroDivisionError)


@in_virtual_time
async def test_full_disk_refuses_orders_but_repairs_go_on_and_are_logged_later():
    async with opened() as pool:
        await pool.supervisor.load(order())
        pool.log.full = True
        with pytest.raises(LogUnavailable):
            await pool.supervisor.load(order("n"))
        pool.hosts["b-0"].crash()
        await pool.loaded("b-0", epoch=1)
        table = await pool.supervisor.watch("client", -1, 0.0)
        assert "disk is full" in table.log_trouble
        logged = len(pool.log.events)
        pool.log.full = False
        await pool.supervisor.load(order("n"))
        assert len(pool.log.events) > logged + 2
        assert (await pool.supervisor.watch("client", -1, 0.0)).log_trouble == ""


@in_virtual_time
async def test_illegal_event_leaves_log_and_state_alone():
    parts = Parts()
    await parts.open("b-0")
    state = parts.journal.state
    with pytest.raises(IllegalTransition):
        await parts.journal.happen(BrowserReady("nobody", 0, FACTS))
    assert parts.journal.state is state
    assert len(parts.logged) == parts.journal.seq == 2
    await parts.happen(BrowserReady("b-0", 0, FACTS))
    assert parts.journal.state.browsers["b-0"].phase is Phase.READY


@in_virtual_time
async def test_instructions_follow_the_event_that_they_come_from():
    parts = Parts()
    await parts.open("b-0", "b-1")
    assert parts.instructions == [Launch("b-0", CHROME, 0), Launch("b-1", CHROME, 0)]


@in_virtual_time
async def test_change_is_announced_after_every_event():
    parts = Parts()
    before = parts.changes.version
    await parts.open("b-0")
    assert parts.changes.version == before + 2


@in_virtual_time
async def test_what_waits_for_the_log_is_written_first_and_in_order():
    parts = Parts()
    await parts.open()
    parts.log.full = True
    await parts.happen(BrowserWanted("b-0", CHROME))
    await parts.happen(BrowserReady("b-0", 0, FACTS))
    assert parts.journal.is_behind
    assert parts.journal.trouble == "the disk is full"
    with pytest.raises(LogUnavailable):
        await parts.journal.happen(BrowserWanted("b-1", CHROME), ordered=True)
    assert "b-1" not in parts.journal.state.browsers
    parts.log.full = False
    await parts.happen(BrowserWanted("b-1", CHROME))
    assert not parts.journal.is_behind
    assert parts.journal.trouble == ""
    assert reduce(apply, parts.log.events, PoolState()) == parts.journal.state


@in_virtual_time
async def test_log_that_can_not_be_written_for_too_long_is_given_up():
    parts = Parts()
    await parts.open("b-0")
    parts.log.full = True
    for _ in range(1001):
        await parts.happen(BreakersMoved("b-0", {}))
    assert parts.log.closed
    assert not parts.journal.is_behind
    assert parts.journal.trouble.startswith("the log is given up: the disk is full")
    await parts.journal.happen(BrowserWanted("b-1", CHROME), ordered=True)  # in memory


@in_virtual_time
async def test_checkpoint_is_of_the_last_event_and_not_written_twice():
    parts = Parts()
    await parts.open("b-0")
    await parts.journal.checkpoint()
    await parts.journal.checkpoint()
    assert parts.log.checkpoints == [(2, parts.journal.state)]


@in_virtual_time
async def test_checkpoint_is_due_after_a_thousand_events():
    parts = Parts()
    await parts.open("b-0")
    for _ in range(998):
        await parts.happen(BreakersMoved("b-0", {}))
    assert [seq for seq, _ in parts.log.checkpoints] == [1000]


@in_virtual_time
async def test_trouble_names_what_is_lost_and_what_is_wrong_now():
    parts = Parts()
    parts.journal.lost("events 3 to 5 are lost")
    parts.log.full = True
    await parts.open()
    assert parts.journal.trouble == "events 3 to 5 are lost; the disk is full"


@in_virtual_time
async def test_event_under_way_is_known():
    parts = Parts()
    parts.log.gate.clear()
    asked = asyncio.create_task(parts.open())
    await eventually(lambda: parts.journal.is_busy)
    (event,) = parts.journal.under_way
    parts.log.gate.set()
    await asked
    assert event.done()
    assert parts.journal.under_way == ()
