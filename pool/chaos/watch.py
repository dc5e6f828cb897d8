"""Observes the effects of each fault, independently of the injector.

It checks the kernel, the page, the log and the supervisor's term after each fault, concurrently
with the operations. This module must not evaluate its observations (`evidence` does), nor ask the
injector.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from pool.background import BackgroundTasks
from pool.chaos.control_log import ControlLogReader
from pool.chaos.evidence import ENDS, GONE, Seen
from pool.chaos.processes import states
from pool.pool import BrowserPool
from recovery.errors import PoolError
from recovery.faults import Due, FaultKind, Injected

_ENDED_SECONDS = 3.0  # within which a killed process must have ended
_ENDED_POLL_SECONDS = 0.05
_GROWN_SECONDS = 1.2  # within which a browser must have allocated the memory
_TERM_POLL_SECONDS = 0.2
_SUPERVISOR_AWAY_SECONDS = 30.0


class Before(NamedTuple):
    """Values before a fault that changes them."""

    term: int = 0
    tree_bytes: int = 0
    skew_seconds: float = 0.0


class FaultWatch:
    """The observations of each fault of a run. `on_node_death`, which may block, is called after a
    node was killed: it may start another."""

    def __init__(
        self,
        pool: BrowserPool,
        log: ControlLogReader,
        tasks: BackgroundTasks,
        on_node_death: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._log = log
        self._tasks = tasks
        self._on_node_death = on_node_death
        self._seen: dict[int, Seen] = {}

    @property
    def seen(self) -> Mapping[int, Seen]:
        """By the fault's number."""
        return self._seen

    async def before(self, due: Due) -> Before:
        """The values that this fault will change."""
        match due.fault.kind:
            case FaultKind.SUPERVISOR_DEATH:
                return Before(term=(await self._pool.control()).term)
            case FaultKind.MEMORY_EXHAUSTION:
                return Before(tree_bytes=await self._tree_bytes(due.fault.target))
            case FaultKind.CLOCK_STEP:
                return Before(skew_seconds=await self._log.skew())
        return Before()

    def start(self, number: int, injected: Injected, before: Before) -> None:
        """Observe fault `number` in the background."""
        self._tasks.start(self.watch(number, injected, before), "watch")

    async def watch(self, number: int, injected: Injected, before: Before) -> None:
        """Observe the effects of fault `number`."""
        kind = injected.fault.kind
        grows = kind is FaultKind.MEMORY_EXHAUSTION
        if kind is FaultKind.FULL_DISK:
            await self._log.log_an_event()  # fails while the disk is full
        delay = injected.at + (_GROWN_SECONDS if grows else 0.0) - time.time()
        await asyncio.sleep(max(delay, 0.01))
        processes = states(injected)
        deadline = time.monotonic() + (_ENDED_SECONDS if kind in ENDS else 0.0)
        # The kernel reports a process's end only to its parent: poll.
        while set(processes.values()) - {GONE} and time.monotonic() < deadline:
            await asyncio.sleep(_ENDED_POLL_SECONDS)
            processes = states(injected)
        seen = Seen(processes)
        with contextlib.suppress(PoolError, TimeoutError):
            async with asyncio.timeout(_SUPERVISOR_AWAY_SECONDS):
                seen = await self._seen_by_others(seen, injected, before)
        self._seen[number] = seen
        if kind is FaultKind.NODE_DEATH:
            await asyncio.to_thread(self._on_node_death)

    async def _seen_by_others(self, seen: Seen, injected: Injected, before: Before) -> Seen:
        match injected.fault.kind:
            case FaultKind.SUPERVISOR_DEATH:
                while (term := (await self._pool.control()).term) <= before.term:  # noqa: ASYNC110
                    await asyncio.sleep(_TERM_POLL_SECONDS)
                return replace(seen, term_before=before.term, term_after=term)
            case FaultKind.MEMORY_EXHAUSTION:
                grown = await self._tree_bytes(injected.target) - before.tree_bytes
                return replace(seen, grown_bytes=grown)
            case FaultKind.TAB_HIDDEN:
                found = await self._pool.diagnose(injected.target, screenshot=False)
                return replace(seen, visibility=found.visibility)
            case FaultKind.CLOCK_STEP:
                skew = await self._log.skew() - before.skew_seconds
                return replace(seen, skew_seconds=skew)
        return seen

    async def _tree_bytes(self, browser_id: str) -> int:
        return (await self._pool.state()).memory_bytes.get(browser_id, 0)
