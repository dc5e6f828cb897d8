"""The one writer of a pool's samples: takes them in at once, stores them in batches behind.

A plain class, wrapped as a Ray actor in `actors.ray.workers`. Nobody waits for it: `add` only
fills the store's bounded buffer, and a thread writes. It must not judge what it stores.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recovery.errors import PoolError
from recovery.history.questions import checked_options
from recovery.history.samples import Sample
from recovery.history.schema import VIEWS
from recovery.history.store import HistoryStore, HistoryUnavailable
from recovery.history.tracker import PerformanceHistoryTracker

_FLUSH_SECONDS = 1.0


class HistoryKeeper:
    """Keeps samples in `path`, or in `spare` if another pool of this machine writes to `path`."""

    def __init__(self, path: Path, spare: Path, make: Callable[..., HistoryStore] = HistoryStore):
        self._paths = [path, spare]
        self._make = make
        self._store: HistoryStore | None = None
        self._flushing: asyncio.Task[None] | None = None
        self.trouble = ""

    async def open(self) -> str:
        """Returns the path that is written to; empty, and `trouble` says why, if none can be."""
        for path in self._paths:
            store = self._make(path)
            try:
                await asyncio.to_thread(store.open)
            except HistoryUnavailable as error:
                self.trouble = str(error)
                continue
            self._store, self.trouble = store, ""
            self._flushing = asyncio.create_task(self._flush_loop(store), name="flush")
            return str(path)
        return ""

    @property
    def is_open(self) -> bool:
        return self._store is not None

    def add(self, samples: Sequence[Sample]) -> None:
        """Take samples in. Never waits and never raises: what can't be kept is counted."""
        if self._store is not None:
            self._store.add(samples)

    async def ask(self, question: str, **options: Any) -> Any:
        """Answer from all that was added before: by a method of `PerformanceHistoryTracker`, or
        with the rows of the view of that name. Raises `BadInput`."""
        options = checked_options(question, options)
        store = self._require()
        await asyncio.to_thread(store.flush)
        tracker = PerformanceHistoryTracker(store)
        if question in VIEWS:
            return await asyncio.to_thread(tracker.view, question, **options)
        return await asyncio.to_thread(getattr(tracker, question), **options)

    async def query(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of one SELECT over the tables and views of `recovery.history.schema`."""
        store = self._require()
        await asyncio.to_thread(store.flush)
        return await asyncio.to_thread(store.query, sql, list(params))

    async def close(self) -> None:
        """Write what waits and let the file go."""
        if self._flushing is not None:
            self._flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flushing
        store, self._store = self._store, None
        if store is not None:
            await asyncio.to_thread(store.close)

    def _require(self) -> HistoryStore:
        if self._store is None:
            raise HistoryUnavailable(f"this pool keeps no history: {self.trouble or 'it is off'}")
        return self._store

    async def _flush_loop(self, store: HistoryStore) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            if not store.pending:
                continue
            try:
                await asyncio.to_thread(store.flush)
            except PoolError as error:  # its samples wait for the next turn, up to the bound
                self.trouble = str(error)
            else:
                self.trouble = ""
