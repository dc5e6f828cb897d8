"""What an injected fault is aimed at, and what the injection of one may use.

This module must not know what any fault does.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import psutil

from actors.driver.processes import BrowserProcesses
from actors.injection.signals import send_signal
from recovery.breaker import CircuitState
from recovery.errors import FaultRefused
from recovery.faults import Fault, Intensity
from recovery.records import HostRef

SELF_SECONDS = 0.05  # lets the reply leave before a process ends itself


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


class Hit(NamedTuple):
    """The effect: pids hit, duration if temporary, and wall time (None: when it was ordered)."""

    pids: Sequence[int] = ()
    seconds: float | None = None
    at: float | None = None


class NextLaunches(Protocol):
    """What the injector keeps for launches and pages to come."""

    def fail_launches(self, scripts: Sequence[str]) -> None: ...
    def destroy_next_device(self) -> None: ...


@dataclass(frozen=True)
class Injection:
    """One fault that is being injected. `later` runs what ends it again, `raylet` is the parent."""

    target: InjectionTarget
    fault: Fault
    wall: Callable[[], float]
    later: Callable[[Coroutine[Any, Any, None]], None]
    next_launches: NextLaunches
    raylet: Callable[[], int]

    @property
    def intensity(self) -> Intensity:
        return self.fault.intensity

    def send(self, processes: Sequence[psutil.Process], number: signal.Signals) -> Hit:
        """Raises `FaultRefused` if there are no such processes."""
        at = self.wall()  # now: looking them up took a while
        hit = [process.pid for process in processes if send_signal(process, number)]
        if not hit:
            raise self.impossible("it has no such process")
        return Hit(hit, at=at)

    def impossible(self, why: str) -> FaultRefused:
        return impossible(self.fault, why)


def refused(what: str) -> FaultRefused:
    return FaultRefused(
        "fault injection is off: create the pool with faults=True (for tests only)",
        what=what,
    )


def impossible(fault: Fault, why: str) -> FaultRefused:
    return FaultRefused(f"{fault} can't happen here: {why}", what="impossible")
