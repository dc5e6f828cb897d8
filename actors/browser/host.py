"""One browser: the face of the parts that launch, watch, serve and report it.

A plain class, wrapped as a Ray actor in `actors.ray.workers`. The parts share one `Incarnation`,
the record of which browser is present and why it ended; here they are put together, and what ends
with a browser is ended. It must not decide what follows from a failure: the supervisor does.
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
from actors.injector import BrowserFailureInjector, InjectionTarget
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
    """A slot of the pool, in all its incarnations while this process lives."""

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
        self.process = BrowserProcess(incarnation, self._injector, self._watch.process)
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
        """Become the incarnation `order.ref`, with whatever was there before ended.

        The launch goes on when this call is abandoned. The same order again joins it, or gets
        what it came to. Raises `StaleTerm`, `SetupError` (something is not installed),
        `LaunchFailed`, or `BrowserLost` if the incarnation was launched and has ended.
        """
        self._lease.accept(order.term)
        return await self._launcher.launch(order)

    def _launch_begins(self, order: LaunchOrder, first: bool) -> None:
        self._models.begin(warm=order.warm)
        self._reports.begin(self._server.served)
        if first:  # else this worker's own breakers know better
            self._breakers.restore(order.breakers)
            if order.death is not None:
                self._breakers.observe(order.death)
        if order.repair:
            self._breakers.repaired(order.repair)

    async def _launch(self, order: LaunchOrder) -> LaunchReport:
        if not self._data.address:
            await self._data.start()
        profile, seconds = await self._startup.run(order)
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
        """What a failure of the whole browser should tell: what the page said and was at."""
        model = self._server.running or self._models.loading
        return {"console": self.page.console, **(self._models.facts_of(model) if model else {})}

    def _out_of_touch(self, failure: Failure) -> None:
        """The page has no connection, and lives."""
        self._breakers.observe(failure)
        self._events.put(failure.ref or self._incarnation.ref, failure=failure)

    def _ended(self, failure: Failure) -> None:
        """The present incarnation is over; the supervisor shall know, once."""
        if self._incarnation.readiness is not Readiness.STARTING:  # else `launch` reports it
            self._breakers.observe(failure)  # once, whatever else ends with it
            self._events.put(self._incarnation.ref, failure=failure)
        self._retire()

    def _retire(self) -> None:
        """Stop using the present browser and end it in the background. Does not wait."""
        self._incarnation.retire()
        self._reports.retired()
        self._launcher.cancel()
        detached = self.process.detach()
        self._forget()
        self.process.end(detached)

    def _forget(self) -> None:
        """Take no more notice of the present browser: what it does now is no event."""
        self._watch.reset()
        self._prober.stop()
        self.page.end()

    async def stop(self) -> None:
        """End the browser and everything that belongs to it; returns when all is gone.

        The lease runs on: should nobody end this worker, it ends itself.
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
        """Load a model and warm it up; returns what decides its numbers here.

        With a `known` answer the warm-up asks for it, and so will probes later on. Raises
        `BrowserLost` (also when `ref` is not the present incarnation) or `PageError`, whose `what`
        is `wrong_answer` if the page computes something else.
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
        """Answer one operation, once: a repeat of an id gets the same answer again.

        Never raises for what a browser does; raises `CallerError` (a message over the limit).
        """
        return await self._server.run(request, tensors)

    async def drain(self, term: int) -> None:
        """Admit nothing more; returns when everything in flight is answered."""
        self._lease.accept(term)
        if self._incarnation.readiness is Readiness.READY:
            self._incarnation.readiness = Readiness.DRAINING
        await self._server.finished()

    async def reconnect(self, ref: HostRef, term: int) -> None:
        """Return when the page has its sockets again and answers; at once if it has them.

        Raises `BrowserLost`: its `what` is `socket_closed` if the page did not come back within
        `reconnect_seconds`. The browser is left as it is: what follows is the caller's to decide.
        """
        self._lease.accept(term)
        self._incarnation.require(ref)
        limit = self._config.reconnect_seconds
        try:
            async with asyncio.timeout(limit):
                await answers(self.page.bridge)
        except TimeoutError as error:
            raise BrowserLost(
                f"the page of {ref} did not open its sockets again within {limit:g} s",
                what="socket_closed",
            ) from error
        self._incarnation.require(ref)
        self._breakers.repaired("reconnect")

    # -- what it says of itself -------------------------------------------------------------------

    def status(self) -> HostStatus:
        return self._reports.status(self._server)

    def usage(self) -> Usage:
        """Age, use and memory (as last looked at) of the browser, and memory of the machine."""
        return self._reports.usage(self._server)

    async def memory_bytes(self) -> int:
        """Resident bytes of the browser's whole process tree; `status` has the latest, too."""
        return await self._reports.memory_bytes()

    async def hello(self, term: int) -> HostReport:
        """What is here, for a supervisor whose term begins. Its events are kept as they were."""
        self._lease.accept(term)
        return self._reports.hello()

    async def next_event(
        self,
        term: int,
        seconds: float,
        after: int = 0,
        peers: Mapping[BreakerKey, CircuitState] | None = None,
    ) -> HostEvent | None:
        """The first event that is newer than `after`, or None when there was none for `seconds`.

        Events up to `after` are acknowledged and forgotten; others are kept. `peers` are the
        circuits of the pool's other browsers, for the cap on how many may be open.
        """
        self._lease.accept(term)
        if peers is not None:
            self._breakers.note_peers(peers)
        return await self._events.next(after, seconds)

    async def diagnose(self, *, screenshot: bool = True) -> PageDiagnostics:
        """What is known of the page now, or was last, for whoever looks into a failure."""
        return await self._reports.diagnose(screenshot=screenshot)

    def breaker_metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """What each circuit breaker here has counted, by model ("" the browser's own)."""
        return self._breakers.metrics()

    def switch_breaker(self, model: str, to: BreakerSwitch) -> None:
        """Force a circuit open, disable it, or reset it; the empty model is the browser's own."""
        self._breakers.switch(model, to)

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None:
        """Break this browser on purpose, as `fault` says; or have the page fail in exactly the
        way that a mapping says (see `actors.faults`).

        Raises `FaultRefused`, `BrowserLost` for another incarnation, or `PageError`.
        """
        self._incarnation.require(ref)
        if isinstance(fault, Fault):
            return await self._injector.inject(self._victim(), fault, use_circuit_breaker=gated)
        await self.page.ask("fault", fault)
        return None

    def _victim(self) -> InjectionTarget:
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
