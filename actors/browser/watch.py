"""How the present browser is watched: its processes, its page's sockets, its page's work.

Each of the three has a module of its own; here they begin and end together.
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
    """Says of the present incarnation when it is lost, and `on_outage` when only its page is."""

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
        """Why the page has no connection now, if it lives without."""
        return self._outages.out_of_touch

    def process(self, pid: int, on_death: Callable[[], None]) -> None:
        self._deaths.add(pid, on_death)

    def page_event(self, event: BridgeEvent) -> None:
        self._outages.note(event)

    async def judged(self, ref: HostRef) -> None:
        """Return when it is known whether an error of a moment ago was the page's death."""
        await self._outages.judged(ref)

    async def page(self, ref: HostRef, process: BrowserProcess) -> None:
        """Notice when a process ends that may be the page's. Whether it was, its sockets tell."""
        if sys.platform != "linux":
            return  # elsewhere each watch costs a thread: there a reconnect that fails must do
        pids = await asyncio.to_thread(process.page_pids)
        if self._incarnation.is_present(ref):
            self._page_process.candidates = tuple(pids)
            for pid in pids:
                self._deaths.add(pid, partial(self._outages.page_process_ended, ref, pid))

    def work(self, ref: HostRef) -> None:
        """See from now on that the page works."""
        self._watchdog.start(ref)

    def reset(self) -> None:
        """Take no more notice of the present browser: what it does now is no event."""
        self._deaths.close()
        self._page_process.reset()
        self._outages.reset()
        self._watchdog.stop()
