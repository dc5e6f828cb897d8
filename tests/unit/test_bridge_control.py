"""What the page's main thread says and is told."""

import asyncio
import contextlib
import json
from typing import Any

import pytest

from actors.bridge import BridgeEvent
from actors.bridge.control import Control
from recovery.errors import BrowserLost
from tests import fakes
from tests.served import event, serving


async def test_ping_does_not_wait_for_a_socket_that_is_away():
    async with serving() as served, served.page() as page:
        await page.control.close()
        await event(served, "closed")
        with pytest.raises(BrowserLost, match="not connected") as caught:
            await served.bridge.ping()
        assert caught.value.fields == {"what": "socket_closed"}


async def test_main_thread_answers_pings_and_tells_its_console():
    async with serving() as served, served.page() as page:
        pinged = asyncio.create_task(served.bridge.ping())
        ping = json.loads((await page.control.receive(timeout=5)).data)
        await page.control.send_str(json.dumps({"kind": "pong", "id": ping["id"]}))
        await pinged
        await page.control.send_str(json.dumps({"kind": "console", "text": "a" * 5000}))
        await event(served, "console")
        assert [len(line) for line in served.bridge.console] == [2000]


async def test_last_words_of_an_old_page_are_not_taken_for_the_new_ones():
    async with serving() as served, served.page(epoch=0) as page:
        await page.control.send_str('{"kind": "worker_failed", "text": "I die"}')
        await asyncio.sleep(0)  # it is on its way
        served.begin(epoch=1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await event(served, "worker_failed")
        assert not any(seen.epoch == 1 for seen in served.events)


# -- the main thread alone -------------------------------------------------------------------------


class Line:
    """Both the register of sockets and the one socket in it."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.broken = False

    def get(self, name: str) -> "Line":
        assert name == "control"
        return self

    async def send_str(self, text: str) -> None:
        if self.broken:
            raise ConnectionResetError
        self.said.append(json.loads(text))


def hear(control: Control, epoch: int = 0, **message: Any) -> None:
    control.hear(json.dumps(message), epoch, 0)


async def test_each_pong_answers_its_own_ping():
    line = Line()
    control = Control(line, lambda _: None)
    pings = [asyncio.create_task(control.ping()) for _ in range(2)]
    await fakes.eventually(lambda: len(line.said) == 2)
    hear(control, kind="pong", id=line.said[1]["id"])
    await pings[1]
    assert not pings[0].done()
    control.fail("it closed", "socket_closed")
    with pytest.raises(BrowserLost, match="it closed"):
        await pings[0]


async def test_socket_that_breaks_fails_a_ping_and_not_what_is_only_told():
    line = Line()
    control = Control(line, lambda _: None)
    await control.tell({"kind": "hush"})
    assert line.said == [{"kind": "hush"}]
    line.broken = True
    await control.tell({"kind": "hush"})
    with pytest.raises(BrowserLost, match="control socket is closed"):
        await control.ping()


def test_what_the_page_says_is_reported_and_a_replaced_page_is_not_heard():
    events: list[BridgeEvent] = []
    control = Control(Line(), events.append)
    hear(control, kind="visibility", state="hidden")
    hear(control, kind="console", text="it works")
    hear(control, epoch=-1, kind="console", text="I die")
    control.hear("nonsense", 0, 0)
    assert [event.what for event in events] == ["visibility", "console"]
    assert control.visibility == "hidden"
    assert list(control.console) == ["it works", "unreadable control message"]
    control.begin()
    assert (control.visibility, list(control.console)) == ("", [])
