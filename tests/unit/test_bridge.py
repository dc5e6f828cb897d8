"""The bridge as a whole, served for real on loopback; an aiohttp client plays the page."""

import asyncio
import json

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from recovery.errors import BrowserLost
from sharding.models.frames import Frame, encode
from tests import fakes
from tests.served import LIMIT, X, a_request_works, event, serving


async def test_new_epoch_refuses_the_old_token_and_ends_the_old_page():
    async with serving() as served, served.page(epoch=0) as page:
        served.begin(epoch=1)
        assert await served.status("/", page.cookie) == 403
        for socket in (page.data, page.control):
            message = await socket.receive(timeout=5)
            assert message.type is aiohttp.WSMsgType.CLOSE
        assert served.events == []  # its end was ordered: no event


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


async def test_message_over_the_limit_ends_the_page_but_not_the_bridge():
    async with serving() as served:
        async with served.page() as page:
            await page.control.send_str("x" * (1 << 17))
            await event(served, "closed")
        served.events.clear()
        async with served.page() as page:
            await a_request_works(served, page)


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
            # What can't be read is an answer to whatever is asked meanwhile, so nothing is.
            await page.send(Frame("result", "the last of it"))
            await fakes.until(
                lambda: any(seen.op_id == "the last of it" for seen in served.bridge.frames)
            )
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
