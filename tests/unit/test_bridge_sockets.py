"""The two sockets of a page, which come and go."""

import asyncio

import aiohttp
import pytest

from recovery.errors import BrowserLost
from sharding.models.frames import Frame
from tests import fakes
from tests.served import a_request_works, event, serving


async def test_second_page_of_the_same_epoch_is_refused():
    async with serving() as served, served.page() as page:
        for name in ("data", "control"):
            async with served.connect(name, page.cookie) as second:
                message = await second.receive(timeout=5)
                assert message.type is aiohttp.WSMsgType.CLOSE
                assert second.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION
        await a_request_works(served, page)
        assert served.events == []


async def test_close_of_a_socket_fails_what_waits_on_it_only():
    async with serving() as served, served.page() as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        pinged = asyncio.create_task(served.bridge.ping())
        await page.receive()
        await page.control.receive(timeout=5)
        for name, waiting in (("data", asked), ("control", pinged)):
            await getattr(page, name).close()
            with pytest.raises(BrowserLost) as caught:
                await waiting
            assert caught.value.fields == {"what": "socket_closed"}
            seen = await event(served, "closed")
            assert seen.facts == {"socket": name}
            served.events.clear()
            assert pinged.done() is (name == "control")
        assert served.bridge.outstanding == 0


@pytest.mark.parametrize("closes", ["the page", "the bridge"])
@pytest.mark.parametrize("names", [("data",), ("control",), ("control", "data")])
async def test_page_opens_closed_sockets_again_with_the_same_token(names, closes):
    async with serving() as served, served.page() as page:
        if closes == "the bridge":
            served.bridge.drop(names)
        for name in names:
            await getattr(page, name).close()
        await fakes.until(lambda: len(served.events) == len(names))
        assert not served.bridge.connected
        back = asyncio.create_task(served.bridge.reconnected())
        for name in names:
            assert not back.done()
            setattr(page, name, await served.connect(name, page.cookie))
        async with asyncio.timeout(5):
            await back
        assert served.bridge.connected
        await a_request_works(served, page)
        assert sorted(seen.facts["socket"] for seen in served.events) == list(names)
        for name in ("data", "control"):
            await getattr(page, name).close()


async def test_socket_of_a_replaced_page_does_not_open_again():
    async with serving() as served, served.page(epoch=0) as page:
        await page.data.close()
        await event(served, "closed")
        served.begin(epoch=1)
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await served.connect("data", page.cookie)
        assert caught.value.status == 403
        message = await page.control.receive(timeout=5)
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert message.data == aiohttp.WSCloseCode.POLICY_VIOLATION, "the page stops for that"
