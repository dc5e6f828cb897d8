"""Who may come in."""

from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from actors.bridge import PROTOCOL
from actors.bridge.admission import Admission
from tests.served import ORT, serving


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


async def test_page_is_served_once_so_that_a_reload_does_not_come_in():
    async with serving() as served:
        cookie = await served.enter(served.begin())
        assert await served.status("/", cookie) == 200
        assert await served.status("/", cookie) == 403
        cookie = await served.enter(served.begin(epoch=1))
        assert await served.status("/", cookie) == 200


async def test_ticket_beyond_ascii_is_refused_like_any_other(caplog):
    async with serving() as served:
        served.begin()
        assert await served.status(f"/enter/{quote('é')}") == 403
        assert caplog.records == []


# -- admission alone -------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None) -> Admission:
    made = Admission(frozenset({"/data"}), clock or Clock())
    made.begin(0, "h:1")
    return made


def asking(path: str = "/", **headers: str) -> web.Request:
    return make_mocked_request("GET", path, headers={"Host": "h:1", **headers})


def test_page_that_is_kept_away_is_answered_nothing_until_its_time_is_over():
    clock = Clock()
    ours = admission(clock)
    ours.stay_away(5.0)
    with pytest.raises(web.HTTPServiceUnavailable):
        ours.check(asking("/data"))
    clock.now = 5.0
    ours.check(asking("/data"))


def test_next_page_is_not_kept_away_for_what_the_one_before_did():
    ours = admission()
    ours.stay_away(5.0)
    ours.begin(1, "h:1")
    ours.check(asking("/data"))


def test_each_page_has_secrets_of_its_own():
    ours = admission()
    token, ticket = ours.token, ours.begin(1, "h:1")
    assert ours.epoch == 1
    assert token != ours.token
    assert ours.token not in ticket


def test_after_the_end_neither_ticket_nor_token_is_good():
    ours = admission()
    token = ours.token
    ours.end()
    for offered in (token, ""):
        with pytest.raises(web.HTTPForbidden):
            ours.take_ticket(offered)
        with pytest.raises(web.HTTPForbidden):
            ours.check(asking(Cookie=f"tabpool={offered}"))


def test_socket_needs_an_origin_though_it_has_the_token():
    ours = admission()
    protocol = {"Sec-WebSocket-Protocol": f"{PROTOCOL}, {ours.token}"}
    with pytest.raises(web.HTTPForbidden):
        ours.check_socket(asking("/data", **protocol))
    assert ours.check_socket(asking("/data", Origin="http://h:1", **protocol)) == ours.token
