"""Messages with the page's main thread over its socket: pings, console, visibility.

Separate from the worker's socket, so that a page whose worker is busy still answers pings. This
module must not act on messages: it reports them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from actors.bridge.records import BridgeEvent
from actors.bridge.sockets import Sockets, fail_waiting
from recovery.errors import BrowserLost

BYTES_MAX = 64 * 1024  # of a message from the page
_CONSOLE_LINES_MAX = 100


class Control:
    """The control connection to a page's main thread."""

    def __init__(self, sockets: Sockets, on_event: Callable[[BridgeEvent], None]) -> None:
        self._sockets = sockets
        self._on_event = on_event
        self._pongs: dict[int, asyncio.Future[None]] = {}
        self.console: deque[str] = deque(maxlen=_CONSOLE_LINES_MAX)
        self.visibility = ""  # last reported by the page

    def begin(self) -> None:
        """Reset for a new page."""
        self.visibility = ""
        self.console.clear()

    def hear(self, text: Any, epoch: int, epoch_now: int) -> None:
        """Handle a message from a page of `epoch`, while that of `epoch_now` is expected."""
        try:
            message = json.loads(text)
            kind = str(message["kind"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self.console.append("unreadable control message")
            return
        if epoch != epoch_now:
            return  # from a page that has been replaced
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

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message to the page's main thread. Raises `BrowserLost`."""
        socket = self._sockets.get("control")
        with contextlib.suppress(ConnectionError):
            await socket.send_str(json.dumps(message))

    async def ping(self) -> None:
        """Return when the page's main thread has answered. Raises `BrowserLost`.

        Does not wait for a closed socket: `what` is `socket_closed` then.
        """
        socket = self._sockets.get("control")
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

    def fail(self, why: str, what: str = "") -> None:
        """The socket is closed: fail all pending pings."""
        waiting, self._pongs = self._pongs, {}
        fail_waiting(waiting.values(), why, what)
