"""Repairs on request."""

import asyncio

import pytest

from actors.supervisor.repairs import Repairs
from recovery.control import (
    BrowserReady,
)
from recovery.errors import (
    BadInput,
)
from recovery.failures import Category
from recovery.records import HostRef
from tests.fakes import (
    FACTS,
    eventually,
    failure,
    in_virtual_time,
    order,
)
from tests.supervised import Parts, opened


@in_virtual_time
async def test_repair_on_request_says_what_came_of_it():
    async with opened() as pool:
        await pool.supervisor.load(order())
        seen = failure(Category.GPU_ERROR)
        repair = await pool.supervisor.repair("b-0", seen)
        assert (repair.outcome, repair.failure.category) == ("restarted", Category.GPU_ERROR)
        with pytest.raises(BadInput):
            await pool.supervisor.repair("nobody", seen)


@in_virtual_time
async def test_failure_of_an_incarnation_that_is_over_is_not_told_again():
    parts = Parts()
    await parts.open("b-0")
    await parts.serve("b-0")
    logged = len(parts.logged)
    old = failure(ref=HostRef("b-0", -1))
    with pytest.raises(BadInput, match="not in service"):
        await Repairs(parts.journal, parts.changes).repair("b-0", old)
    assert len(parts.logged) == logged


@in_virtual_time
async def test_repair_returns_when_the_browser_is_back():
    parts = Parts()
    await parts.open("b-0")
    await parts.serve("b-0")
    asked = asyncio.create_task(Repairs(parts.journal, parts.changes).repair("b-0", failure()))
    await eventually(lambda: parts.journal.state.browsers["b-0"].epoch == 1)
    assert not asked.done()
    await parts.happen(BrowserReady("b-0", 1, FACTS))
    assert (await asked).outcome == "restarted"
