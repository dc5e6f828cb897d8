"""Maintenance between failures."""

import asyncio
import dataclasses
from typing import Any

import pytest

from actors.supervisor.care import Care
from recovery.control import (
    Phase,
    PoolClosing,
)
from recovery.errors import (
    SetupError,
)
from recovery.resources import ResourceLimits
from tests.fakes import (
    FakeHost,
    in_virtual_time,
    order,
    spec,
)
from tests.supervised import CONFIG, Parts, opened


@in_virtual_time
async def test_worn_browser_is_drained_and_started_anew_with_its_models():
    limits = ResourceLimits(recycle_operations=5)
    async with opened("b-0", "b-1", resources=limits, care_seconds=1.0) as pool:
        await pool.supervisor.load(order())
        pool.hosts["b-0"].usage_said = {"served": 9}
        await pool.loaded("b-0", epoch=1)
        assert len(pool.hosts.made["b-0"]) == 2  # in a worker of its own
        assert pool.phase("b-1") == (Phase.READY, 0)
        assert pool.state.repairs == ()


def care(parts: Parts, **config: Any) -> Care:
    config = {"care_seconds": 1.0, **config}
    return Care(
        dataclasses.replace(CONFIG, **config), parts.hosts, parts.journal, parts.tasks, parts.wall
    )


@in_virtual_time
async def test_who_does_not_answer_or_does_not_serve_carries_nothing():
    parts = Parts()
    await parts.open("b-0", "b-1", "b-2")
    await parts.serve("b-1")
    silent = await parts.serve("b-0")
    parts.watches.take_on("b-2", FakeHost("b-2"))  # it only starts

    async def usage():
        await asyncio.Event().wait()

    silent.usage = silent.memory_bytes = usage
    loads, nodes = await care(parts).loads()
    assert [load.browser_id for load in loads] == ["b-1"]
    assert [node.node for node in nodes] == ["node"]
    assert await care(parts).memory() == {"b-1": 1 << 20, "b-2": 1 << 20}


@in_virtual_time
async def test_care_that_the_log_refuses_waits_for_the_next_look():
    parts = Parts()
    await parts.open("b-0", "b-1")
    host = await parts.serve("b-0")
    await parts.serve("b-1")
    host.usage_said = {"served": 9}
    parts.log.full = True
    caring = care(parts, resources=ResourceLimits(recycle_operations=5))
    parts.tasks.spawn(caring.run, "care")
    await asyncio.sleep(1.5)
    assert parts.tasks.faults[0].startswith("care: LogUnavailable")
    assert not parts.journal.state.browsers["b-0"].recycling
    parts.log.full = False
    await asyncio.sleep(1.0)
    assert parts.journal.state.browsers["b-0"].recycling
    await parts.happen(PoolClosing())
    await asyncio.sleep(1.0)
    assert not parts.tasks.running


@in_virtual_time
async def test_load_is_refused_where_a_machine_has_no_room_for_it():
    parts = Parts()
    await parts.open("b-0")
    await parts.serve("b-0")
    await care(parts).refuse_if_full(order())
    big = dataclasses.replace(order(), spec=dataclasses.replace(spec(), load_peak_bytes=1 << 40))
    with pytest.raises(SetupError, match="is not loaded"):
        await care(parts).refuse_if_full(big)
