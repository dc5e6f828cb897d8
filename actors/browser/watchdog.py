"""Detects a hung page: its main thread must answer pings, its worker must finish operations.

The main thread never computes, so a missing pong means that it hangs; a busy worker is hung when
one operation exceeds its time limit. An idle worker is pinged. This module must not restart a hung
page: it reports the incarnation as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from actors.bridge import Bridge
from actors.browser.incarnation import Incarnation
from actors.browser.page import Page
from actors.messages import HostConfig
from recovery.errors import BrowserError, PoolError
from recovery.records import HostRef
from sharding.models.frames import Frame

_SECONDS_MAX = 0.5
_SECONDS_MIN = 0.01


class Watchdog:
    """Watches the page of one incarnation at a time."""

    def __init__(self, incarnation: Incarnation, page: Page, config: HostConfig) -> None:
        self._incarnation = incarnation
        self._page = page
        self._config = config
        self._task: asyncio.Task[None] | None = None
        self._pings: set[asyncio.Task[None]] = set()

    def start(self, ref: HostRef) -> None:
        self._task = asyncio.create_task(self._watch(ref), name="watchdog")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _watch(self, ref: HostRef) -> None:
        ping: asyncio.Task[None] | None = None
        pause = min(self._config.ping_interval_seconds, _SECONDS_MAX)
        bridge = self._page.bridge
        while self._incarnation.is_present(ref):
            await asyncio.sleep(max(min(pause, bridge.overdue()[0]), _SECONDS_MIN))
            left, what = bridge.overdue()
            if left <= 0:
                stuck = f"the worker is stuck in {what.split(':')[0]}"
                self._incarnation.lost(ref, "page_hung", stuck)
            if ping is None or ping.done():
                ping = self._pinging(self._ping(ref, bridge))
            if not bridge.outstanding:
                self._pinging(self._ping_worker(bridge))

    def _pinging(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="ping")
        self._pings.add(task)
        task.add_done_callback(self._pings.discard)
        return task

    async def _ping_worker(self, bridge: Bridge) -> None:
        """Ping an idle worker: if it hangs, the ping becomes overdue."""
        with contextlib.suppress(PoolError):
            frame = Frame("ping", self._page.numbered("ping"), self._incarnation.ref.epoch)
            await bridge.request(frame, self._config.hang_seconds)

    async def _ping(self, ref: HostRef, bridge: Bridge) -> None:
        limit = self._config.ping_seconds
        try:
            async with asyncio.timeout(limit):
                await bridge.ping()
        except TimeoutError:
            silent = f"the main thread did not answer a ping for {limit:g} s"
            self._incarnation.lost(ref, "page_hung", silent)
        except BrowserError:
            pass  # the closed socket is handled elsewhere
