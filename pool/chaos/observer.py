"""What the supervisor says of browsers and repairs during a run, and whether all are back.

Waits until the pool is whole, or until a fault was noticed. This module must not mend anything, nor
say which repair was because of which fault (`attribution` does).
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

WHOLE_SECONDS = 90.0  # that repairs may take before a fault happens all the same
_QUIET_SECONDS = 1.0  # within which a fault that may go by unnoticed should be noticed, if it is
_NOTICED_SECONDS = 15.0  # within which a fault that must be noticed should be, before the next
_SETTLE_POLL_SECONDS = 0.2


class Observer:
    """What was seen of a pool's browsers. `traces` comes to know the launches that are met."""

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
        """The repairs that are over."""
        return self._repairs.values()

    @property
    def products(self) -> Mapping[str, str]:
        """Product and version of each browser, by its slot."""
        return self._products

    def engine_of(self, browser_id: str) -> str:
        """The kind of a browser; empty if there is none of this name."""
        return self._engines.get(browser_id, "")

    async def look(self) -> None:
        """Look at every browser, and read the log."""
        with contextlib.suppress(PoolError):
            view = await self._pool.state()
            self._traces.note(view.launches.values())
            self._take_repairs(view.control)
            for record in view.control.browsers.values():
                self._engines[record.id] = str(record.kind)
                if record.facts is not None:
                    self._products[record.id] = f"{record.facts.product} {record.facts.version}"
        await self._log.read()

    async def until_whole(self, seconds: float = WHOLE_SECONDS) -> bool:
        """Wait until every browser is in service, or replaced, with all its models."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(PoolError):
                state = await self._pool.control()
                self._take_repairs(state)
                if is_whole(state):
                    await self.look()
                    return True
            await asyncio.sleep(_SETTLE_POLL_SECONDS)
        return False

    async def until_noticed(self, injected: Injected) -> None:
        """Wait until the supervisor knows of a fault, if it must come to know."""
        if injected.fault.kind is FaultKind.FULL_DISK and injected.until is not None:
            await asyncio.sleep(injected.until - time.time())  # nothing could be logged meanwhile
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


def is_whole(state: PoolState) -> bool:
    """Whether every browser that is wanted is in service, or another in its place, and has all."""
    records = state.browsers.values()
    if any(record.repair is not None or record.phase in COMING for record in records):
        return False
    if any(record.phase is Phase.GIVEN_UP and not record.replaced_by for record in records):
        return False
    loading = (ModelPhase.LOADING,)
    serving = [record for record in records if record.phase is Phase.READY]
    return bool(serving) and not any(
        phase in loading for record in serving for phase in record.models.values()
    )
