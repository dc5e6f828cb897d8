"""Requests to the page of the current incarnation.

It numbers requests and adds the incarnation's epoch; the bridge does the rest. This module must
not interpret requests, nor classify the end of a page.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from actors.bridge import Bridge, BridgeEvent, PageConfig
from actors.browser.incarnation import Incarnation
from actors.driver.arguments import Gpu
from actors.messages import HostConfig
from recovery.errors import BrowserLost
from sharding.models.frames import Frame

_ENDED = "the browser has ended"


class Page:
    """`on_event` is called with the bridge's events: sockets, a lost device."""

    def __init__(
        self,
        incarnation: Incarnation,
        config: HostConfig,
        on_event: Callable[[BridgeEvent], None],
    ) -> None:
        self._incarnation = incarnation
        self._config = config
        self._on_event = on_event
        self._bridge: Bridge | None = None
        self._requests = 0

    async def serve(self, port: int, listener: socket.socket | None = None) -> Bridge:
        """The server of this slot, listening on `listener`, of the browser's private network.

        Without one, it listens on `port` of the shared loopback, which survives restarts.
        """
        if self._bridge is None:
            bridge = Bridge(
                PageConfig(
                    self._config.threads,
                    self._config.message_bytes_max,
                    probe=self._config.gpu is not Gpu.OFF,
                    faults=self._config.faults,
                ),
                self._on_event,
            )
            self._bridge = bridge
        if listener is not None:
            await self._bridge.listen(listener)
        elif not self._bridge.port:
            await self._bridge.start(port)
        return self._bridge

    @property
    def bridge(self) -> Bridge:
        """Raises `BrowserLost` if nothing was launched yet, or the host is stopped."""
        if self._bridge is None:
            raise BrowserLost(f"{self._incarnation.ref} was never launched, or is stopped")
        return self._bridge

    @property
    def served(self) -> Bridge | None:
        return self._bridge

    @property
    def connected(self) -> bool:
        return self._bridge is not None and self._bridge.connected

    @property
    def outstanding(self) -> int:
        """The number of unanswered requests, abandoned operations included."""
        return self._bridge.outstanding if self._bridge else 0

    @property
    def working_on(self) -> str:
        """The model that the page works on, or worked on when it ended, if any."""
        return self._bridge.working_on if self._bridge else ""

    @property
    def console(self) -> tuple[str, ...]:
        return tuple(self._bridge.console) if self._bridge else ()

    def numbered(self, kind: str) -> str:
        """A unique name for one request."""
        self._requests += 1
        return f"{kind}:{self._requests}"

    async def request(self, frame: Frame) -> Frame:
        """The page's answer. It is overdue after `hang_seconds` of work on it."""
        return await self.bridge.request(frame, self._config.hang_seconds)

    async def ask(
        self,
        kind: str,
        body: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Frame:
        """Send the worker a request other than an operation, such as load, warm or info."""
        epoch = self._incarnation.ref.epoch
        frame = Frame(kind, self.numbered(kind), epoch, body=body, tensors=tensors or {})
        return await self.bridge.request(frame, self._config.load_seconds)

    def end(self) -> None:
        """Fail all pending requests."""
        if self._bridge is not None:
            self._bridge.end_page(_ENDED)

    async def stop(self) -> None:
        if self._bridge is not None:
            await self._bridge.stop()
            self._bridge = None
