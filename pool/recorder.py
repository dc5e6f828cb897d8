"""One client's samples and metrics: noted at once, handed on behind, never waited for.

An operation only appends to a bounded buffer. A task hands what is there to the pool's history and
to Ray's metrics, one batch at a time; what does not fit meanwhile is dropped, oldest first, and
counted. This module must not fail an operation, whatever becomes of its sample.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pool.models.registry import ModelEntry
from pool.results import Result
from recovery.errors import PoolError
from recovery.history.samples import OperationSample, Sample
from recovery.records import HostStatus

_HAND_ON_SECONDS = 0.5
_HISTORY_SECONDS = 5.0  # for one batch
_BUFFER_MAX = 10_000


class SampleSink(Protocol):
    async def add(self, samples: Sequence[Sample]) -> None: ...


class MetricsSink(Protocol):
    def ended(self, sample: OperationSample) -> None: ...
    def now(self, client: str, in_flight: int, hosts: Iterable[HostStatus]) -> None: ...


class Recorder:
    """Takes the results of one client. `look` gives what is in flight, and the known hosts."""

    def __init__(
        self,
        pool: str,
        client: str,
        strategy: str,
        history: SampleSink | None,
        metrics: MetricsSink | None,
        look: Callable[[], tuple[int, Iterable[HostStatus]]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._client = client
        self._strategy = strategy
        self._history = history
        self._metrics = metrics
        self._look = look
        self._wall = wall
        self._waiting: deque[OperationSample] = deque()
        self._unsent: deque[OperationSample] = deque()  # measured, and not in the history yet
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    async def start(self) -> None:
        self._task = asyncio.create_task(self._hand_on_loop(), name="recorder")

    async def stop(self) -> None:
        """Hand on what is left, if that is quick."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * _HAND_ON_SECONDS):
                await self._hand_on()

    def note(self, result: Result, entry: ModelEntry) -> None:
        """One operation has ended."""
        if len(self._waiting) >= _BUFFER_MAX:
            self._waiting.popleft()
            self.dropped += 1
        first, metrics = result.original_error, result.metrics
        self._waiting.append(
            OperationSample(
                at=self._wall(),
                pool=self._pool,
                op_id=result.op_id,
                model=result.model,
                model_type=entry.spec.type,
                op=result.op,
                browser_id=result.browser_id,
                browser_type=result.browser_type,
                epoch=result.epoch,
                backend=result.backend,
                level=result.level_effective,
                strategy=self._strategy,
                success=result.success,
                recovered=result.recovered,
                simulated=result.simulated,
                attempts=int(metrics.get("attempts", 0)),
                duration_ms=metrics.get("duration_ms", 0.0),
                in_page_ms=metrics.get("in_page_ms", 0.0),
                queue_ms=metrics.get("queue_ms", 0.0),
                bytes_in=int(metrics.get("bytes_in", 0)),
                bytes_out=int(metrics.get("bytes_out", 0)),
                category=first.category if first else None,
                fingerprint=str(first.fingerprint) if first else "",
            )
        )

    async def _hand_on_loop(self) -> None:
        while True:
            await asyncio.sleep(_HAND_ON_SECONDS)
            await self._hand_on()

    async def _hand_on(self) -> None:
        samples = list(self._waiting)
        self._waiting.clear()
        if self._metrics is not None:
            for sample in samples:
                self._metrics.ended(sample)
            in_flight, hosts = self._look()
            self._metrics.now(self._client, in_flight, hosts)
        if self._history is None:
            return
        self._unsent.extend(samples)
        while len(self._unsent) > _BUFFER_MAX:
            self._unsent.popleft()
            self.dropped += 1
        batch = list(self._unsent)
        if not batch:
            return
        # The history may be away for a while: what it did not take is kept for the next turn.
        with contextlib.suppress(PoolError, TimeoutError):
            async with asyncio.timeout(_HISTORY_SECONDS):
                await self._history.add(batch)
            self._unsent.clear()
