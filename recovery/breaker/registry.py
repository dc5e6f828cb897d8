"""The breakers of one pool, or of one browser's actor: by browser, and by model on a browser.

A pool must never open all circuits at once, or it would answer nothing. So the registry counts the
open peers of a breaker (those of other processes too, as last reported) and keeps a breaker closed
that would exceed the cap, like Envoy's `max_ejection_percent`. A failure counts against the model
on the browser; against the browser only if its scope is wider than one operation.

This module must not act on a failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

from recovery.breaker.circuit import Change, CircuitBreaker, Snapshot, as_failure
from recovery.breaker.config import BreakerConfig, RegistryConfig
from recovery.breaker.metrics import registry_metrics
from recovery.breaker.state import CircuitState, Permit
from recovery.failures import Failure, Scope

_NO_LOCK = nullcontext()
_NOT_SERVING = frozenset({CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.FORCED_OPEN})


class BreakerKey(NamedTuple):
    """A browser (its slot in the pool, whatever its epoch), or a model on it."""

    browser: str
    model: str = ""

    def __str__(self) -> str:
        return f"{self.model} on {self.browser}" if self.model else self.browser


def open_max(peers: int, share: float) -> int:
    """How many of `peers` circuits may be open at once: at least one of two or more, never all."""
    return min(max(int(peers * share), 1 if share else 0), peers - 1)


class CircuitBreakerRegistry:
    """Makes breakers by key, caps how many are open, and adds up their metrics.

    Peers are the browsers, or the browsers that hold the same model. `config` is every browser's,
    `model_config` every model's (the same if not given). `lock` as in `CircuitBreaker`: one for
    all, so that the cap is exact.
    """

    def __init__(
        self,
        config: BreakerConfig | None = None,
        *,
        model_config: BreakerConfig | None = None,
        limits: RegistryConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        on_change: Callable[[Change], object] | None = None,
        lock: AbstractContextManager[Any] = _NO_LOCK,
    ) -> None:
        self.config = config or BreakerConfig()
        self.model_config = model_config or self.config
        self.limits = limits or RegistryConfig()
        self._clock = clock
        self._wall = wall
        self._on_change = on_change
        self._lock = lock
        self._breakers: dict[BreakerKey, CircuitBreaker] = {}  # least recently used first
        self._remote_states: dict[BreakerKey, CircuitState] = {}

    def __len__(self) -> int:
        return len(self._breakers)

    def __repr__(self) -> str:
        return f"<CircuitBreakerRegistry [{len(self)} circuits | {len(self.not_serving())} open]>"

    def breaker(self, browser: str, model: str = "") -> CircuitBreaker:
        """The breaker of a browser or of a model on it, made on first use."""
        key = BreakerKey(browser, model)
        with self._lock:
            breaker = self._breakers.pop(key, None) or self._make(key)
            self._breakers[key] = breaker
        return breaker

    def guard(self, browser: str, model: str) -> BothGuard:
        """A context manager for one call of a model on a browser: both breakers must admit it."""
        return BothGuard(self.breaker(browser), self.breaker(browser, model))

    def forget(self, browser: str, model: str | None = None) -> None:
        """Drop the breakers of a browser, or of one model on it, that has left the pool."""
        for key in [key for key in self._breakers if _is_of(key, browser, model)]:
            del self._breakers[key]
        for key in [key for key in self._remote_states if _is_of(key, browser, model)]:
            del self._remote_states[key]

    # -- the cap --

    def may_open(self, key: BreakerKey) -> bool:
        """Whether one more of this breaker's peers may stop serving."""
        peers = {k: s for k, s in self.states().items() if bool(k.model) is bool(key.model)}
        if key.model:
            peers = {k: s for k, s in peers.items() if k.model == key.model}
        peers.setdefault(key, CircuitState.CLOSED)
        others = sum(state in _NOT_SERVING for k, state in peers.items() if k != key)
        return others < open_max(len(peers), self.limits.open_share_max)

    def note_elsewhere(self, states: Mapping[BreakerKey, CircuitState]) -> None:
        """Set the states of other processes' breakers, as last reported; replaces earlier ones."""
        latest = list(states.items())[-self.limits.breakers_max :]
        self._remote_states = dict(latest)

    def states(self) -> dict[BreakerKey, CircuitState]:
        """The states of all known circuits, in this process and others."""
        local = {key: breaker.state for key, breaker in self._breakers.copy().items()}
        return {**self._remote_states, **local}

    def not_serving(self) -> tuple[BreakerKey, ...]:
        """The keys of the circuits that refuse calls, or are being probed."""
        return tuple(key for key, state in self.states().items() if state in _NOT_SERVING)

    # -- metrics and snapshots --

    def get_metrics(self) -> dict[str, Any]:
        """The sums over all breakers of this process, and each one's metrics by its name."""
        circuits = {
            str(key): breaker.get_metrics() for key, breaker in self._breakers.copy().items()
        }
        return registry_metrics(circuits)

    def snapshot(self, browser: str) -> dict[BreakerKey, Snapshot]:
        """A browser's breakers, for its next epoch."""
        return {
            key: breaker.snapshot()
            for key, breaker in self._breakers.copy().items()
            if key.browser == browser
        }

    def restore(self, snapshots: Mapping[BreakerKey, Snapshot]) -> None:
        """Continue from another process's breakers."""
        for key, snapshot in snapshots.items():
            self.breaker(*key).restore(snapshot)

    def _make(self, key: BreakerKey) -> CircuitBreaker:
        if len(self._breakers) >= self.limits.breakers_max:
            closed = (k for k, b in self._breakers.items() if b.state is CircuitState.CLOSED)
            del self._breakers[next(closed, next(iter(self._breakers)))]
        return CircuitBreaker(
            str(key),
            self.model_config if key.model else self.config,
            browser=key.browser,
            clock=self._clock,
            wall=self._wall,
            on_change=self._on_change,
            may_open=lambda: self.may_open(key),
            lock=self._lock,
        )


class BothGuard:
    """Protects one call of a model on a browser by the breakers of both."""

    __slots__ = ("_browser", "_browser_permit", "_model", "_model_permit")

    def __init__(self, browser: CircuitBreaker, model: CircuitBreaker) -> None:
        self._browser = browser
        self._model = model

    def __enter__(self) -> None:
        self._browser_permit: Permit = self._browser.allow()
        try:
            self._model_permit: Permit = self._model.allow()
        except BaseException:
            self._browser.abandon(self._browser_permit)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._model.success(self._model_permit)
            self._browser.success(self._browser_permit)
            return
        failure: Failure | BaseException = error
        if self._model.counts(error):
            failure = as_failure(error)
        self._model.failure(self._model_permit, failure)
        if isinstance(failure, Failure) and failure.scope is Scope.OPERATION:
            # Neither a failure of the browser nor a sign that it is healthy.
            self._browser.abandon(self._browser_permit)
        else:
            self._browser.failure(self._browser_permit, failure)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)


def _is_of(key: BreakerKey, browser: str, model: str | None) -> bool:
    return key.browser == browser and (model is None or key.model == model)
