"""Classifies a closed socket of the page: the page died, or only its connection broke.

A process that ends next means that the page died; a reconnect, or a short time without either,
means a lost connection, which the page may reopen. This module must not end a browser: it reports
why the current incarnation ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

from actors.bridge import Bridge, BridgeEvent
from actors.browser.incarnation import Incarnation
from actors.browser.page import Page
from actors.browser.page_process import PageProcess
from recovery.errors import BrowserLost
from recovery.failures import Failure
from recovery.kinds import Readiness
from recovery.records import HostRef

_JUDGED_SECONDS = 0.15  # after which it is a lost connection, not a death
_SOCKET_TO_EXIT_SECONDS = 0.005  # sockets close before the process's exit is visible
_PAGE_EXIT_SECONDS = 1.0  # a page process that ended this long before a close explains it


class Outages:
    """`on_outage` is called for a connection that was lost while the page runs."""

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        process: PageProcess,
        clock: Callable[[], float],
        on_outage: Callable[[Failure], None],
    ) -> None:
        self.out_of_touch: Failure | None = None  # while an outage lasts
        self._incarnation = incarnation
        self._page = page
        self._process = process
        self._clock = clock
        self._on_outage = on_outage
        self._outage: asyncio.Task[None] | None = None  # from a close until both sockets are open
        self._page_ended = asyncio.Event()
        self._page_ended_at = -math.inf
        self._judged = asyncio.Event()  # clear while an outage is not classified yet
        self._judged.set()

    def reset(self) -> None:
        """Ignore the sockets of the current browser from now on."""
        self._page_ended_at = -math.inf
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None
        self._judged.set()

    async def judged(self, ref: HostRef) -> None:
        """Return when it is known whether a recent error was the page's death."""
        incarnation = self._incarnation
        if incarnation.ref == ref and incarnation.cause is None and self._judged.is_set():
            await asyncio.sleep(_SOCKET_TO_EXIT_SECONDS)
        await self._judged.wait()

    def note(self, event: BridgeEvent) -> None:
        """Handle an event of the bridge about the page of `event.epoch`."""
        incarnation = self._incarnation
        if event.epoch != incarnation.ref.epoch or incarnation.readiness is Readiness.DEAD:
            return
        if event.what == "device_lost":
            incarnation.lost(
                incarnation.ref,
                "device_lost",
                "the page lost its GPU device",
                device_lost=event.facts,
            )
        starting = incarnation.readiness is Readiness.STARTING
        closed = event.what in ("closed", "data_closed")
        if event.what == "worker_failed" or (closed and starting):
            self._gone_soon(incarnation.ref, event)
        elif closed and (self._outage is None or self._outage.done()):
            self._judged = asyncio.Event()
            self._outage = asyncio.create_task(
                self._classify(incarnation.ref, event, self._judged), name="outage"
            )

    def page_process_ended(self, ref: HostRef, pid: int) -> None:
        """A page process ended. It may be a spare one: unless it is known to serve the page, that
        counts as the page's end only during an outage.
        """
        if ref != self._incarnation.ref:
            return
        self._process.forget(pid)
        if pid == self._process.pid:
            # Its last messages may still be unread, and contain the cause.
            self._gone_soon(ref, BridgeEvent("process_ended", ref.epoch))
            return
        if self._process.pid:
            return  # a spare process, unrelated to the page
        self._page_ended_at = self._clock()
        self._page_ended.set()
        if self._judged.is_set() and self._outage is not None and not self._outage.done():
            self._gone(ref, BridgeEvent("closed", ref.epoch))

    def _gone_soon(self, ref: HostRef, event: BridgeEvent) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(_SOCKET_TO_EXIT_SECONDS, self._gone, ref, event)

    def _gone(self, ref: HostRef, event: BridgeEvent) -> None:
        message = f"the page ended ({event.what})"
        self._incarnation.lost(ref, "page_closed", message, page=dict(event.facts))

    async def _classify(self, ref: HostRef, event: BridgeEvent, judged: asyncio.Event) -> None:
        """Classify and report an outage. Runs until both sockets are open, or the page is ended."""
        bridge = self._page.bridge
        try:
            await self._either_back_or_dead(bridge)
            if self._page_ended_lately():
                self._gone(ref, event)
                return
            what = f"the page's {event.facts.get('socket', 'data')} socket closed"
            failure = self._incarnation.failure(
                what, "socket_closed", "", ref, page=dict(event.facts)
            )
            self._on_outage(failure)
            self.out_of_touch = failure
        finally:
            judged.set()
        try:
            with contextlib.suppress(BrowserLost):
                await bridge.reconnected()
        finally:
            self.out_of_touch = None

    async def _either_back_or_dead(self, bridge: Bridge) -> None:
        """Wait until an outage can be classified: the page reconnected, or a process ended.

        A large process that is killed closes its sockets up to 0.1 s before its end is visible.
        The end of browser or driver cancels the outage, and with it this wait.
        """
        if self._page_ended_lately():
            return
        self._page_ended.clear()
        ways = {
            asyncio.ensure_future(bridge.reconnected()),
            asyncio.ensure_future(self._page_ended.wait()),
        }
        try:
            await asyncio.wait(ways, timeout=_JUDGED_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def _page_ended_lately(self) -> bool:
        return self._clock() - self._page_ended_at < _PAGE_EXIT_SECONDS


async def answers(bridge: Bridge, again_seconds: float = _SOCKET_TO_EXIT_SECONDS) -> None:
    """Return when both sockets of the page are open and a ping was answered."""
    while True:
        await bridge.reconnected()
        try:
            await bridge.ping()
        except BrowserLost as error:
            if error.fields.get("what") != "socket_closed":
                raise
            await asyncio.sleep(again_seconds)  # it closed again
        else:
            return
