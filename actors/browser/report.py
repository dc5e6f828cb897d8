"""Reports of a host: status for clients, state for its supervisor, diagnostics.

This module must not change anything; it caches the last memory measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import psutil

from actors.browser.breakers import HostBreakers
from actors.browser.events import HostEvents
from actors.browser.incarnation import Incarnation
from actors.browser.lease import Lease
from actors.browser.models import LoadedModels
from actors.browser.page import Page
from actors.browser.process import BrowserProcess
from actors.browser.serve import OperationServer
from actors.browser.watch import Watch
from actors.driver.engines import ENGINES
from actors.messages import HostConfig, HostReport, PageDiagnostics, Usage
from recovery.errors import BrowserLost
from recovery.kinds import Readiness
from recovery.records import HostStatus
from recovery.resources import BrowserLoad, NodeLoad

_SCREENSHOT_SECONDS = 3.0


class HostReports:
    """Reads the parts of one host."""

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        process: BrowserProcess,
        models: LoadedModels,
        breakers: HostBreakers,
        events: HostEvents,
        lease: Lease,
        watch: Watch,
        config: HostConfig,
        clock: Callable[[], float],
        node: str,
    ) -> None:
        self._incarnation = incarnation
        self._page = page
        self._process = process
        self._models = models
        self._breakers = breakers
        self._events = events
        self._lease = lease
        self._watch = watch
        self._config = config
        self._clock = clock
        self._node = node
        self._memory_bytes = 0
        self._served_before = 0  # by earlier incarnations

    def begin(self, served: int) -> None:
        """Another incarnation begins; `served` operations were answered before it."""
        self._served_before = served

    def retired(self) -> None:
        """No browser runs, so it takes no memory."""
        self._memory_bytes = 0

    def status(self, server: OperationServer) -> HostStatus:
        incarnation = self._incarnation
        return HostStatus(
            incarnation.ref,
            incarnation.kind,
            incarnation.readiness,
            queue=server.queued(),
            queue_max=self._config.queue_max,
            models=dict(self._models.numeric),
            served=server.served,
            term=self._lease.term,
            blocked=self._breakers.blocked(),
            memory_bytes=self._memory_bytes,
        )

    def usage(self, server: OperationServer) -> Usage:
        """Age, use and last measured memory of the browser, and memory of the machine."""
        incarnation, now, memory = self._incarnation, self._clock(), psutil.virtual_memory()
        used = max(server.used_at, incarnation.ready_at)
        return Usage(
            BrowserLoad(
                incarnation.ref.browser_id,
                incarnation.ref.epoch,
                self._node,
                age_seconds=now - incarnation.ready_at,
                served=server.served - self._served_before,
                memory_bytes=self._memory_bytes,
                queue=server.queued(),
                idle_seconds=now - used,
                ready=incarnation.readiness is Readiness.READY,
                kind=str(incarnation.kind),
                models=self._models.idle_seconds(used),
            ),
            NodeLoad(self._node, memory.total, memory.available),
        )

    async def memory_bytes(self) -> int:
        """Resident bytes of the browser's whole process tree; `status` has the latest, too."""
        ref = self._incarnation.ref
        found = await self._process.memory_bytes()
        if ref == self._incarnation.ref:
            self._memory_bytes = found
        return found

    def hello(self) -> HostReport:
        """The state of this host, for a supervisor at the start of its term. Keeps the events."""
        incarnation = self._incarnation
        return HostReport(
            incarnation.ref,
            incarnation.readiness,
            seq=self._events.seq,
            launch=incarnation.report,
            models=dict(self._models.numeric),
            digests={name: spec.digest for name, spec in self._models.specs.items()},
            cause=incarnation.cause or self._watch.out_of_touch,
            breakers=self._breakers.snapshots(),
        )

    async def diagnose(self, *, screenshot: bool) -> PageDiagnostics:
        """Diagnostics of the current page, or the last one."""
        incarnation, bridge, session = self._incarnation, self._page.served, self._process.session
        picture = b""
        seen = screenshot and ENGINES[incarnation.kind].takes_screenshots
        if seen and session is not None and incarnation.readiness is not Readiness.DEAD:
            with contextlib.suppress(BrowserLost, TimeoutError):
                async with asyncio.timeout(_SCREENSHOT_SECONDS):
                    picture = await session.screenshot()
        return PageDiagnostics(
            incarnation.ref,
            incarnation.readiness,
            bridge.visibility if bridge else "",
            self._page.console,
            tuple(bridge.frames) if bridge else (),
            incarnation.cause or self._watch.out_of_touch,
            picture,
        )
