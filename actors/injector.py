"""Fault injection. Into a browser: signals, sockets, memory, files, wrong answers. Into the
supervisor: its death, a full disk, a clock step.

An injector runs in the worker of its browser, on any node, and affects only processes below the
browser's reaper, the worker itself, and for node faults the raylet above it. `recovery.faults`
describes each fault at each intensity; `pool.chaos.evidence` decides whether it really happened.
This module must not repair anything, nor choose faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil

from actors.driver.binaries import Binaries
from actors.driver.processes import BrowserProcesses
from recovery.breaker import CircuitState
from recovery.errors import BrowserError, FaultRefused
from recovery.faults import (
    CLOCK_STEP_SECONDS,
    FAULTS,
    Fault,
    FaultKind,
    FaultSite,
    Injected,
    Intensity,
    may_inject,
)
from recovery.records import HostRef

_FLOOD_EXTRA_BYTES = 2 << 20  # above the message size limit, overhead included
_HOLD_BYTES, _HOLD_SECONDS = 512 << 20, 2.0
_GROWTH_BYTES = 64 << 20  # growth allowed under a memory limit
_LIMIT_SECONDS = 10.0  # after which the memory limit is lifted, unless permanent
_SELF_SECONDS = 0.05  # lets the reply leave before the worker kills itself
_LAUNCHES_MAX = 8  # maximum number of failing launches
_FOR_EVER = 1 << 30

SIGNALS = {
    Intensity.MILD: signal.SIGABRT,
    Intensity.MODERATE: signal.SIGQUIT,
    Intensity.SEVERE: signal.SIGKILL,
}
_AWAY_SECONDS = {Intensity.MILD: 0.3, Intensity.MODERATE: 1.0, Intensity.SEVERE: 10.0}
_STOPPED_SECONDS = {Intensity.MILD: 0.5, Intensity.MODERATE: 3.0, Intensity.SEVERE: 30.0}
_HIDDEN_SECONDS = {Intensity.MILD: 1.0, Intensity.MODERATE: 5.0}
_FULL_SECONDS = {Intensity.MILD: 1.0, Intensity.MODERATE: 3.0, Intensity.SEVERE: 10.0}
_SOCKETS = {
    Intensity.MILD: ("control",),
    Intensity.MODERATE: ("data",),
    Intensity.SEVERE: ("control", "data"),
}
_SPOILT = {Intensity.MILD: "500", Intensity.MODERATE: "half", Intensity.SEVERE: "wrong"}
_CORRUPTIONS = {
    Intensity.MILD: (0, 1),
    Intensity.MODERATE: (22, 3),
    Intensity.SEVERE: (30, _FOR_EVER),
}
# Scripts that replace the browser for one failing launch.
_ENDS = "#!/bin/sh\nexit 1\n"
_HANGS = "#!/bin/sh\nexec sleep 600\n"


class PageServer(Protocol):
    """The server that the page talks to (`actors.bridge.Bridge`)."""

    def drop(self, names: Iterable[str]) -> None: ...
    def stay_away(self, seconds: float) -> None: ...
    def spoil(self, how: Sequence[str]) -> None: ...
    async def tell(self, message: Mapping[str, Any]) -> None: ...


class Driven(Protocol):
    """The browser's WebDriver session (`actors.driver.session.Session`)."""

    async def reload(self) -> None: ...
    async def leave(self) -> None: ...
    async def hide(self) -> None: ...
    async def show(self) -> None: ...


@dataclass(frozen=True)
class InjectionTarget:
    """The current incarnation of a browser, as a target of fault injection.

    `ask` sends a request to the page's worker; `circuit` is the state of the browser's own circuit
    breaker, `bytes_max` the limit on a message, `device` whether a model is on a WebGPU device.
    """

    ref: HostRef
    processes: BrowserProcesses
    server: PageServer
    ask: Callable[[Mapping[str, Any]], Awaitable[object]]
    driver: Driven
    circuit: CircuitState
    bytes_max: int
    device: bool


class _Hit(NamedTuple):
    """The effect: pids hit, duration if temporary, and wall time (None: when it was ordered)."""

    pids: Sequence[int] = ()
    seconds: float | None = None
    at: float | None = None


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
        hit = await self._break(target, fault)
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

    async def _break(self, target: InjectionTarget, fault: Fault) -> _Hit:
        """Inject `fault`."""
        how, processes, server = fault.intensity, target.processes, target.server
        match fault.kind:
            case FaultKind.LAUNCH_FAILURE:
                failing = [_HANGS] if how is Intensity.SEVERE else [_ENDS]
                self._failing.extend(failing * (2 if how is Intensity.MODERATE else 1))
                return self._send(fault, processes.named("browser"), signal.SIGKILL)
            case FaultKind.CONNECTION_FAILURE:
                server.stay_away(_AWAY_SECONDS[how])
                return _Hit(seconds=_AWAY_SECONDS[how])
            case FaultKind.TIMEOUT if how is Intensity.MILD:
                return self._suspend(fault, processes.pages(), 1.0)
            case FaultKind.TIMEOUT if how is Intensity.MODERATE:
                await target.ask({"what": "loop"})
            case FaultKind.TIMEOUT:
                return self._send(fault, processes.tree(), signal.SIGSTOP)
            case FaultKind.TAB_CRASH:
                return self._send(fault, processes.pages(), SIGNALS[how])
            case FaultKind.BROWSER_CRASH:
                return self._send(fault, processes.named("browser"), SIGNALS[how])
            case FaultKind.DRIVER_DEATH:
                return self._send(fault, processes.named("driver"), SIGNALS[how])
            case FaultKind.GPU_PROCESS_CRASH:
                return self._send(fault, processes.gpu(), SIGNALS[how])
            case FaultKind.DEVICE_LOSS:
                await self._destroy(target, fault)
            case FaultKind.MEMORY_EXHAUSTION:
                return await self._exhaust(target, fault)
            case FaultKind.SOCKET_DROP:
                server.drop(_SOCKETS[how])
            case FaultKind.API_ERROR:
                server.spoil([_SPOILT[how]])
                return self._send(fault, processes.pages(), signal.SIGKILL)
            case FaultKind.WRONG_ANSWER:
                bit, times = _CORRUPTIONS[how]
                await target.ask({"what": "lie", "times": times, "bit": bit, "element": 0})
            case FaultKind.PAGE_REFRESH:
                await _refresh(target, how)
            case FaultKind.TAB_HIDDEN:
                return await self._hide(target, how)
            case FaultKind.MACHINE_SUSPENDED:
                return self._suspend(fault, processes.tree(), _STOPPED_SECONDS[how])
            case FaultKind.MESSAGE_OVER_LIMIT:
                await _flood(target, how)
            case FaultKind.WORKER_DEATH:
                return self._end_soon(SIGNALS[how])
            case FaultKind.NODE_DEATH:
                raylet = self._raylet_pid(fault)
                if SIGNALS[how] in ignored_by(raylet):
                    raise impossible(fault, f"the raylet ignores {SIGNALS[how].name}")
                return self._end_node_soon(raylet, SIGNALS[how])
            case _:
                raise impossible(fault, "nobody knows how")
        return _Hit()

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

    # -- helpers ----------------------------------------------------------------------------------

    def _send(
        self, fault: Fault, processes: Sequence[psutil.Process], number: signal.Signals
    ) -> _Hit:
        """Raises `FaultRefused` if there are no such processes."""
        at = self._wall()  # now: looking them up took a while
        hit = [process.pid for process in processes if _signal(process, number)]
        if not hit:
            raise impossible(fault, "it has no such process")
        return _Hit(hit, at=at)

    def _suspend(self, fault: Fault, processes: Sequence[psutil.Process], seconds: float) -> _Hit:
        at = self._wall()
        stopped = [process for process in processes if _signal(process, signal.SIGSTOP)]
        if not stopped:
            raise impossible(fault, "it has no such process")

        async def resume() -> None:
            await asyncio.sleep(seconds)
            for process in stopped:
                _signal(process, signal.SIGCONT)

        self._later(resume())
        return _Hit([process.pid for process in stopped], seconds, at)

    async def _destroy(self, target: InjectionTarget, fault: Fault) -> None:
        if not target.device:
            raise impossible(fault, "no model is on a WebGPU device")
        at_once = fault.intensity is Intensity.MILD
        self._destroy_next += fault.intensity is Intensity.SEVERE
        await target.ask({"what": "destroy", "times": 0 if at_once else 1})

    async def _exhaust(self, target: InjectionTarget, fault: Fault) -> _Hit:
        if fault.intensity is Intensity.MILD:
            await target.ask({"what": "hold", "bytes": _HOLD_BYTES, "seconds": _HOLD_SECONDS})
            return _Hit(seconds=_HOLD_SECONDS)
        if sys.platform != "linux":
            raise impossible(fault, "only Linux can forbid a process to grow")
        pages = target.processes.pages()
        before = {page.pid: page.rlimit(psutil.RLIMIT_DATA) for page in pages}
        try:
            for page in pages:
                most = page.memory_info().data + _GROWTH_BYTES
                page.rlimit(psutil.RLIMIT_DATA, (most, before[page.pid][1]))
        except psutil.AccessDenied as error:
            raise impossible(fault, "only root may forbid this browser to grow") from error
        await target.ask({"what": "exhaust", "times": 1})
        if fault.intensity is Intensity.SEVERE:
            return _Hit(list(before))

        async def lift() -> None:
            await asyncio.sleep(_LIMIT_SECONDS)
            for page in pages:
                with contextlib.suppress(psutil.Error):
                    page.rlimit(psutil.RLIMIT_DATA, before[page.pid])

        self._later(lift())
        return _Hit(list(before), _LIMIT_SECONDS)

    async def _hide(self, target: InjectionTarget, how: Intensity) -> _Hit:
        await target.driver.hide()
        seconds = _HIDDEN_SECONDS.get(how)
        if seconds is None:
            return _Hit()

        async def show() -> None:
            await asyncio.sleep(seconds)
            await target.driver.show()

        self._later(show())
        return _Hit(seconds=seconds)

    def _raylet_pid(self, fault: Fault) -> int:
        pid = self._raylet()
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).name() == "raylet":
                return pid
        raise FaultRefused(
            f"{fault}: refused, since process {pid} is not a raylet", what="not_ours"
        )

    def _end_soon(self, number: signal.Signals) -> _Hit:
        asyncio.get_running_loop().call_later(_SELF_SECONDS, _end_self, number)
        return _Hit((os.getpid(),), at=self._wall() + _SELF_SECONDS)

    def _end_node_soon(self, raylet: int, number: signal.Signals) -> _Hit:
        asyncio.get_running_loop().call_later(_SELF_SECONDS, _end_node, raylet, number)
        return _Hit((raylet,), at=self._wall() + _SELF_SECONDS)

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(_unless_gone(work), name="fault")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class SupervisorFailureInjector:
    """Injects faults into the supervisor's own process; also its wall clock."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._ahead_seconds = 0.0

    def wall(self) -> float:
        """The supervisor's wall time in seconds, injected clock steps included."""
        return self._wall() + self._ahead_seconds

    def inject(self, fault: Fault) -> Injected:
        """Inject `fault` into this process; returns what was done. Raises `FaultRefused`."""
        loop, how, at = asyncio.get_running_loop(), fault.intensity, self._wall()
        pids, until = (os.getpid(),), None
        match fault.kind:
            case FaultKind.SUPERVISOR_DEATH:
                at += _SELF_SECONDS
                loop.call_later(_SELF_SECONDS, _end_self, SIGNALS[how])
            case FaultKind.FULL_DISK:
                # The kernel refuses all writes of this process to files.
                soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
                until = at + _FULL_SECONDS[how]
                restored = (resource.RLIMIT_FSIZE, (soft, hard))
                loop.call_later(_FULL_SECONDS[how], resource.setrlimit, *restored)
            case FaultKind.CLOCK_STEP:
                self._ahead_seconds += CLOCK_STEP_SECONDS[how]
            case _:
                raise impossible(fault, "it is a fault of a browser, not of the supervisor")
        return Injected(fault, at, fault.dose.what, "", -1, pids, until)


async def _unless_gone(work: Awaitable[None]) -> None:
    with contextlib.suppress(BrowserError):
        await work


async def _refresh(target: InjectionTarget, how: Intensity) -> None:
    match how:
        case Intensity.MILD:
            await target.server.tell({"kind": "fault", "what": "reload"})
        case Intensity.MODERATE:
            await target.driver.reload()
        case Intensity.SEVERE:
            await target.driver.leave()


async def _flood(target: InjectionTarget, how: Intensity) -> None:
    size = target.bytes_max + _FLOOD_EXTRA_BYTES
    if how is Intensity.MILD:
        await target.ask({"what": "tooLarge", "times": 1})
        return
    await target.ask({"what": "flood", "bytes": size})
    if how is Intensity.SEVERE:
        await target.server.tell({"kind": "fault", "what": "flood", "bytes": 1 << 20})


def refused(what: str) -> FaultRefused:
    return FaultRefused(
        "fault injection is off: create the pool with faults=True (for tests only)",
        what=what,
    )


def impossible(fault: Fault, why: str) -> FaultRefused:
    return FaultRefused(f"{fault} can't happen here: {why}", what="impossible")


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _end_node(raylet: int, number: signal.Signals) -> None:
    """Kill the raylet and its descendants, which would outlive it by seconds; this process last."""
    with contextlib.suppress(psutil.Error):
        node = psutil.Process(raylet)
        below = [process for process in node.children(recursive=True) if process.pid != os.getpid()]
        node.send_signal(number)
        for process in below:
            _signal(process, signal.SIGKILL)
    _end_self(signal.SIGKILL)


def _end_self(number: signal.Signals) -> None:
    """End this process by a signal, even if whoever started it has it ignored.

    A program that a shell runs in the background ignores SIGQUIT, and Ray's workers inherit that.
    """
    ctypes.CDLL(None).signal(int(number), None)  # the default; Python's is for main threads only
    os.kill(os.getpid(), number)


def ignored_by(pid: int) -> set[int]:
    """The signals that a process ignores, as Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                mask = int(line.split()[1], 16)
                return {number for number in range(1, 65) if mask >> (number - 1) & 1}
    return set()
