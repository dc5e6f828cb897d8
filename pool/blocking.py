"""`BrowserPool` without `await`: its event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from pool.models.registry import ModelEntry
from pool.results import Result
from pool.view import PoolView

_T = TypeVar("_T")


class AwaitedPool(Protocol):
    """What a `BrowserPool` has that is offered here without `await`."""

    @property
    def name(self) -> str: ...
    async def open(self) -> Any: ...
    async def close(self) -> None: ...
    async def shutdown(self) -> None: ...
    @property
    def load(self) -> Callable[..., Coroutine[Any, Any, ModelEntry]]: ...
    async def unload(self, name: str) -> None: ...
    @property
    def run_with_recovery(self) -> Callable[..., Coroutine[Any, Any, Result]]: ...
    def models(self) -> tuple[str, ...]: ...
    async def state(self) -> PoolView: ...
    async def drain(self, browser_id: str) -> None: ...
    async def scale(self, browsers: Mapping[str, int]) -> None: ...
    async def get_recovery_statistics(self, since: float | None = None) -> dict[str, Any]: ...
    async def export_telemetry(self) -> dict[str, Any]: ...


class BlockingPool:
    """A pool whose calls return when they are done. Safe to use from several threads."""

    def __init__(self, pool: AwaitedPool) -> None:
        self._pool = pool
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=pool.name, daemon=True)

    def __repr__(self) -> str:
        return f"{self._pool!r}.blocking()"

    def _start(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        if not self._thread.is_alive():
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def open(self) -> Self:
        try:
            self._start(self._pool.open()).result()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stop the pool and the thread. Closing it again does nothing."""
        if self._loop.is_closed():
            return
        self._start(self._pool.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def load(self, name: str, path: str | Path, **options: Any) -> ModelEntry:
        return self._start(self._pool.load(name, path, **options)).result()

    def unload(self, name: str) -> None:
        self._start(self._pool.unload(name)).result()

    def run_with_recovery(
        self, model: str, op: str, inputs: Mapping[str, Any], **options: Any
    ) -> Result:
        return self.submit(model, op, inputs, **options).result()

    def submit(
        self, model: str, op: str, inputs: Mapping[str, Any], **options: Any
    ) -> Future[Result]:
        """Like `run_with_recovery`, but returns a `concurrent.futures.Future` at once."""
        return self._start(self._pool.run_with_recovery(model, op, inputs, **options))

    def models(self) -> tuple[str, ...]:
        return self._pool.models()

    def shutdown(self) -> None:
        """Stop the pool for everybody, also from an attached client."""
        self._start(self._pool.shutdown()).result()

    def state(self) -> PoolView:
        return self._start(self._pool.state()).result()

    def drain(self, browser_id: str) -> None:
        self._start(self._pool.drain(browser_id)).result()

    def scale(self, browsers: Mapping[str, int]) -> None:
        self._start(self._pool.scale(browsers)).result()

    def get_recovery_statistics(self, since: float | None = None) -> dict[str, Any]:
        return self._start(self._pool.get_recovery_statistics(since)).result()

    def export_telemetry(self) -> dict[str, Any]:
        return self._start(self._pool.export_telemetry()).result()
