"""Workers that are not real: they take their time, and break when they are told to.

This module must not say when one breaks (`tests.simulator.faults` does), or judge what comes of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from actors.messages import LaunchOrder, LaunchReport, RunReply, RunRequest
from recovery.errors import BrowserLost, LaunchFailed
from recovery.kinds import BrowserType, Readiness
from tests.fakes import FakeHost
from tests.simulator.plans import Kind


class Surroundings(Protocol):
    """Whom a worker tells what it does, and asks what is to fail."""

    @property
    def now(self) -> float: ...
    def takes(self, kind: Kind, browser_id: str) -> bool: ...
    def launching(self, host: SimHost, order: LaunchOrder) -> None: ...
    def operation_began(self, host: SimHost, request: RunRequest) -> None: ...
    def stalled(self, request: RunRequest, seconds: float) -> None: ...
    def hangs(self, request: RunRequest) -> None: ...


class Gate:
    """Opens for everyone after a while of its own; `hang_next` keeps the next one for good."""

    def __init__(self, rng: random.Random, least: float, most: float) -> None:
        self._rng, self._least, self._most = rng, least, most
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hang_next = False

    def wait(self) -> Coroutine[Any, Any, None]:
        hangs, self.hang_next = self.hang_next, False
        return self._wait(None if hangs else self._rng.uniform(self._least, self._most))

    async def _wait(self, seconds: float | None) -> None:
        broken = self._broken
        await asyncio.wait({broken}, timeout=seconds)
        if broken.done():
            raise BrowserLost("the page's data socket closed", what="socket_closed")

    def interrupt(self) -> None:
        """Whoever waits now is told that the connection broke."""
        self._broken.set_result(None)
        self._broken = asyncio.get_running_loop().create_future()


class SimHost(FakeHost):
    """A worker that takes its time, and whose page answers as `BrowserHost`'s does when it is out
    of touch: what was under way has failed, what is new waits."""

    def __init__(
        self, world: Surroundings, browser_id: str, kind: BrowserType, rng: random.Random
    ) -> None:
        super().__init__(browser_id, kind)
        self.world = world
        self.rng = rng
        self.run_gate: Any = Gate(rng, 0.002, 0.05)
        self.launch_gate: Any = Gate(rng, 0.2, 1.5)
        self.load_gate: Any = Gate(rng, 0.02, 0.3)
        self.silent = False
        self.doomed = False  # the launch under way will fail
        self.error_next = False
        for name in ("launch", "load", "unload", "run", "next_event", "hello", "reconnect", "stop"):
            setattr(self, name, self._heard(getattr(self, name)))

    @property
    def lives(self) -> bool:
        return not self._worker_over.done()

    @property
    def serves(self) -> bool:
        return (
            self.lives
            and not self.silent
            and self.readiness is Readiness.READY
            and self.in_touch.is_set()
            and "m" in self.models
        )

    def _heard(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def calling(*arguments: Any) -> Any:
            if self.silent:
                began = self.world.now
                try:
                    await self._unless_dead(asyncio.Event().wait())
                finally:
                    if isinstance(arguments[0] if arguments else None, RunRequest):
                        self.world.stalled(arguments[0], self.world.now - began)
            return await call(*arguments)

        return calling

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        self.world.launching(self, order)
        return await super().launch(order)

    async def _launch(self, number: int, order: LaunchOrder) -> LaunchReport:
        self.doomed = self.world.takes(Kind.LAUNCHES_FAIL, order.ref.browser_id)
        report = await super()._launch(number, order)
        if self.doomed:
            self.readiness = Readiness.DEAD
            raise LaunchFailed(f"{order.ref} did not start")
        return report

    async def load(self, *arguments: Any) -> Any:
        if self.world.takes(Kind.LOADS_FAIL, self.ref.browser_id):
            self.fail_load.add(len(self.loads))
        return await super().load(*arguments)

    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply:
        if not self.in_touch.is_set() and self.lives:
            await self._until_in_touch(request.seconds)
            if not self.in_touch.is_set() and request.ref == self.ref:
                return RunReply(self.status(), failure=self._failure("deadline_passed", request))
        return await super().run(request, tensors)

    async def _until_in_touch(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._unless_dead(self.in_touch.wait())
        except TimeoutError:
            pass

    async def _answer(
        self, number: int, request: RunRequest, tensors: Mapping[str, Any]
    ) -> RunReply:
        self.world.operation_began(self, request)
        if not self.in_touch.is_set():
            return RunReply(self.status(), failure=self._failure("socket_closed", request))
        if self.error_next:
            self.error_next = False
            self.error_on_run.add(number)
        if self.run_gate.hang_next:
            self.world.hangs(request)
        return await super()._answer(number, request, tensors)

    def drop_sockets(self) -> None:
        super().drop_sockets()
        self.run_gate.interrupt()

    def crash(self, what: str = "browser_exited") -> None:
        if self.readiness is Readiness.STARTING:
            self.doomed = True
        elif self._browser_over is not None and not self._browser_over.done():
            super().crash(what)
