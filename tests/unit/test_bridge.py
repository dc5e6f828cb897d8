"""The bridge, served for real on loopback; an aiohttp client plays the page."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from yarl import URL

from actors.assets import index_html, ort_version, static_assets
from actors.bridge import PROTOCOL, Bridge, BridgeEvent, PageConfig
from recovery.errors import BrowserLost, MessageTooLarge, PageError
from sharding.models.frames import Frame, decode, encode
from sharding.models.signature import ModelFile
from tests import fakes

LIMIT = 1 << 16
ORT = f"/ort/{ort_version()}"
X = {"x": np.arange(4, dtype=np.float32)}


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
    async def page(self, epoch: int = 0) -> AsyncIterator["Page"]:
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


# -- who may come in -------------------------------------------------------------------------------


async def test_page_enters_once_and_is_told_its_configuration():
    async with serving() as served:
        cookie = await served.enter(served.begin(epoch=3))
        async with served.get("/", cookie) as response:
            text = await response.text()
            headers = response.headers
        assert response.status == 200
        assert '"epoch": 3' in text
        assert cookie in text
        assert "{{config}}" not in text
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'self'" in headers["Content-Security-Policy"]


async def test_cookie_is_for_this_site_only_and_not_for_scripts():
    async with serving() as served, served.get(served.begin()) as response:
        cookie = response.cookies["tabpool"]
        assert cookie["httponly"]
        assert cookie["samesite"] == "Strict"


async def test_ticket_is_good_for_one_try():
    async with serving() as served:
        ticket = served.begin()
        await served.enter(ticket)
        assert await served.status(ticket) == 403
        ticket = served.begin(epoch=1)
        assert await served.status("/enter/guessed") == 403
        assert await served.status(ticket) == 403


@pytest.mark.parametrize("path", ["/", "/page/main.js", f"{ORT}/ort.wasm.min.mjs", "/data", "/x"])
async def test_without_the_token_nothing_is_served(path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        assert await served.status(path) == 403
        assert await served.status(path, "guessed") == 403
        assert await served.status(path, cookie[:-1]) == 403


async def test_before_the_first_epoch_nobody_may_come_in():
    async with serving() as served:
        assert await served.status("/") == 403
        assert await served.status("/", "", Host="") == 403


@pytest.mark.parametrize("host", ["evil.example", "localhost", "127.0.0.1", "127.0.0.1:1"])
async def test_wrong_host_is_refused(host):
    async with serving() as served:
        ticket = served.begin()
        assert await served.status(ticket, Host=host) == 403
        cookie = await served.enter(ticket)  # that was no try
        assert await served.status("/", cookie, Host=host) == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://{host}", ""])
async def test_foreign_origin_is_refused(origin):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        origin = origin.format(host=served.host)
        assert await served.status("/", cookie, Origin=origin) == 403
        for name in ("data", "control"):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await served.connect(name, cookie, origin=origin or None)
            assert caught.value.status == 403


@pytest.mark.parametrize(
    "protocols", [(), (PROTOCOL,), (PROTOCOL, "guessed"), (PROTOCOL, "a", "b")]
)
async def test_socket_without_the_token_as_subprotocol_is_refused(protocols):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await served.connect("data", cookie, protocols=protocols)
        assert caught.value.status == 403


@pytest.mark.parametrize("protocols", [(PROTOCOL, ""), (PROTOCOL, "guessed")])
async def test_after_the_end_of_a_page_no_token_opens_a_socket(protocols):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        served.bridge.end_page("it died")
        for offered in (protocols, (PROTOCOL, cookie)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await served.connect("data", cookie, protocols=offered)
            assert caught.value.status == 403


async def test_socket_with_the_token_gives_a_lost_cookie_back():
    async with serving() as served:
        cookie = await served.enter(served.begin())
        async with served.connect("control", cookie, headers={}) as socket:
            given = socket._response.cookies["tabpool"]
        assert given.value == cookie
        assert given["httponly"]
        assert await served.status("/", given.value) == 200


async def test_new_epoch_refuses_the_old_token_and_ends_the_old_page():
    async with serving() as served, served.page(epoch=0) as page:
        served.begin(epoch=1)
        assert await served.status("/", page.cookie) == 403
        for socket in (page.data, page.control):
            message = await socket.receive(timeout=5)
            assert message.type is aiohttp.WSMsgType.CLOSE
        assert served.events == []  # its end was ordered: no event


async def test_second_page_of_the_same_epoch_is_refused():
    async with serving() as served, served.page() as page:
        for name in ("data", "control"):
            async with served.connect(name, page.cookie) as second:
                message = await second.receive(timeout=5)
                assert message.type is aiohttp.WSMsgType.CLOSE
                assert second.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION
        await a_request_works(served, page)
        assert served.events == []


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/page/../bridge.py",
        "/page/../../pyproject.toml",
        "/page/..%2fbridge.py",
        "/page/%2e%2e/bridge.py",
        "/page/%2e%2e%2fbridge.py",
        "/page/..%5cbridge.py",
        "/page/%252e%252e/bridge.py",
        "//etc/passwd",
        "/%2fetc%2fpasswd",
        "/page//main.js",
        "/page/main.js%00",
        "/page/",
        "/page",
        "/page/index.html",
        "/ort/VERSION",
        f"{ORT}/../VERSION",
        "/models/d/0",
        "/" + "a" * 2000,
    ],
)
async def test_no_path_escapes_the_table_of_files(path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        assert await served.status(path, cookie) in (400, 403, 404)
        assert await served.status("/page/main.js", cookie) == 200


@pytest.mark.parametrize("path", ["/", "/page/main.js", f"{ORT}/ort.wasm.min.mjs"])
async def test_every_answer_isolates_the_page(path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        async with served.get(path, cookie) as response:
            assert response.status == 200
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_runtime_can_be_cached_for_ever_and_the_page_not():
    async with serving() as served:
        cookie = await served.enter(served.begin())
        wasm = f"{ORT}/ort-wasm-simd-threaded.wasm"
        async with served.get(wasm, cookie) as response:
            assert response.content_type == "application/wasm"
            assert "immutable" in response.headers["Cache-Control"]
        async with served.get("/page/main.js", cookie) as response:
            assert response.content_type == "text/javascript"
            assert response.headers["Cache-Control"] == "no-cache"
            etag = response.headers["ETag"]
        header = {"If-None-Match": etag}
        assert await served.status("/page/main.js", cookie, **header) == 304


async def test_files_are_served_in_ranges(tmp_path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        model = _model(tmp_path, bytes(range(100)))
        served.bridge.register(model)
        async with served.get("/models/digest/0", cookie, Range="bytes=10-19") as response:
            assert response.status == 206
            assert await response.read() == bytes(range(10, 20))
            assert response.headers["Cache-Control"] == "no-store"
        assert await served.status("/models/digest/0", cookie, Range="bytes=500-") == 416
        served.bridge.unregister(model)
        assert await served.status("/models/digest/0", cookie) == 404


async def test_model_file_that_vanished_is_not_found(tmp_path):
    async with serving() as served:
        cookie = await served.enter(served.begin())
        served.bridge.register(_model(tmp_path, b"x"))
        (tmp_path / "model.onnx").unlink()
        assert await served.status("/models/digest/0", cookie) == 404


def _model(folder: Path, content: bytes) -> Any:
    path = folder / "model.onnx"
    path.write_bytes(content)
    file = ModelFile(str(path), path.name, len(content), "digest")
    return replace(fakes.spec(digest="digest"), files=(file,))


# -- frames ----------------------------------------------------------------------------------------


async def test_page_answers_frames():
    async with serving() as served, served.page() as page:
        assert page.data.protocol == PROTOCOL
        await a_request_works(served, page)


async def test_answers_may_come_in_any_order():
    async with serving() as served, served.page() as page:
        asked = [
            asyncio.create_task(served.bridge.request(Frame("run", f"op{n}", body={"n": n})))
            for n in range(5)
        ]
        frames = [await page.receive() for _ in asked]
        for frame in reversed(frames):
            await page.send(Frame("result", frame.op_id, body=frame.body))
        assert [answer.body["n"] for answer in await asyncio.gather(*asked)] == list(range(5))


async def test_error_of_the_page_is_raised_with_its_facts():
    async with serving() as served, served.page() as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await page.answer_once("error", body={"what": "run_failed", "message": "bad shape"})
        with pytest.raises(PageError, match="bad shape") as caught:
            await asked
        assert caught.value.fields == {"what": "run_failed"}


async def test_answer_of_another_epoch_is_ignored():
    async with serving() as served, served.page(epoch=4) as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op", 4)))
        await page.receive()
        await page.send(Frame("result", "op", 3, body={"stale": True}))
        await page.send(Frame("result", "op", 4, body={"stale": False}))
        assert (await asked).body == {"stale": False}
        assert any("epoch 3" in line for line in served.bridge.console)


async def test_answer_that_nobody_waits_for_any_more_is_dropped():
    async with serving() as served, served.page() as page:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await served.bridge.request(Frame("run", "late"))
        await page.answer_once()
        await a_request_works(served, page)


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


async def test_request_waits_for_a_data_socket_that_is_away():
    async with serving() as served, served.page() as page:
        await page.data.close()
        await event(served, "closed")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await served.bridge.request(Frame("run", "impatient"))
        assert served.bridge.outstanding == 0, "a page that is away works on nothing"
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await asyncio.sleep(0.01)
        async with served.connect("data", page.cookie) as page.data:
            await page.answer_once(body={"n": 1})
            assert (await asked).body == {"n": 1}


async def test_request_that_waits_for_a_socket_ends_with_the_page():
    async with serving() as served, served.page() as page:
        await page.data.close()
        await event(served, "closed")
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        back = asyncio.create_task(served.bridge.reconnected())
        await asyncio.sleep(0.01)
        served.begin(epoch=1)
        for waiting in (asked, back):
            with pytest.raises(BrowserLost, match="not connected"):
                await waiting


async def test_ping_does_not_wait_for_a_socket_that_is_away():
    async with serving() as served, served.page() as page:
        await page.control.close()
        await event(served, "closed")
        with pytest.raises(BrowserLost, match="not connected") as caught:
            await served.bridge.ping()
        assert caught.value.fields == {"what": "socket_closed"}


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


async def test_page_is_served_once_so_that_a_reload_does_not_come_in():
    async with serving() as served:
        cookie = await served.enter(served.begin())
        assert await served.status("/", cookie) == 200
        assert await served.status("/", cookie) == 403
        cookie = await served.enter(served.begin(epoch=1))
        assert await served.status("/", cookie) == 200


async def test_new_epoch_fails_what_waits():
    async with serving() as served, served.page() as page:
        asked = asyncio.create_task(served.bridge.request(Frame("run", "op")))
        await page.receive()
        served.begin(epoch=1)
        with pytest.raises(BrowserLost, match="replaced"):
            await asked
        served.bridge.end_page("it died")
        with pytest.raises(BrowserLost, match="not connected"):
            await served.bridge.request(Frame("run", "op"))


async def test_request_over_the_limit_is_the_callers_fault():
    async with serving() as served, served.page() as page:
        with pytest.raises(MessageTooLarge):
            await served.bridge.request(Frame("run", "op", tensors={"x": np.zeros(LIMIT)}))
        await a_request_works(served, page)


async def test_main_thread_answers_pings_and_tells_its_console():
    async with serving() as served, served.page() as page:
        pinged = asyncio.create_task(served.bridge.ping())
        ping = json.loads((await page.control.receive(timeout=5)).data)
        await page.control.send_str(json.dumps({"kind": "pong", "id": ping["id"]}))
        await pinged
        await page.control.send_str(json.dumps({"kind": "console", "text": "a" * 5000}))
        await event(served, "console")
        assert [len(line) for line in served.bridge.console] == [2000]


async def test_message_over_the_limit_ends_the_page_but_not_the_bridge():
    async with serving() as served:
        async with served.page() as page:
            await page.control.send_str("x" * (1 << 17))
            await event(served, "closed")
        served.events.clear()
        async with served.page() as page:
            await a_request_works(served, page)


async def test_port_survives_for_the_next_bridge_and_a_taken_one_is_not_fatal():
    async with serving() as served:
        port = served.bridge.port
    again = Bridge(PageConfig(1, LIMIT, probe=False), lambda _: None)
    await again.start(port)
    assert again.port == port
    await again.stop()


# -- nonsense --------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "id", "text", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)
_KINDS = st.sampled_from(["pong", "console", "ping", "visibility", "", "x"])
_CONTROL = st.one_of(
    st.text(max_size=100),
    _JSON.map(json.dumps),
    st.builds(lambda kind, rest: json.dumps({**rest, "kind": kind}), _KINDS, st.fixed_dictionaries(
        {}, optional={"id": st.integers() | st.text(max_size=5) | st.none(), "text": _JSON}
    )),
    st.binary(max_size=100),
)  # fmt: skip
_GOOD = encode(Frame("result", "other", 0, body={"a": 1}, tensors=X), bytes_max=LIMIT)


def _spoil(places: list[tuple[int, int]]) -> bytes:
    data = bytearray(_GOOD)
    for place, value in places:
        data[place % len(data)] = value
    return bytes(data)


_DATA = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100),
    st.integers(0, len(_GOOD)).map(lambda n: _GOOD[:n]),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4).map(_spoil),
)
_FUZZ = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # each example serves: don't shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


async def _say(socket: aiohttp.ClientWebSocketResponse, words: list[str | bytes]) -> None:
    for word in words:
        if isinstance(word, str):
            # Half a surrogate pair can't be sent as text.
            await socket.send_str(word.encode(errors="replace").decode())
        else:
            await socket.send_bytes(word)


@_FUZZ
@given(control=st.lists(_CONTROL, max_size=10), data=st.lists(_DATA, max_size=10))
def test_no_nonsense_crashes_the_bridge(caplog, control, data):
    async def run() -> None:
        async with serving() as served, served.page() as page:
            await _say(page.control, control)
            await _say(page.data, data)
            await a_request_works(served, page, "an id that no nonsense has")
            assert not any(seen.what == "closed" for seen in served.events)

    asyncio.run(run())
    assert caplog.records == []


@pytest.mark.parametrize("nonsense", ['{"kind": "pong", "id": []}', "[" * 60_000])
async def test_nonsense_that_parses_oddly_does_not_end_the_page(nonsense, caplog):
    async with serving() as served, served.page() as page:
        pinged = asyncio.create_task(served.bridge.ping())
        ping = json.loads((await page.control.receive(timeout=5)).data)
        await page.control.send_str(nonsense)
        await page.control.send_str(json.dumps({"kind": "pong", "id": ping["id"]}))
        await pinged
        await a_request_works(served, page)
    assert caplog.records == []


async def test_ticket_beyond_ascii_is_refused_like_any_other(caplog):
    async with serving() as served:
        served.begin()
        assert await served.status(f"/enter/{quote('é')}") == 403
        assert caplog.records == []


async def test_last_words_of_an_old_page_are_not_taken_for_the_new_ones():
    async with serving() as served, served.page(epoch=0) as page:
        await page.control.send_str('{"kind": "worker_failed", "text": "I die"}')
        await asyncio.sleep(0)  # it is on its way
        served.begin(epoch=1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await event(served, "worker_failed")
        assert not any(seen.epoch == 1 for seen in served.events)


def test_page_names_no_file_that_is_not_served():
    """Every file that the page names is in the table."""
    named = re.findall(r'(?:src|href)="(/[^"]+)"', index_html())
    assert named
    assert all(path in static_assets() for path in named)
