"""A bridge that is served for real on loopback, and an aiohttp client that plays its page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from yarl import URL

from actors.assets import ort_version
from actors.bridge import PROTOCOL, Bridge, BridgeEvent, PageConfig
from sharding.models.frames import Frame, decode, encode
from tests import fakes

X = {"x": np.arange(4, dtype=np.float32)}
ORT = f"/ort/{ort_version()}"
LIMIT = 1 << 16


class Served:
    """A bridge that listens, and what a browser does with it."""

    def __init__(self, bridge: Bridge, http: aiohttp.ClientSession) -> None:
        self.bridge = bridge
        self.http = http
        self.events: list[BridgeEvent] = []
        self.host = ""

    def begin(self, epoch: int = 0) -> str:
        self.host = f"127.0.0.1:{self.bridge.port}"
        return self.bridge.begin_epoch(epoch, self.host)

    def get(self, path: str, cookie: str = "", **headers: str) -> Any:
        url = URL(f"http://127.0.0.1:{self.bridge.port}{path}", encoded=True)
        if cookie:
            headers["Cookie"] = f"tabpool={cookie}"
        return self.http.get(url, headers=headers, allow_redirects=False)

    async def status(self, path: str, cookie: str = "", **headers: str) -> int:
        async with self.get(path, cookie, **headers) as response:
            await response.read()
            return response.status

    async def enter(self, path: str) -> str:
        """Go in with a ticket; returns the cookie."""
        async with self.get(path) as response:
            assert response.status == 303
            assert response.headers["Location"] == "/"
            return response.cookies["tabpool"].value

    def connect(self, name: str, cookie: str, **options: Any) -> Any:
        options = {
            "origin": f"http://{self.host}",
            "protocols": (PROTOCOL, cookie),
            "headers": {"Cookie": f"tabpool={cookie}"},
            **options,
        }
        return self.http.ws_connect(f"http://{self.host}/{name}", **options)

    @contextlib.asynccontextmanager
    async def page(self, epoch: int = 0) -> AsyncIterator[Page]:
        cookie = await self.enter(self.begin(epoch))
        async with self.connect("control", cookie) as control, self.connect("data", cookie) as data:
            await self.bridge.opened()
            yield Page(cookie, control, data)


@dataclass
class Page:
    cookie: str
    control: aiohttp.ClientWebSocketResponse
    data: aiohttp.ClientWebSocketResponse

    async def receive(self) -> Frame:
        return decode(await self.data.receive_bytes(timeout=5), bytes_max=LIMIT * 2)

    async def send(self, frame: Frame) -> None:
        await self.data.send_bytes(encode(frame, bytes_max=LIMIT * 2))

    async def answer_once(self, kind: str = "result", **fields: Any) -> None:
        frame = await self.receive()
        reply = {"epoch": frame.epoch, "tensors": frame.tensors, **fields}
        await self.send(Frame(kind, frame.op_id, **reply))


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    seen: list[BridgeEvent] = []
    bridge = Bridge(PageConfig(1, LIMIT, probe=False), seen.append)
    await bridge.start()
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(cookie_jar=jar) as http:
        served = Served(bridge, http)
        served.events = seen
        try:
            yield served
        finally:
            await bridge.stop()


async def a_request_works(served: Served, page: Page, op_id: str = "works") -> None:
    async with asyncio.timeout(5):
        asked = asyncio.create_task(served.bridge.request(Frame("run", op_id, 0, tensors=X)))
        await page.answer_once(body={"inPageMs": 1})
        answer = await asked
    np.testing.assert_array_equal(answer.tensors["x"], X["x"])


async def event(served: Served, what: str) -> BridgeEvent:
    await fakes.until(lambda: any(seen.what == what for seen in served.events))
    return next(seen for seen in served.events if seen.what == what)
