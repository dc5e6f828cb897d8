"""`CircuitBreaker`: protects calls with a breaker's state, and reports changes of state.

It holds the current state, reads the clocks and passes events to `recovery.breaker.state`, which
makes the next state. It never holds its lock during a call. This module must not wait, retry or
repair, nor decide on a transition.
"""

from __future__ import annotations

import functools
import inspect
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast, overload

from recovery.breaker.config import BreakerConfig, configured
from recovery.breaker.metrics import circuit_metrics
from recovery.breaker.state import (
    Abandoned,
    Breaker,
    CircuitState,
    Event,
    Failed,
    Permit,
    Repaired,
    Switched,
    Ticked,
    admit,
    fail,
    retry_at,
    shifted,
    step,
    succeed,
)
from recovery.errors import BrowserError, CallerError, OperationFailed, PoolBusy
from recovery.failures import Category, Failure, Scope, categorize_browser_failure

P = ParamSpec("P")
T = TypeVar("T")


class CircuitOpenError(BrowserError):
    """The breaker refused the call, which was not started. Retry later, or on another browser."""

    @property
    def retry_after(self) -> float | None:
        """Seconds after which to retry; None: not before the breaker is reset by hand."""
        seconds = self.fields.get("retry_after")
        return None if seconds is None else float(seconds)


@dataclass(frozen=True)
class Change:
    """A breaker's state changed. `at` is wall time in seconds since the epoch.

    `retry_after` is how long it will be open (None in any other state), `category` the failure
    that opened it.
    """

    name: str
    before: CircuitState
    after: CircuitState
    generation: int
    at: float
    retry_after: float | None = None
    category: Category | None = None


@dataclass(frozen=True)
class Snapshot:
    """A breaker that another process can continue: its times are relative to `at` (wall time)."""

    breaker: Breaker
    refused: int
    at: float


_NO_LOCK = nullcontext()
_IGNORED = (CallerError, PoolBusy, CircuitOpenError)
_WIDE = frozenset({Scope.NODE, Scope.SUPERVISOR, Scope.STORE, Scope.POOL})
_COROUTINE = inspect.CO_COROUTINE


def _always() -> bool:
    return True


class CircuitBreaker:
    """One breaker. Protect a call in whichever form suits it:

        breaker.execute(fn, *args)                  # await it, if fn is async
        @breaker                                    # on a function, async or not
        with breaker.guard(): ...                   # or `async with`
        permit = breaker.allow()                    # then success, failure or abandon, once

    While the breaker refuses, all raise `CircuitOpenError` instead of calling. An error that
    the call raises is a failure, except caller errors and `PoolBusy` (`ignored`); a cancelled
    call counts as neither success nor failure.

    Settings are a `BreakerConfig`, or its fields by name. One thread (or event loop) needs no
    lock; several that share a breaker pass `lock=threading.Lock()`, which is held for the
    transition only. `on_change` is called once for each change of state, outside the lock, and
    must not raise. `may_open` is called before the breaker opens from the closed state.
    """

    __slots__ = (
        "_breaker",
        "_clock",
        "_ignored",
        "_lock",
        "_may_open",
        "_on_change",
        "_refused",
        "_wall",
        "browser",
        "config",
        "name",
    )

    def __init__(
        self,
        name: str = "breaker",
        config: BreakerConfig | None = None,
        *,
        browser: str = "",
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        on_change: Callable[[Change], object] | None = None,
        may_open: Callable[[], bool] = _always,
        lock: AbstractContextManager[Any] = _NO_LOCK,
        ignored: tuple[type[BaseException], ...] = _IGNORED,
        **settings: Any,
    ) -> None:
        self.name = name
        self.browser = browser
        self.config = configured(config or BreakerConfig(), settings)
        self._clock = clock
        self._wall = wall
        self._on_change = on_change
        self._may_open = may_open
        self._lock = lock
        self._ignored = ignored
        self._refused = 0
        # The seed differs by name, so that breakers of one pool don't all probe at the same moment.
        seed = zlib.crc32(name.encode()) if seed is None else seed
        self._breaker = Breaker(since=clock(), seed=seed)

    def __repr__(self) -> str:
        calls = self._breaker.calls
        return (
            f"<CircuitBreaker {self.name} [{self._breaker.state} | "
            f"{calls.successes} succeeded, {calls.failures} failed, {self._refused} refused]>"
        )

    @property
    def state(self) -> CircuitState:
        """The state after the last event: OPEN ends only when the first probe is admitted."""
        return self._breaker.state

    @property
    def breaker(self) -> Breaker:
        """The whole state, as data."""
        return self._breaker

    def get_state(self) -> str:
        return str(self._breaker.state)

    # -- by hand --

    def allow(self) -> Permit:
        """A permit for one call, to be reported once. Raises `CircuitOpenError`."""
        at = self._clock()
        before = self._breaker
        after, permit = admit(before, at, self.config)
        if after is not before:  # rare: while closed, no call takes the lock
            with self._lock:
                before = self._breaker
                after, permit = admit(before, at, self.config)
                self._breaker = after
            self._notify(before, after, at)
        if permit is None:
            raise self._refusal(after, at)
        return permit

    def success(self, permit: Permit) -> None:
        with self._lock:
            at = self._clock()
            before = self._breaker
            after = succeed(before, at, permit, self.config)
            if after.state is before.state:
                self._breaker = after
                return
            # It was closed and is not any more: too many slow calls.
            if before.state is CircuitState.CLOSED and not self._may_open():
                after = succeed(before, at, permit, self.config, may_open=False)
            self._breaker = after
        self._notify(before, after, at)

    def failure(
        self,
        permit: Permit | None,
        what: Failure | BaseException,
        *,
        retried: bool = False,
        components: int = 1,
    ) -> None:
        """Report a failure of an admitted call; with no permit, one outside any call.

        `retried`: a retry succeeded. `components`: how many components are affected.
        """
        if isinstance(what, BaseException):
            if not self.counts(what):
                if permit is not None:
                    self.abandon(permit)
                return
            what = as_failure(what)
        if what.scope in _WIDE:
            components = max(components, 2)
        with self._lock:
            at = self._clock()
            before = self._breaker
            event = Failed(at, permit, what.category, what.severity, retried, components)
            after = fail(before, event, self.config)
            opened = after.state is CircuitState.OPEN and before.state is CircuitState.CLOSED
            if opened and not self._may_open():
                after = fail(before, replace(event, may_open=False), self.config)
            self._breaker = after
        self._notify(before, after, at)

    def counts(self, error: BaseException) -> bool:
        """Whether an error raised by a call counts as a failure of what the breaker protects."""
        return isinstance(error, Exception) and not isinstance(error, self._ignored)

    def abandon(self, permit: Permit) -> None:
        """The call ended without a result: its permit is freed, and nothing is counted."""
        self._step(lambda at: Abandoned(at, permit))

    def observe(self, failure: Failure | BaseException) -> None:
        """Report a failure outside any call, such as the death of the browser."""
        self.failure(None, failure)

    def repaired(self, method: str) -> None:
        """Name the repair made during an outage, for the metrics; the state does not change."""
        self._step(lambda at: Repaired(at, method))

    def tick(self) -> None:
        """Fail probes beyond their time limit; `allow` does so, too."""
        self._step(Ticked)

    def force_open(self) -> None:
        """Refuse everything until `reset` or `disable`."""
        self._step(lambda at: Switched(at, CircuitState.FORCED_OPEN))

    def disable(self) -> None:
        """Admit everything until `reset` or `force_open`; calls are still counted."""
        self._step(lambda at: Switched(at, CircuitState.DISABLED))

    def reset(self) -> None:
        """Close it, with no failures counted; this does not count as a recovery."""
        self._step(lambda at: Switched(at, CircuitState.CLOSED))

    # -- around a call --

    def guard(self) -> Guard:
        """A context manager, sync and async, for one call."""
        return Guard(self)

    @overload
    def execute(
        self, fn: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def execute(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...

    def execute(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `fn` if the breaker lets it through. Await the result if `fn` is async."""
        code = getattr(fn, "__code__", None)
        if code.co_flags & _COROUTINE if code is not None else _is_async(fn):
            return self._execute_async(fn, args, kwargs)
        permit = self.allow()
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            self.failure(permit, error)
            raise
        if hasattr(result, "__await__"):  # a plain function that returns something to await
            return self._finish(permit, result)
        self.success(permit)
        return result

    def __call__(self, fn: Callable[P, T]) -> Callable[P, T]:
        """As a decorator."""
        if _is_async(fn):

            @functools.wraps(fn)
            async def protected_async(*args: Any, **kwargs: Any) -> Any:
                return await self._execute_async(fn, args, kwargs)

            return cast(Callable[P, T], protected_async)

        @functools.wraps(fn)
        def protected(*args: P.args, **kwargs: P.kwargs) -> T:
            return self.execute(fn, *args, **kwargs)

        return protected

    async def _execute_async(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        permit = self.allow()
        try:
            result = await fn(*args, **kwargs)
        except BaseException as error:
            self.failure(permit, error)
            raise
        self.success(permit)
        return result

    async def _finish(self, permit: Permit, result: Awaitable[T]) -> T:
        try:
            value = await result
        except BaseException as error:
            self.failure(permit, error)
            raise
        self.success(permit)
        return value

    # -- metrics and snapshots --

    def get_metrics(self) -> dict[str, Any]:
        """The metrics so far. The rates are not significant while `enough_samples` is false.

        `success_rate` is that of the latest `metrics_window_size` calls, `recovery_rate` the
        share of openings that ended in a recovery; both are 0.0 if there were none.
        """
        return circuit_metrics(
            self._breaker,
            self.config,
            browser=self.browser,
            refused=self._refused,
            now=self._clock(),
            wall=self._wall(),
        )

    def snapshot(self) -> Snapshot:
        """The breaker's state, for another process to `restore`."""
        with self._lock:
            return Snapshot(shifted(self._breaker, -self._clock()), self._refused, at=self._wall())

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from another incarnation's breaker; late reports of its calls are ignored."""
        away = max(self._wall() - snapshot.at, 0.0)  # a wall clock may be set back
        with self._lock:
            breaker = shifted(snapshot.breaker, self._clock() - away)
            generation = max(breaker.generation, self._breaker.generation) + 1
            self._breaker = breaker._replace(generation=generation)
            self._refused = snapshot.refused

    # -- inside --

    def _step(self, event: Callable[[float], Event]) -> None:
        with self._lock:
            at = self._clock()
            before = self._breaker
            after = self._breaker = step(before, event(at), self.config)
        self._notify(before, after, at)

    def _notify(self, before: Breaker, after: Breaker, at: float) -> None:
        if self._on_change is None or after.state is before.state:
            return
        opened = after.state is CircuitState.OPEN
        self._on_change(
            Change(
                self.name,
                before.state,
                after.state,
                after.generation,
                self._wall(),
                max(after.outage.until - at, 0.0) if opened else None,
                after.category if opened else None,
            )
        )

    def _refusal(self, breaker: Breaker, at: float) -> CircuitOpenError:
        self._refused += 1
        until = retry_at(breaker, self.config)
        seconds = None if until is None else max(until - at, 0.0)
        if seconds is None:
            why = "is forced open: reset it to admit calls"
        elif breaker.state is CircuitState.HALF_OPEN:
            why = f"is being probed: try again after the probe, or in {seconds:.3g} s"
        else:
            why = f"is open ({breaker.category or 'slow'}): try again in {seconds:.3g} s"
        return CircuitOpenError(
            f"The circuit breaker of {self.name} {why}.",
            breaker=self.name,
            state=str(breaker.state),
            retry_after=seconds,
        )


class Guard:
    """Protects the one call inside its `with` block."""

    __slots__ = ("_breaker", "_permit")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker

    def __enter__(self) -> None:
        self._permit = self._breaker.allow()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._breaker.success(self._permit)
        else:
            self._breaker.failure(self._permit, error)

    async def __aenter__(self) -> None:
        self._permit = self._breaker.allow()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)


def as_failure(error: BaseException) -> Failure:
    """The failure that a call's error stands for."""
    if isinstance(error, OperationFailed) and isinstance(error.failure, Failure):
        return error.failure
    return categorize_browser_failure(error)


def _is_async(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004 - the object's own, async or not
    )
