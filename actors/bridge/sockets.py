"""The two sockets of a page: `control` of its main thread, `data` of its worker.

A closed socket does not end the page: it reconnects with the same token, until `end`. This module
must not interpret messages.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from actors.bridge.admission import Admission
from actors.bridge.records import PROTOCOL
from recovery.errors import BrowserLost

SOCKETS = ("control", "data")


class Sockets:
    """The open sockets of the page that `admission` admits.

    `on_closed` is called with the name and the page's epoch of each that the page closes.
    """

    def __init__(self, admission: Admission, on_closed: Callable[[str, int], None]) -> None:
        self._admission = admission
        self._on_closed = on_closed
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._requests: dict[str, web.Request] = {}  # that each socket came from
        self._changed = asyncio.Event()  # set, and replaced, when a socket opens or the page ends
        self._closing: set[asyncio.Future[None]] = set()

    async def serve(
        self,
        name: str,
        request: web.Request,
        bytes_max: int,
        on_message: Callable[[Any, int], None],
    ) -> web.StreamResponse:
        """Serve a socket of the page; `on_message` gets each message and the page's epoch."""
        token = self._admission.check_socket(request)
        # Compression would cost more than loopback does.
        socket = web.WebSocketResponse(
            protocols=(PROTOCOL,), compress=False, max_msg_size=bytes_max, timeout=1.0
        )
        self._admission.give_cookie(socket)
        await socket.prepare(request)
        if token != self._admission.token:  # ended or replaced while the socket opened
            await socket.close(code=WSCloseCode.POLICY_VIOLATION)
            return socket
        if name in self._sockets:  # one page only; a second tab of it is refused
            await socket.close(code=WSCloseCode.POLICY_VIOLATION)
            return socket
        epoch = self._admission.epoch
        self._sockets[name], self._requests[name] = socket, request
        self._notify()
        try:
            async for message in socket:
                if message.type in (WSMsgType.BINARY, WSMsgType.TEXT):
                    on_message(message.data, epoch)
        finally:
            if self._sockets.get(name) is socket:
                del self._sockets[name], self._requests[name]
                self._on_closed(name, epoch)
        return socket

    def get(self, name: str) -> web.WebSocketResponse:
        """The page's socket. Raises `BrowserLost` while it is not open."""
        socket = self._sockets.get(name)
        if socket is None:
            raise BrowserLost("the page is not connected", what="socket_closed")
        return socket

    async def opened(self, name: str) -> web.WebSocketResponse:
        """The page's socket, once it is open. Raises `BrowserLost` when the page is ended."""
        token = self._admission.token
        while token and token == self._admission.token:
            socket = self._sockets.get(name)
            if socket is not None:
                return socket
            await self._changed.wait()
        raise BrowserLost("the page is not connected")

    @property
    def connected(self) -> bool:
        """Whether both sockets of the page are open."""
        return len(self._sockets) == len(SOCKETS)

    async def reconnected(self) -> None:
        """Wait until the page has both sockets open. Raises `BrowserLost` when it is ended."""
        while not self.connected:  # the first may close again while the second opens
            for name in SOCKETS:
                await self.opened(name)

    def drop(self, names: Iterable[str] = SOCKETS) -> None:
        """Break connections, as a network does; the page may reopen them."""
        for name in names:
            request = self._requests.get(name)
            if request is not None and request.transport is not None:
                request.transport.abort()

    def end(self) -> None:
        """Close the sockets, and tell the page not to reconnect."""
        sockets, self._sockets, self._requests = self._sockets, {}, {}
        for socket in sockets.values():
            closing = asyncio.ensure_future(_close(socket))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def fail_waiting(futures: Iterable[asyncio.Future[Any]], why: str, what: str = "") -> None:
    """Fail pending replies of a closed socket with `BrowserLost`."""
    facts = {"what": what} if what else {}
    for future in futures:
        if not future.done():
            future.set_exception(BrowserLost(why, **facts))
            future.exception()  # the waiter may be gone: mark the error as retrieved


async def _close(socket: web.WebSocketResponse) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError, asyncio.TimeoutError):
        await socket.close(code=WSCloseCode.POLICY_VIOLATION)  # tells the page not to reconnect
