"""The page of the present incarnation, as the parts of a host ask it.

It numbers what is asked and gives it the incarnation's epoch; the bridge does the rest. This
module must not know what is asked, nor judge a page that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from actors.bridge import Bridge, BridgeEvent, PageConfig
from actors.browser.incarnation import Incarnation
from actors.driver.arguments import Gpu
from actors.messages import HostConfig
from recovery.errors import BrowserLost
from sharding.models.frames import Frame

_NOBODY = "the browser is gone"


class Page:
    """`on_event` hears what the bridge notices of the page: sockets, a lost device."""

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
        self._asked = 0

    async def serve(self, port: int) -> Bridge:
        """The server of this slot, started if it is not yet: its port survives restarts."""
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
            await bridge.start(port)
            self._bridge = bridge
        return self._bridge

    @property
    def bridge(self) -> Bridge:
        """Raises `BrowserLost` if nothing was ever launched here, or all is stopped."""
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
        """What the page was asked and has not answered, abandoned operations among it."""
        return self._bridge.outstanding if self._bridge else 0

    @property
    def console(self) -> tuple[str, ...]:
        return tuple(self._bridge.console) if self._bridge else ()

    def numbered(self, kind: str) -> str:
        """A name for one request that no other has."""
        self._asked += 1
        return f"{kind}:{self._asked}"

    async def request(self, frame: Frame) -> Frame:
        """The page's answer. One that is at it for longer than `hang_seconds` is overdue."""
        return await self.bridge.request(frame, self._config.hang_seconds)

    async def ask(
        self,
        kind: str,
        body: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Frame:
        """Ask the worker for what is no operation: to load, to warm up, to tell of itself."""
        epoch = self._incarnation.ref.epoch
        frame = Frame(kind, self.numbered(kind), epoch, body=body, tensors=tensors or {})
        return await self.bridge.request(frame, self._config.load_seconds)

    def end(self) -> None:
        """Whatever the page is still asked has no answer any more."""
        if self._bridge is not None:
            self._bridge.end_page(_NOBODY)

    async def stop(self) -> None:
        if self._bridge is not None:
            await self._bridge.stop()
            self._bridge = None
