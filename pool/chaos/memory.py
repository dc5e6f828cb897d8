"""Samples the memory of client, supervisor, workers and browsers.

This module must not judge the samples (`report` does).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from pool.chaos.processes import resident_bytes
from pool.chaos.records import MemorySample
from pool.leaks import Traces
from pool.pool import BrowserPool
from recovery.errors import PoolError


class MemorySampler:
    """The samples of one run. `elapsed` returns the seconds since it began; launches that are seen
    are added to `traces`."""

    def __init__(self, pool: BrowserPool, traces: Traces, elapsed: Callable[[], float]) -> None:
        self._pool = pool
        self._traces = traces
        self._elapsed = elapsed
        self._samples: list[MemorySample] = []

    @property
    def samples(self) -> Sequence[MemorySample]:
        return self._samples

    async def take(self, operations: int) -> None:
        """Take a sample after `operations`; only of this process if the pool does not respond."""
        pids: dict[str, int] = {"client": os.getpid()}
        workers, browsers = 0, 0
        with contextlib.suppress(PoolError):
            pids |= await self._pool.control_pids()
            view = await self._pool.state()
            self._traces.note(view.launches.values())
            workers = sum(
                resident_bytes(report.pids.get("worker", 0)) for report in view.launches.values()
            )
            browsers = sum(view.memory_bytes.values())
        control = {name: resident_bytes(pid) for name, pid in pids.items()}
        self._samples.append(MemorySample(operations, self._elapsed(), control, workers, browsers))
