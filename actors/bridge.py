"""The server that one browser's page talks to: its files and its two sockets.

Bound to loopback. The page enters once with a single-use ticket and gets the token in a cookie;
sockets also carry it as a subprotocol, and every request's Host and Origin are checked. `data`
is the worker's socket (frames), `control` the main thread's (ping, console, visibility), so that
a busy worker still answers pings. A socket that closes does not end the page: it opens another
with the same token, as often as it must, until `end_page`; the page itself is served once only, so
that one which was loaded again (and so has no models) can't take the place of the first. This
module must not launch browsers or judge failures: it reports what it sees through `on_event`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import WSCloseCode, WSMsgType, web
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type

from actors.assets import MODELS, Asset, index_html, model_assets, ort_version, static_assets
from recovery.errors import BadFrame, BrowserLost, PageError
from recovery.policies import PORT_FREES
from sharding.models.frames import Frame, decode, encode
from sharding.models.signature import ModelSpec

PROTOCOL = "tabpool.v1"
_COOKIE = "tabpool"
_SOCKETS = ("control", "data")
_SOCKET_PATHS = frozenset(f"/{name}" for name in _SOCKETS)
_WORK_SECONDS = 300.0  # of one request, where the caller does not say
_CONTROL_BYTES_MAX = 64 * 1024
_CONSOLE_LINES_MAX = 100
_SPOILT_MAX = 64
_FRAMES_MAX = 64
_FRAME_OVERHEAD_BYTES = 1 << 20  # a reply's header, over the limit on its tensors
_HEADERS = {
    # Cross-origin isolation: what SharedArrayBuffer, and so wasm threads, require.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class PageConfig:
    """What the page is told. `probe`: look for WebGPU and WebNN too (costs some 100 ms).

    `faults`: it may be told to answer wrong on purpose.
    """

    threads: int
    message_bytes_max: int
    probe: bool
    faults: bool = False


@dataclass(frozen=True)
class BridgeEvent:
    """Something seen on a socket: `what` is one of hello, closed, console, worker_failed,
    visibility; `epoch` is the page's. After `closed` the page may open that socket again."""

    what: str
    epoch: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class FrameSeen(NamedTuple):
    """The header of a frame to or from the page: no numbers of anybody's. `at` is wall time in
    seconds, `tensors` are name, dtype and shape of each."""

    at: float
    way: str  # "to" or "from" the page
    kind: str
    op_id: str
    epoch: int
    step: int
    position: int
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


class Bridge:
    """Serves one page at a time; a new epoch ends the one before."""

    def __init__(
        self,
        config: PageConfig,
        on_event: Callable[[BridgeEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._closing: set[asyncio.Future[None]] = set()
        self._config = config
        self._on_event = on_event
        self._assets: dict[str, Asset] = {}
        self._host = ""
        self._epoch = -1
        self._token = ""
        self._ticket = ""
        self._served = False  # the page of this epoch
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._requests: dict[str, web.Request] = {}  # that each socket came from
        self._changed = asyncio.Event()  # set, and replaced, when a socket opens or the page ends
        self._pending: dict[str, asyncio.Future[Frame]] = {}
        # What the page has not answered, in the order in which it works, with the longest that
        # each may take; abandoned ones too, since the page still computes them.
        self._exchanges: OrderedDict[str, float] = OrderedDict()
        self._head_since = 0.0
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self._away_until = -math.inf  # no request is answered before, of this page
        self._spoilt: deque[str] = deque(maxlen=_SPOILT_MAX)  # how the next models are served
        self._runner: web.AppRunner | None = None
        self.port = 0
        self.console: deque[str] = deque(maxlen=_CONSOLE_LINES_MAX)
        self.frames: deque[FrameSeen] = deque(maxlen=_FRAMES_MAX)  # the last ones, either way
        self.visibility = ""  # of the page, as it said last

    # -- the server ---------------------------------------------------------------------------

    async def start(self, port: int = 0) -> None:
        """Listen on `port` of loopback (0: any; also when `port` stays taken)."""
        self._assets.update(static_assets())
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/enter/{ticket}", self._enter)
        app.router.add_get("/", self._index)
        app.router.add_get("/control", self._control)
        app.router.add_get("/data", self._data)
        app.router.add_get("/{path:.*}", self._asset)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(OSError), **PORT_FREES
            ):
                with attempt:
                    await self._listen(port)
        except (OSError, RetryError):
            await self._listen(0)

    async def _listen(self, port: int) -> None:
        assert self._runner is not None
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the sockets and the port."""
        self.end_page("the bridge stopped")
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        # The Host check defeats DNS rebinding, the Origin check pages of other origins.
        if request.host != self._host:
            raise web.HTTPForbidden(text="wrong host")
        if self._clock() < self._away_until:
            raise web.HTTPServiceUnavailable(text="out of reach, on purpose")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{self._host}":
            raise web.HTTPForbidden(text="wrong origin")
        # A socket carries the token itself, and gets the cookie with it: a browser whose network
        # process died has lost it.
        if not request.path.startswith("/enter/") and request.path not in _SOCKET_PATHS:
            token = request.cookies.get(_COOKIE, "")
            if not (self._token and hmac.compare_digest(token.encode(), self._token.encode())):
                raise web.HTTPForbidden(text="no token")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(_HEADERS)
        return response

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        offered, self._ticket = self._ticket, ""  # one try
        if not (
            offered and hmac.compare_digest(request.match_info["ticket"].encode(), offered.encode())
        ):
            raise web.HTTPForbidden(text="no ticket")
        response = web.Response(status=303, headers={"Location": "/", "Cache-Control": "no-store"})
        _give_cookie(response, self._token)
        return response

    async def _index(self, request: web.Request) -> web.StreamResponse:
        if self._served:
            raise web.HTTPForbidden(text="the page was served already")
        self._served = True
        config = {
            "protocol": PROTOCOL,
            "token": self._token,
            "epoch": self._epoch,
            "ortVersion": ort_version(),
            "threads": self._config.threads,
            "probe": self._config.probe,
            "faults": self._config.faults,
            "messageBytesMax": self._config.message_bytes_max,
        }
        text = index_html().replace("{{config}}", json.dumps(config))
        headers = {
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; "
            f"script-src 'self' 'wasm-unsafe-eval'; connect-src 'self' ws://{self._host}",
        }
        return web.Response(text=text, content_type="text/html", headers=headers)

    async def _asset(self, request: web.Request) -> web.StreamResponse:
        asset = self._assets.get(request.path)
        if asset is None:
            raise web.HTTPNotFound
        headers = {
            **_HEADERS,
            "Content-Type": asset.content_type,
            "Cache-Control": asset.cache_control,
        }
        if self._spoilt and request.path.startswith(MODELS):
            return await _spoilt(self._spoilt.popleft(), asset.path, headers)
        return web.FileResponse(asset.path, headers=headers)

    # -- the sockets --------------------------------------------------------------------------

    async def _control(self, request: web.Request) -> web.StreamResponse:
        return await self._serve("control", request, _CONTROL_BYTES_MAX, self._on_control)

    async def _data(self, request: web.Request) -> web.StreamResponse:
        limit = self._config.message_bytes_max + _FRAME_OVERHEAD_BYTES
        return await self._serve("data", request, limit, self._on_data)

    async def _serve(
        self,
        name: str,
        request: web.Request,
        bytes_max: int,
        on_message: Callable[[Any, int], None],
    ) -> web.StreamResponse:
        token = self._token
        offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        if len(offered) != 2 or not (
            token and hmac.compare_digest(offered[1].encode(), token.encode())
        ):
            raise web.HTTPForbidden(text="no token")
        if request.headers.get("Origin") is None:
            raise web.HTTPForbidden(text="no origin")
        # Compression would cost more than loopback does.
        socket = web.WebSocketResponse(
            protocols=(PROTOCOL,), compress=False, max_msg_size=bytes_max, timeout=1.0
        )
        _give_cookie(socket, token)
        await socket.prepare(request)
        if token != self._token:  # ended or replaced while the socket opened
            await socket.close(code=WSCloseCode.POLICY_VIOLATION)
            return socket
        if name in self._sockets:  # one page only; a second tab of it is refused
            await socket.close(code=WSCloseCode.POLICY_VIOLATION)
            return socket
        epoch = self._epoch
        self._sockets[name], self._requests[name] = socket, request
        self._tell_change()
        try:
            async for message in socket:
                if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                    on_message(message.data, epoch)
        finally:
            if self._sockets.get(name) is socket:
                del self._sockets[name], self._requests[name]
                self._fail_pending((name,), f"the page's {name} socket closed", "socket_closed")
                if epoch == self._epoch:
                    self._on_event(BridgeEvent("closed", epoch, {"socket": name}))
        return socket

    def _on_control(self, text: Any, epoch: int) -> None:
        try:
            message = json.loads(text)
            kind = str(message["kind"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self.console.append("unreadable control message")
            return
        if epoch != self._epoch:
            return  # last words of a page that has been replaced
        if kind == "pong":
            number = message.get("id")
            waiting = self._pongs.pop(number, None) if isinstance(number, int) else None
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
            return
        if kind == "visibility":
            self.visibility = str(message.get("state", ""))[:20]
        if kind == "console":
            self.console.append(str(message.get("text", ""))[:2000])
        self._on_event(BridgeEvent(kind, epoch, message))

    def _on_data(self, data: Any, epoch: int) -> None:
        try:
            frame = decode(data, bytes_max=self._config.message_bytes_max + _FRAME_OVERHEAD_BYTES)
        except (BadFrame, TypeError) as error:
            self.console.append(f"refused a frame: {error}")
            return
        if frame.epoch != self._epoch or epoch != self._epoch:
            self.console.append(f"refused a frame of epoch {frame.epoch}")
            return
        self._note("from", frame)
        self._answered(frame.op_id)
        waiting = self._pending.pop(frame.op_id, None)
        if waiting is not None and not waiting.done():  # else abandoned: its deadline passed
            waiting.set_result(frame)

    # -- what the browser actor does ----------------------------------------------------------

    def begin_epoch(self, epoch: int, host: str) -> str:
        """End the page before and expect one of `epoch`; returns the path that lets it in.

        `host` is the authority (host or host:port) under which the browser sees this server.
        """
        self.end_page("the browser was replaced")
        self._epoch, self._host = epoch, host
        self._token, self._ticket = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._served = False
        self._away_until = -math.inf
        self.visibility = ""
        self.console.clear()
        return f"/enter/{self._ticket}"

    def end_page(self, why: str) -> None:
        """Refuse the present page from now on, and fail whoever waits for it."""
        self._token = self._ticket = ""
        sockets, self._sockets, self._requests = self._sockets, {}, {}
        for socket in sockets.values():
            closing = asyncio.ensure_future(_close(socket))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._fail_pending(_SOCKETS, why)
        self._tell_change()

    def _fail_pending(self, names: tuple[str, ...], why: str, what: str = "") -> None:
        futures: list[asyncio.Future[Any]] = []
        if "data" in names:
            futures += self._pending.values()
            self._pending = {}
            self._exchanges.clear()  # the page drops what it has not begun
        if "control" in names:
            futures += self._pongs.values()
            self._pongs = {}
        facts = {"what": what} if what else {}
        for future in futures:
            if not future.done():
                future.set_exception(BrowserLost(why, **facts))
                future.exception()  # whoever waited may have gone; that is no unseen error

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether both sockets of the page are open."""
        return len(self._sockets) == len(_SOCKETS)

    async def opened(self) -> None:
        """Wait until the page's worker has its data socket open. Raises `BrowserLost`."""
        await self._open_socket_of("data")

    async def reconnected(self) -> None:
        """Wait until the page has both sockets open. Raises `BrowserLost` when it is ended."""
        while not self.connected:  # the first may close again while the second opens
            for name in _SOCKETS:
                await self._open_socket_of(name)

    async def _open_socket_of(self, name: str) -> web.WebSocketResponse:
        """The page's socket, once it is open. Raises `BrowserLost` when the page is ended."""
        token = self._token
        while token and token == self._token:
            socket = self._sockets.get(name)
            if socket is not None:
                return socket
            await self._changed.wait()
        raise BrowserLost("the page is not connected")

    # -- faults on purpose ----------------------------------------------------------------------

    def stay_away(self, seconds: float) -> None:
        """Break every connection, and answer this page nothing for so long."""
        self._away_until = self._clock() + seconds
        self.drop()

    def spoil(self, how: Sequence[str]) -> None:
        """Serve the next files of models so: "500", "half" or "wrong" (a byte of it), each once."""
        self._spoilt.extend(how)

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Say something to the page's main thread. Raises `BrowserLost`."""
        socket = self._sockets.get("control")
        if socket is None:
            raise BrowserLost("the page is not connected", what="socket_closed")
        with contextlib.suppress(ConnectionError):
            await socket.send_str(json.dumps(message))

    def drop(self, names: Iterable[str] = _SOCKETS) -> None:
        """Break connections, as a network does; the page may open them again."""
        for name in names:
            request = self._requests.get(name)
            if request is not None and request.transport is not None:
                request.transport.abort()

    def _note(self, way: str, frame: Frame) -> None:
        tensors = tuple((name, a.dtype.name, a.shape) for name, a in frame.tensors.items())
        self.frames.append(
            FrameSeen(
                time.time(),
                way,
                frame.kind,
                frame.op_id,
                frame.epoch,
                frame.step,
                frame.position,
                tensors,
            )
        )

    def _answered(self, op_id: str) -> None:
        if self._exchanges.pop(op_id, None) is not None:
            self._head_since = self._clock()

    @property
    def outstanding(self) -> int:
        """Requests that the page has not finished, abandoned ones included."""
        return len(self._exchanges)

    def overdue(self) -> tuple[float, str]:
        """In how many seconds what the page works on has taken too long, and what that is.

        0 or less: it has. Infinity and an empty name when it works on nothing.
        """
        for op_id, seconds in self._exchanges.items():  # the head is what it works on
            return seconds - (self._clock() - self._head_since), op_id
        return math.inf, ""

    async def request(self, frame: Frame, seconds_max: float = _WORK_SECONDS) -> Frame:
        """Send a frame and wait for the reply to its operation id.

        `seconds_max` is how long the page may work on it before `overdue` names it; time spent
        behind others does not count, nor does the time until a data socket that is away is open
        again. Raises `BrowserLost` when the socket closes (`what` is `socket_closed`) or the page
        is ended, and `PageError` when it reports an error.
        """
        data = encode(frame, bytes_max=self._config.message_bytes_max)
        self._note("to", frame)
        socket = await self._open_socket_of("data")
        reply: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._pending[frame.op_id] = reply
        if not self._exchanges:
            self._head_since = self._clock()
        self._exchanges[frame.op_id] = seconds_max
        try:
            await socket.send_bytes(data)
            answer = await reply
        except ConnectionError as error:
            raise BrowserLost("the page's data socket is closed", what="socket_closed") from error
        finally:
            if self._pending.get(frame.op_id) is reply:
                del self._pending[frame.op_id]
        if answer.kind == "error":
            facts = {name: fact for name, fact in answer.body.items() if name != "message"}
            raise PageError(str(answer.body.get("message", "no reason given")), **facts)
        return answer

    async def ping(self) -> None:
        """Return when the page's main thread has answered. Raises `BrowserLost`.

        Does not wait for a socket that is away: `what` is `socket_closed` then.
        """
        socket = self._sockets.get("control")
        if socket is None:
            raise BrowserLost("the page is not connected", what="socket_closed")
        number = secrets.randbits(48)
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs[number] = pong
        try:
            await socket.send_str(json.dumps({"kind": "ping", "id": number}))
            await pong
        except ConnectionError as error:
            raise BrowserLost(
                "the page's control socket is closed", what="socket_closed"
            ) from error
        finally:
            self._pongs.pop(number, None)

    def register(self, spec: ModelSpec) -> None:
        """Let the page fetch this model's files."""
        self._assets.update(model_assets(spec))

    def unregister(self, spec: ModelSpec) -> None:
        for path in model_assets(spec):
            self._assets.pop(path, None)


def _give_cookie(response: web.StreamResponse, token: str) -> None:
    response.set_cookie(_COOKIE, token, httponly=True, samesite="Strict", path="/")


async def _spoilt(how: str, path: Path, headers: Mapping[str, str]) -> web.StreamResponse:
    """A file of a model, served as it should not be."""
    if how == "500":
        raise web.HTTPInternalServerError(text="a fault on purpose")
    content = bytearray(await asyncio.to_thread(path.read_bytes))
    if how == "half":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0xFF
    return web.Response(body=bytes(content), headers=headers)


async def _close(socket: web.WebSocketResponse) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError, asyncio.TimeoutError):
        await socket.close(code=WSCloseCode.POLICY_VIOLATION)  # tells the page not to come back
