"""Monitors the current browser: its processes, its page's sockets, its page's progress.

Each of the three has a module of its own; this one starts and stops them together.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import partial

from actors.bridge import BridgeEvent
from actors.browser.incarnation import Incarnation
from actors.browser.outages import Outages
from actors.browser.page import Page
from actors.browser.page_process import PageProcess
from actors.browser.process import BrowserProcess
from actors.browser.watchdog import Watchdog
from actors.driver.death_watch import DeathWatch
from actors.messages import HostConfig
from recovery.failures import Failure
from recovery.records import HostRef


class Watch:
    """Detects when the current incarnation is lost; calls `on_outage` if only its page's connection
    is."""

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        page_process: PageProcess,
        config: HostConfig,
        clock: Callable[[], float],
        on_outage: Callable[[Failure], None],
    ) -> None:
        self._incarnation = incarnation
        self._page_process = page_process
        self._deaths = DeathWatch()
        self._watchdog = Watchdog(incarnation, page, config)
        self._outages = Outages(incarnation, page, page_process, clock, on_outage)

    @property
    def out_of_touch(self) -> Failure | None:
        """Why the page is disconnected, while it still runs."""
        return self._outages.out_of_touch

    def process(self, pid: int, on_death: Callable[[], None]) -> None:
        self._deaths.add(pid, on_death)

    def page_event(self, event: BridgeEvent) -> None:
        self._outages.note(event)

    async def judged(self, ref: HostRef) -> None:
        """Return when it is known whether a recent error was the page's death."""
        await self._outages.judged(ref)

    async def page(self, ref: HostRef, process: BrowserProcess) -> None:
        """Watch the processes that may serve the page."""
        if sys.platform != "linux":
            return  # elsewhere each watch costs a thread: rely on failed reconnects
        pids = await asyncio.to_thread(process.page_pids)
        if self._incarnation.is_present(ref):
            self._page_process.candidates = tuple(pids)
            for pid in pids:
                self._deaths.add(pid, partial(self._outages.page_process_ended, ref, pid))

    def work(self, ref: HostRef) -> None:
        """Start checking that the page makes progress."""
        self._watchdog.start(ref)

    def reset(self) -> None:
        """Ignore the current browser from now on: it causes no more events."""
        self._deaths.close()
        self._page_process.reset()
        self._outages.reset()
        self._watchdog.stop()
