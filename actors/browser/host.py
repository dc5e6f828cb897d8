"""One browser: puts together the parts that launch, monitor, serve and report it.

A plain class, wrapped as a Ray actor in `actors.ray.workers`. The parts share one `Incarnation`,
the record of which browser is current and why it ended. This module must not decide how to recover
from a failure: the supervisor does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from actors.browser.breakers import HostBreakers
from actors.browser.events import HostEvents
from actors.browser.incarnation import Incarnation
from actors.browser.launch import Launcher
from actors.browser.lease import Lease
from actors.browser.models import LoadedModels
from actors.browser.outages import answers
from actors.browser.page import Page
from actors.browser.page_process import PageProcess
from actors.browser.prober import Prober
from actors.browser.process import BrowserProcess
from actors.browser.report import HostReports
from actors.browser.serve import OperationServer
from actors.browser.startup import Startup
from actors.browser.watch import Watch
from actors.dataplane import DataServer
from actors.injection.injector import BrowserFailureInjector
from actors.injection.target import InjectionTarget
from actors.messages import (
    HostConfig,
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    PageDiagnostics,
    RunReply,
    RunRequest,
    Usage,
)
from recovery.breaker import BreakerKey, BreakerSwitch, CircuitState
from recovery.errors import BrowserLost
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.kinds import Backend, BrowserType, Readiness
from recovery.records import HostRef, HostStatus, NumericId
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec


class BrowserHost:
    """A slot of the pool, with all its incarnations in this process."""

    def __init__(
        self,
        browser_id: str,
        kind: BrowserType,
        config: HostConfig,
        on_lease_lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        node: str = "",
    ) -> None:
        self._config = config
        self._node = node
        self._on_lease_lost = on_lease_lost
        self._data = DataServer(self.run, config.message_bytes_max)
        self._injector = BrowserFailureInjector(config.faults, wall)
        self._events = HostEvents()
        self._lease = Lease(config.lease_seconds, clock, self._lease_over)
        self._incarnation = incarnation = Incarnation(
            browser_id, kind, clock, wall, on_end=self._ended, context=self._context
        )
        self._breakers = breakers = HostBreakers(
            browser_id,
            config.breaker,
            lambda moved: self._events.put(incarnation.ref, breakers=moved),
            clock,
            wall,
            model_config=config.model_breaker,
            limits=config.circuits,
        )
        page_process = PageProcess(clock)
        self.page = page = Page(incarnation, config, lambda event: self._watch.page_event(event))
        self._watch = Watch(incarnation, page, page_process, config, clock, self._out_of_touch)
        self.process = BrowserProcess(
            incarnation, self._injector, self._watch.process, config.private_network
        )
        self._models = models = LoadedModels(
            incarnation, page, page_process, breakers, self._injector, config, clock
        )
        self._prober = Prober(
            incarnation, page, models, config.probe_seconds, lambda for_: self._server.idle(for_)
        )
        self._server = OperationServer(
            incarnation,
            page,
            models,
            breakers,
            config,
            clock,
            judged=self._watch.judged,
            probe=self._prober.probe,
            on_used=page_process.worked,
            status=self.status,
        )
        self._reports = HostReports(
            incarnation,
            page,
            self.process,
            models,
            breakers,
            self._events,
            self._lease,
            self._watch,
            config,
            clock,
            node,
        )
        self._startup = Startup(
            incarnation,
            page,
            self.process,
            config,
            clock,
            forget=self._forget,
            watch_page=lambda ref: self._watch.page(ref, self.process),
        )
        self._launcher = Launcher(
            incarnation,
            config.launch_seconds,
            work=self._launch,
            retire=self._retire,
            on_begin=self._launch_begins,
            console=lambda: page.console,
        )

    # -- launching --------------------------------------------------------------------------------

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        """Launch the incarnation `order.ref`, and end the previous one.

        The launch continues if this call is cancelled. Repeating the order joins the launch, or
        returns its result. Raises `StaleTerm`, `SetupError` (something is not installed),
        `LaunchFailed`, or `BrowserLost` if the incarnation was launched and has ended.
        """
        self._lease.accept(order.term)
        return await self._launcher.launch(order)

    def _launch_begins(self, order: LaunchOrder, first: bool) -> None:
        self._models.begin(warm=order.warm)
        self._reports.begin(self._server.served)
        if first:  # else this worker's own breakers are more recent
            self._breakers.restore(order.breakers)
            if order.death is not None:
                self._breakers.observe(order.death)
        if order.repair:
            self._breakers.repaired(order.repair)

    async def _launch(self, order: LaunchOrder) -> LaunchReport:
        profile, seconds = await self._startup.run(order)
        if not self._data.address:
            await self._data.start()
        self._watch.work(order.ref)
        self._prober.start(order.ref)
        facts, session = self._incarnation.facts, self.process.session
        assert facts is not None
        return LaunchReport(
            facts,
            self.page.bridge.port,
            seconds,
            dict(self.process.pids),
            profile,
            self._node,
            self._data.address,
            self._data.token,
            session.driver_url if session else "",
            session.id if session else "",
        )

    # -- the end of a browser ---------------------------------------------------------------------

    def _context(self) -> Mapping[str, Any]:
        """Context for a failure of the whole browser: the console and the running model."""
        model = self.page.working_on
        return {"console": self.page.console, **(self._models.facts_of(model) if model else {})}

    def _out_of_touch(self, failure: Failure) -> None:
        """The page is disconnected, but runs."""
        self._breakers.observe(failure)
        self._events.put(failure.ref or self._incarnation.ref, failure=failure)

    def _ended(self, failure: Failure) -> None:
        """The current incarnation has ended: report it once to the supervisor."""
        if self._incarnation.readiness is not Readiness.STARTING:  # else `launch` reports it
            self._breakers.observe(failure)  # once, not for each interrupted operation
            self._events.put(self._incarnation.ref, failure=failure)
        self._retire()

    def _retire(self) -> None:
        """Stop using the current browser and end it in the background. Does not wait."""
        self._incarnation.retire()
        self._reports.retired()
        self._launcher.cancel()
        detached = self.process.detach()
        self._forget()
        self.process.end(detached)

    def _forget(self) -> None:
        """Ignore the current browser from now on: it causes no more events."""
        self._watch.reset()
        self._prober.stop()
        self.page.end()

    async def stop(self) -> None:
        """End the browser and everything that belongs to it; returns when all has ended.

        The lease keeps running: a worker that is not killed ends itself.
        """
        self._retire()
        await self._launcher.settled()
        await self._data.stop()
        await self.page.stop()
        await self.process.all_ended()

    async def _lease_over(self) -> None:
        await self.stop()
        self._on_lease_lost()

    # -- models and operations --------------------------------------------------------------------

    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None = None,
    ) -> NumericId:
        """Load a model and warm it up; returns its `NumericId` in this browser.

        The `known` answer, if given, is checked at warm-up and by later probes. Raises
        `BrowserLost` (also when `ref` is not the current incarnation) or `PageError`, whose `what`
        is `wrong_answer` if the page's answer differs.
        """
        self._lease.accept(term)
        return await self._models.load(ref, spec, backends, known)

    async def unload(self, ref: HostRef, term: int, model: str) -> None:
        """Release a model's session. Unknown models are no error."""
        self._lease.accept(term)
        await self._models.unload(ref, model)

    async def run(
        self, request: RunRequest, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> RunReply:
        """Run one operation, once: a repeated id gets the same answer.

        Failures of the browser are in the reply, never raised. Raises `CallerError` for a message
        over the limit.
        """
        return await self._server.run(request, tensors)

    async def drain(self, term: int) -> None:
        """Stop admitting operations; returns when all in flight are answered."""
        self._lease.accept(term)
        if self._incarnation.readiness is Readiness.READY:
            self._incarnation.readiness = Readiness.DRAINING
        await self._server.finished()

    async def reconnect(self, ref: HostRef, term: int) -> None:
        """Return when the page has reopened its sockets and answers; at once if they are open.

        Raises `BrowserLost`: its `what` is `socket_closed` if the page did not reconnect within
        `reconnect_seconds`. The browser is left as it is.
        """
        self._lease.accept(term)
        self._incarnation.require(ref)
        limit = self._config.reconnect_seconds
        try:
            async with asyncio.timeout(limit):
                await answers(self.page.bridge)
        except TimeoutError as error:
            raise BrowserLost(
                f"the page of {ref} did not reconnect within {limit:g} s",
                what="socket_closed",
            ) from error
        self._incarnation.require(ref)
        self._breakers.repaired("reconnect")

    # -- status and events ------------------------------------------------------------------------

    def status(self) -> HostStatus:
        return self._reports.status(self._server)

    def usage(self) -> Usage:
        """Age, use and last measured memory of the browser, and memory of the machine."""
        return self._reports.usage(self._server)

    async def memory_bytes(self) -> int:
        """Resident bytes of the browser's whole process tree; `status` has the latest, too."""
        return await self._reports.memory_bytes()

    async def hello(self, term: int) -> HostReport:
        """The state of this host, for a supervisor at the start of its term. Keeps the events."""
        self._lease.accept(term)
        return self._reports.hello()

    async def next_event(
        self,
        term: int,
        seconds: float,
        after: int = 0,
        peers: Mapping[BreakerKey, CircuitState] | None = None,
    ) -> HostEvent | None:
        """The first event newer than `after`, or None after `seconds` without one.

        Events up to `after` are acknowledged and dropped; others are kept. `peers` are the
        circuits of the pool's other browsers, for the cap on how many may be open.
        """
        self._lease.accept(term)
        if peers is not None:
            self._breakers.note_peers(peers)
        return await self._events.next(after, seconds)

    async def diagnose(self, *, screenshot: bool = True) -> PageDiagnostics:
        """Diagnostics of the current page, or the last one."""
        return await self._reports.diagnose(screenshot=screenshot)

    def breaker_metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """Metrics of each circuit breaker, by model ("" the browser's own)."""
        return self._breakers.metrics()

    def switch_breaker(self, model: str, to: BreakerSwitch) -> None:
        """Force a circuit open, disable it, or reset it; the empty model is the browser's own."""
        self._breakers.switch(model, to)

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None:
        """Inject a `Fault` into this browser, or a page fault given as a mapping (see
        `actors.faults`).

        Raises `FaultRefused`, `BrowserLost` for another incarnation, or `PageError`.
        """
        self._incarnation.require(ref)
        if isinstance(fault, Fault):
            return await self._injector.inject(self._target(), fault, use_circuit_breaker=gated)
        await self.page.ask("fault", fault)
        return None

    def _target(self) -> InjectionTarget:
        session, own = self.process.require_session(), self._breakers.snapshots().get("")
        return InjectionTarget(
            self._incarnation.ref,
            self.process.tree(),
            self.page.bridge,
            partial(self.page.ask, "fault"),
            session,
            own.breaker.state if own else CircuitState.CLOSED,
            self._config.message_bytes_max,
            any(each.backend is Backend.WEBGPU for each in self._models.numeric.values()),
        )
