"""The bridge between a browser host and its page: a server and two sockets.

`data` is the worker's socket (frames), `control` the main thread's (ping, console, visibility), so
that a busy worker still answers pings. This module must not launch browsers or judge failures: it
reports events through `on_event`.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from aiohttp import web

from actors.bridge.admission import Admission
from actors.bridge.control import BYTES_MAX, Control
from actors.bridge.exchanges import WORK_SECONDS, Exchanges
from actors.bridge.files import Files
from actors.bridge.records import BridgeEvent, FrameSeen, PageConfig
from actors.bridge.server import Server
from actors.bridge.sockets import SOCKETS, Sockets
from sharding.models.frames import Frame
from sharding.models.signature import ModelSpec


class Bridge:
    """Serves one page at a time; a new epoch ends the previous page."""

    def __init__(
        self,
        config: PageConfig,
        on_event: Callable[[BridgeEvent], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_event = on_event
        self._admission = Admission(frozenset(f"/{name}" for name in SOCKETS), clock)
        self._files = Files()
        self._sockets = Sockets(self._admission, self._closed)
        self._control = Control(self._sockets, on_event)
        self._exchanges = Exchanges(
            config.message_bytes_max, self._sockets, self._control.console.append, clock
        )
        self._server = Server(
            config,
            self._admission,
            self._files,
            {"/control": self._serve_control, "/data": self._serve_data},
        )

    # -- the server ------------------------------------------------------------------------------

    async def start(self, port: int = 0) -> None:
        """Listen on `port` of loopback (0: any; also when `port` stays taken)."""
        await self._server.start(port)

    async def listen(self, listener: socket.socket) -> None:
        """Listen on a socket of a private network, instead of any other."""
        await self._server.listen(listener)

    async def stop(self) -> None:
        """Close the sockets and the port."""
        self.end_page("the bridge stopped")
        await self._server.stop()

    @property
    def port(self) -> int:
        """The port on the shared loopback; 0 if it does not listen there."""
        return self._server.port

    def register(self, spec: ModelSpec) -> None:
        """Let the page fetch this model's files."""
        self._files.register(spec)

    def unregister(self, spec: ModelSpec) -> None:
        self._files.unregister(spec)

    # -- the page --------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, host: str) -> str:
        """End the previous page and expect one of `epoch`; returns its entry path.

        `host` is the authority (host or host:port) under which the browser sees this server.
        """
        self.end_page("the browser was replaced")
        path = self._admission.begin(epoch, host)
        self._control.begin()
        self._exchanges.begin()
        return path

    def end_page(self, why: str) -> None:
        """Refuse the current page from now on, and fail its pending requests."""
        self._admission.end()
        self._sockets.end()
        self._exchanges.fail(why)
        self._control.fail(why)

    @property
    def connected(self) -> bool:
        """Whether both sockets of the page are open."""
        return self._sockets.connected

    async def opened(self) -> None:
        """Wait until the page's worker has its data socket open. Raises `BrowserLost`."""
        await self._sockets.opened("data")

    async def reconnected(self) -> None:
        """Wait until the page has both sockets open. Raises `BrowserLost` when it is ended."""
        await self._sockets.reconnected()

    async def _serve_control(self, request: web.Request) -> web.StreamResponse:
        def hear(text: Any, epoch: int) -> None:
            self._control.hear(text, epoch, self._admission.epoch)

        return await self._sockets.serve("control", request, BYTES_MAX, hear)

    async def _serve_data(self, request: web.Request) -> web.StreamResponse:
        def hear(data: Any, epoch: int) -> None:
            self._exchanges.hear(data, epoch, self._admission.epoch)

        limit = self._exchanges.reply_bytes_max
        return await self._sockets.serve("data", request, limit, hear)

    def _closed(self, name: str, epoch: int) -> None:
        """A socket of the page was closed by the page, or dropped."""
        part = self._exchanges if name == "data" else self._control
        part.fail(f"the page's {name} socket closed", "socket_closed")
        if epoch == self._admission.epoch:
            self._on_event(BridgeEvent("closed", epoch, {"socket": name}))

    # -- messages --------------------------------------------------------------------------------

    async def request(self, frame: Frame, seconds_max: float = WORK_SECONDS) -> Frame:
        """Send a frame and wait for the reply to its operation id; see `Exchanges.request`."""
        return await self._exchanges.request(frame, seconds_max)

    @property
    def outstanding(self) -> int:
        """Requests that the page has not finished, abandoned ones included."""
        return self._exchanges.outstanding

    def overdue(self) -> tuple[float, str]:
        """Seconds until the page's current request is overdue, and its operation id.

        0 or less: it is overdue. Infinity and an empty name when the page is idle.
        """
        return self._exchanges.overdue()

    @property
    def working_on(self) -> str:
        """The model that the page works on, or worked on at its end; see `Exchanges.working_on`."""
        return self._exchanges.working_on

    @property
    def frames(self) -> deque[FrameSeen]:
        """The headers of the last frames, in both directions."""
        return self._exchanges.frames

    async def ping(self) -> None:
        """Return when the page's main thread has answered. Raises `BrowserLost`.

        Does not wait for a closed socket: `what` is `socket_closed` then.
        """
        await self._control.ping()

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message to the page's main thread. Raises `BrowserLost`."""
        await self._control.tell(message)

    @property
    def console(self) -> deque[str]:
        """The page's console, and notes on its messages that were refused."""
        return self._control.console

    @property
    def visibility(self) -> str:
        """The page's last reported visibility."""
        return self._control.visibility

    # -- fault injection -------------------------------------------------------------------------

    def stay_away(self, seconds: float) -> None:
        """Break all connections, and refuse all requests of this page for `seconds`."""
        self._admission.stay_away(seconds)
        self.drop()

    def spoil(self, how: Sequence[str]) -> None:
        """Serve the next model files with a fault each: "500", "half", or "wrong" (one byte)."""
        self._files.spoil(how)

    def drop(self, names: Iterable[str] = SOCKETS) -> None:
        """Break connections, as a network does; the page may reopen them."""
        self._sockets.drop(names)
