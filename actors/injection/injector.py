"""Injects faults into one browser: gated by its circuit breaker, carried out by `actions`.

An injector lives in the very worker that it breaks, on whatever node that is, and touches nothing
but processes below the browser's own reaper, the worker itself, and on order the raylet above it.
This module must not repair anything, nor decide when to inject what.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.driver.binaries import Binaries
from actors.injection.actions import ACTIONS
from actors.injection.target import Injection, InjectionTarget, impossible, refused
from recovery.errors import BrowserError, FaultRefused
from recovery.faults import FAULTS, Fault, FaultSite, Injected, may_inject

_LAUNCHES_MAX = 8  # failing launches to come, at most


class BrowserFailureInjector:
    """Injects faults into its browser's current incarnation. Off unless `allowed`."""

    def __init__(
        self,
        allowed: bool,
        wall: Callable[[], float] = time.time,
        raylet: Callable[[], int] = os.getppid,
    ) -> None:
        self._allowed = allowed
        self._wall = wall
        self._raylet = raylet
        self._failing: deque[str] = deque(maxlen=_LAUNCHES_MAX)  # scripts for the next launches
        self._destroy_next = 0  # number of next pages whose device is destroyed
        self._tasks: set[asyncio.Task[None]] = set()

    async def inject(
        self, target: InjectionTarget, fault: Fault, *, use_circuit_breaker: bool = True
    ) -> Injected:
        """Inject `fault` into `target`; returns what was done.

        With `use_circuit_breaker`, faults on a browser whose breaker is open are refused, and
        severe ones if it is half-open. Raises `FaultRefused`, or `BrowserLost` if it has ended.
        """
        if not self._allowed:
            raise refused("off")
        if use_circuit_breaker and not may_inject(target.circuit, fault.intensity):
            raise FaultRefused(
                f"{fault}: refused, since the circuit breaker of {target.ref} is {target.circuit}. "
                "Wait until it has closed, or pass gated=False.",
                what="circuit_open",
            )
        if target.processes.kind not in FAULTS[fault.kind].engines:
            raise impossible(fault, f"{target.processes.kind} does not support it")
        if FAULTS[fault.kind].place is not FaultSite.BROWSER:
            raise impossible(fault, "it is a fault of the supervisor, not of a browser")
        ordered = self._wall()
        injection = Injection(target, fault, self._wall, self._later, self, self._raylet)
        hit = await ACTIONS[fault.kind](injection)
        at = ordered if hit.at is None else hit.at
        return Injected(
            fault,
            at,
            fault.dose.what,
            target.ref.browser_id,
            target.ref.epoch,
            tuple(hit.pids),
            None if hit.seconds is None else at + hit.seconds,
        )

    # -- launches ---------------------------------------------------------------------------------

    def launched_with(self, binaries: Binaries, folder: Path) -> Binaries:
        """The binaries of the next launch: `binaries`, or a failing browser (a script, written to
        `folder`)."""
        if not self._failing:
            return binaries
        script = folder / "broken-browser"
        script.write_text(self._failing.popleft())
        script.chmod(0o700)
        return replace(binaries, browser=str(script))

    async def page_is_ready(self, ask: Callable[[Mapping[str, Any]], Awaitable[object]]) -> None:
        """Inject the faults that were ordered for the next page."""
        if self._destroy_next:
            self._destroy_next -= 1
            await ask({"what": "destroy", "times": 1})

    def fail_launches(self, scripts: Sequence[str]) -> None:
        """Have the next launches start these instead of the browser."""
        self._failing.extend(scripts)

    def destroy_next_device(self) -> None:
        """Have the next page lose its WebGPU device."""
        self._destroy_next += 1

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_unless_gone(work), name="fault")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _unless_gone(work: Awaitable[None]) -> None:
    with contextlib.suppress(BrowserError):
        await work
