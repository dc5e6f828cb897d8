"""Observes browsers and repairs during a run, by the supervisor's state.

Waits until all browsers are repaired, or until a fault is detected. This module must not repair
anything, nor assign repairs to faults (`attribution` does).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping

from pool.chaos.attribution import Repaired
from pool.chaos.clock import SKEW_SECONDS, SupervisorClock
from pool.chaos.control_log import ControlLogReader
from pool.leaks import Traces
from pool.pool import BrowserPool
from recovery.control import COMING, ModelPhase, Phase, PoolState
from recovery.errors import PoolError
from recovery.faults import FaultKind, Injected

REPAIRED_SECONDS = 90.0  # maximum wait for repairs before the next fault
_QUIET_SECONDS = 1.0  # wait for a fault that may remain undetected
_NOTICED_SECONDS = 15.0  # maximum wait for a fault that must be detected
_SETTLE_POLL_SECONDS = 0.2


class Observer:
    """Observations of a pool's browsers. Launches that are seen are added to `traces`."""

    def __init__(
        self, pool: BrowserPool, log: ControlLogReader, clock: SupervisorClock, traces: Traces
    ) -> None:
        self._pool = pool
        self._log = log
        self._clock = clock
        self._traces = traces
        self._repairs: dict[tuple[str, int, float], Repaired] = {}
        self._products: dict[str, str] = {}
        self._engines: dict[str, str] = {}

    @property
    def repairs(self) -> Collection[Repaired]:
        """The completed repairs."""
        return self._repairs.values()

    @property
    def products(self) -> Mapping[str, str]:
        """Product and version of each browser, by its slot."""
        return self._products

    def engine_of(self, browser_id: str) -> str:
        """The type of a browser; empty for an unknown one."""
        return self._engines.get(browser_id, "")

    async def look(self) -> None:
        """Update the state of every browser, and read the log."""
        with contextlib.suppress(PoolError):
            view = await self._pool.state()
            self._traces.note(view.launches.values())
            self._take_repairs(view.control)
            for record in view.control.browsers.values():
                self._engines[record.id] = str(record.kind)
                if record.facts is not None:
                    self._products[record.id] = f"{record.facts.product} {record.facts.version}"
        await self._log.read()

    async def until_repaired(self, seconds: float = REPAIRED_SECONDS) -> bool:
        """Wait until every browser is in service, or replaced, with all its models."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(PoolError):
                state = await self._pool.control()
                self._take_repairs(state)
                if is_repaired(state):
                    await self.look()
                    return True
            await asyncio.sleep(_SETTLE_POLL_SECONDS)
        return False

    async def until_noticed(self, injected: Injected) -> None:
        """Wait until the supervisor has detected a fault, if it should."""
        if injected.fault.kind is FaultKind.FULL_DISK and injected.until is not None:
            await asyncio.sleep(injected.until - time.time())  # nothing can be logged until then
        if not injected.fault.dose.noticed:
            return
        quiet = injected.fault.dose.quiet
        deadline = time.monotonic() + (_QUIET_SECONDS if quiet else _NOTICED_SECONDS)
        while time.monotonic() < deadline:
            await self._log.read()
            if any(
                (failure.browser_id, failure.epoch) == (injected.target, injected.epoch)
                and failure.at >= injected.at - SKEW_SECONDS
                for failure in self._log.noticed
            ):
                return
            await asyncio.sleep(_SETTLE_POLL_SECONDS)

    def _take_repairs(self, state: PoolState) -> None:
        for repair in state.repairs:
            key = (repair.browser_id, repair.from_epoch, repair.began)
            if key not in self._repairs:
                ready = None if repair.ready is None else self._clock.ours(repair.ready)
                self._repairs[key] = Repaired(self._clock.ours(repair.began), ready, repair)


def is_repaired(state: PoolState) -> bool:
    """Whether every wanted browser or its replacement is in service with all its models."""
    records = state.browsers.values()
    if any(record.repair is not None or record.phase in COMING for record in records):
        return False
    if any(record.phase is Phase.GIVEN_UP and not record.replaced_by for record in records):
        return False
    serving = [record for record in records if record.phase is Phase.READY]
    return bool(serving) and not any(
        phase is ModelPhase.LOADING for record in serving for phase in record.models.values()
    )
