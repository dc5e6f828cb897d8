"""One connection to each address, however many ask; none outlives its use."""

from __future__ import annotations

import asyncio

import pytest

from actors.links import Links
from recovery.errors import BrowserLost


class Line:
    """A connection that takes until `gate` to open."""

    def __init__(self, gate: asyncio.Event | None = None) -> None:
        self.gate = gate
        self.opened = 0
        self.closed = True
        self.busy = False

    async def open(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.opened += 1
        self.closed = False

    async def close(self) -> None:
        self.closed = True


async def test_however_many_ask_one_is_opened():
    links, made, gate = Links[Line](), [], asyncio.Event()

    def make() -> Line:
        made.append(Line(gate))
        return made[-1]

    asking = [asyncio.create_task(links.get("a", make)) for _ in range(5)]
    await asyncio.sleep(0)
    gate.set()
    assert {id(link) for link in await asyncio.gather(*asking)} == {id(made[0])}
    assert len(made) == made[0].opened == 1


async def test_what_has_closed_is_opened_anew_and_not_kept():
    links = Links[Line]()
    first, other = await links.get("a", Line), await links.get("b", Line)
    await first.close()
    await other.close()
    assert await links.get("a", Line) is not first
    assert links.open_now().keys() == {"a"}


async def test_idle_ones_nobody_needs_are_closed_and_busy_ones_left():
    links = Links[Line]()
    idle, busy, kept = [await links.get(name, Line) for name in "abc"]
    busy.busy = True
    await links.keep({"c"})
    assert (idle.closed, busy.closed, kept.closed) == (True, False, False)


async def test_one_that_opens_after_the_end_is_closed_again():
    links, gate = Links[Line](), asyncio.Event()
    line = Line(gate)
    asking = asyncio.create_task(links.get("a", lambda: line))
    await asyncio.sleep(0)
    await links.close()
    gate.set()
    with pytest.raises(BrowserLost):
        await asking
    assert line.opened == 1
    assert line.closed
