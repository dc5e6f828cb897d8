"""Registry of a supervisor's workers, by browser, with their last launch reports.

Callers that add or remove a worker also start or stop its watch (`actors.supervisor.watching`);
this module must not call a host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, ItemsView, Mapping, Sequence
from typing import Any, Protocol

from actors.messages import (
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
from recovery.failures import Failure
from recovery.faults import Fault, Injected
from recovery.kinds import Backend, BrowserType
from recovery.records import HostRef, NumericId
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec


class Host(Protocol):
    """A browser host, in this process or behind Ray.

    Every method raises `BrowserLost` with `what="worker_exited"` when its worker is gone.
    """

    async def launch(self, order: LaunchOrder) -> LaunchReport: ...
    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId: ...
    async def unload(self, ref: HostRef, term: int, model: str) -> None: ...
    async def run(self, request: RunRequest, tensors: Mapping[str, Any]) -> RunReply: ...
    async def next_event(
        self, term: int, seconds: float, after: int, peers: Mapping[BreakerKey, CircuitState]
    ) -> HostEvent | None: ...
    async def hello(self, term: int) -> HostReport: ...
    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None: ...
    async def diagnose(self, *, screenshot: bool = True) -> PageDiagnostics: ...
    async def reconnect(self, ref: HostRef, term: int) -> None: ...
    async def drain(self, term: int) -> None: ...
    async def memory_bytes(self) -> int: ...
    async def usage(self) -> Usage: ...
    async def breaker_metrics(self) -> Mapping[str, Mapping[str, Any]]: ...
    async def switch_breaker(self, model: str, to: BreakerSwitch) -> None: ...
    async def stop(self) -> None: ...
    def kill(self) -> None: ...


HostFactory = Callable[[str, BrowserType, int], Awaitable[Host]]
HostFinder = Callable[[], Awaitable[Mapping[str, Sequence[Host]]]]


class Hosts:
    """The running worker of each browser. Reports are kept for its successor."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}
        self._reports: dict[str, LaunchReport] = {}
        self._deaths: dict[str, Failure] = {}  # of workers, for the breakers of their successors

    def __contains__(self, browser_id: str) -> bool:
        return browser_id in self._hosts

    def get(self, browser_id: str) -> Host | None:
        return self._hosts.get(browser_id)

    def items(self) -> ItemsView[str, Host]:
        return self._hosts.items()

    def put(self, browser_id: str, host: Host) -> None:
        self._hosts[browser_id] = host

    def remove(self, browser_id: str) -> None:
        self._hosts.pop(browser_id, None)

    def launched(self, browser_id: str, report: LaunchReport) -> None:
        """Store a launch report. Clears the failure of an earlier worker."""
        self._reports[browser_id] = report
        self._deaths.pop(browser_id, None)

    def died(self, browser_id: str, failure: Failure) -> None:
        self._deaths[browser_id] = failure

    def death(self, browser_id: str) -> Failure | None:
        """The failure that ended the previous worker, until another has launched the browser."""
        return self._deaths.get(browser_id)

    def port(self, browser_id: str) -> int:
        """The last port of the browser's slot; 0: none yet."""
        report = self._reports.get(browser_id)
        return report.port if report else 0

    def report(self, browser_id: str) -> LaunchReport | None:
        return self._reports.get(browser_id)

    def reports(self) -> dict[str, LaunchReport]:
        """The launch report of each browser's current incarnation."""
        return dict(self._reports)
