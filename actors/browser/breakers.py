"""The circuit breakers of one browser: its own, and one for each model on it.

What fails within one operation counts against the model. What reaches further (the browser died,
its connection broke) is told to the browser's breaker once, by whoever noticed it, and not again
by each operation that it took along. This module must not act on a failure, nor wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from recovery.breaker import (
    BreakerConfig,
    BreakerKey,
    BreakerSwitch,
    Change,
    CircuitBreaker,
    CircuitBreakerRegistry,
    CircuitOpenError,
    CircuitState,
    Permit,
    RegistryConfig,
    Snapshot,
    retry_at,
)
from recovery.failures import Failure

_FOR_EVER_SECONDS = 1e9  # until somebody switches it: statuses cross as JSON, without infinity
_REFUSING = frozenset({CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.FORCED_OPEN})


class _OwnRegistry(CircuitBreakerRegistry):
    """A registry of one browser, with what it was told of its peers.

    A browser that was never told of any (it has no supervisor) has no pool to be capped for.
    """

    told = False

    def may_open(self, key: BreakerKey) -> bool:
        return not self.told or super().may_open(key)


class Admission:
    """Leave for one operation by both breakers. Report it once, in one of three ways."""

    __slots__ = ("_browser", "_browser_permit", "_model", "_model_permit")

    def __init__(
        self,
        browser: CircuitBreaker,
        browser_permit: Permit,
        model: CircuitBreaker,
        model_permit: Permit,
    ) -> None:
        self._browser = browser
        self._browser_permit = browser_permit
        self._model = model
        self._model_permit = model_permit

    @property
    def on_trial(self) -> bool:
        """Whether a breaker is half-open, so that this operation is its probe."""
        return CircuitState.HALF_OPEN in (self._browser.state, self._model.state)

    def succeeded(self) -> None:
        self._model.success(self._model_permit)
        self._browser.success(self._browser_permit)

    def failed(self, failure: Failure, *, retried: bool) -> None:
        """The operation itself failed. `retried`: it will be tried again elsewhere."""
        self._model.failure(self._model_permit, failure, retried=retried)
        self._browser.abandon(self._browser_permit)  # neither its fault nor a sign that it is well

    def abandoned(self) -> None:
        """It ended without a verdict on the model: cancelled, say, or taken along by a death."""
        self._model.abandon(self._model_permit)
        self._browser.abandon(self._browser_permit)


class HostBreakers:
    """`on_change` hears of a breaker that changed its state, as `{model or "": snapshot}`."""

    def __init__(
        self,
        browser_id: str,
        config: BreakerConfig,
        on_change: Callable[[Mapping[str, Snapshot]], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        *,
        model_config: BreakerConfig | None = None,
        limits: RegistryConfig | None = None,
    ) -> None:
        self._browser_id = browser_id
        self._on_change = on_change
        self._clock = clock
        self._registry = _OwnRegistry(
            config,
            model_config=model_config,
            limits=limits,
            clock=clock,
            wall=wall,
            on_change=self._changed,
        )
        self._refusing: dict[str, CircuitBreaker] = {}  # those to look at for `blocked`

    def admit(self, model: str) -> Admission | None:
        """Leave for one operation on a model; None while either breaker refuses."""
        registry, browser_id = self._registry, self._browser_id
        browser, own = registry.breaker(browser_id), registry.breaker(browser_id, model)
        try:
            browser_permit = browser.allow()
        except CircuitOpenError:
            return None
        try:
            return Admission(browser, browser_permit, own, own.allow())
        except CircuitOpenError:
            browser.abandon(browser_permit)
            return None

    def observe(self, failure: Failure) -> None:
        """Something failed that reaches further than one operation."""
        self._registry.breaker(self._browser_id).observe(failure)

    def repaired(self, method: str) -> None:
        """The browser was repaired by `method`: if its circuits close now, that is what did it."""
        for key in self._registry.snapshot(self._browser_id):
            self._registry.breaker(*key).repaired(method)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """What each breaker has counted, by model ("" the browser's own)."""
        kept = self._registry.snapshot(self._browser_id)
        return {key.model: self._registry.breaker(*key).get_metrics() for key in kept}

    def switch(self, model: str, to: BreakerSwitch) -> None:
        """Set one breaker by hand; the empty model is the browser's own."""
        breaker = self._registry.breaker(self._browser_id, model)
        match to:
            case BreakerSwitch.FORCE_OPEN:
                breaker.force_open()
            case BreakerSwitch.DISABLE:
                breaker.disable()
            case BreakerSwitch.RESET:
                breaker.reset()

    def blocked(self) -> dict[str, float]:
        """For how many seconds operations are refused: by model, or by "" for all."""
        if not self._refusing:  # nearly always, and asked several times per operation
            return {}
        seconds = {model: self._blocked_seconds(each) for model, each in self._refusing.items()}
        return {model: left for model, left in seconds.items() if left > 0.0}

    def _blocked_seconds(self, breaker: CircuitBreaker) -> float:
        state, config = breaker.breaker, breaker.config
        probes = len(state.outage.probes)
        if state.state is CircuitState.HALF_OPEN and probes < config.half_open_max_calls:
            return 0.0
        until = retry_at(state, config)
        if until is None:
            return _FOR_EVER_SECONDS
        return min(until - self._clock(), _FOR_EVER_SECONDS)

    def note_peers(self, states: Mapping[BreakerKey, CircuitState]) -> None:
        """How the circuits of the pool's other browsers are: only so many may be open at once."""
        self._registry.told = True
        self._registry.note_elsewhere(states)

    def forget(self, model: str) -> None:
        """The model was unloaded."""
        self._registry.forget(self._browser_id, model)
        self._refusing.pop(model, None)

    def snapshots(self) -> dict[str, Snapshot]:
        """By model ("" the browser's own), for another process to go on with."""
        kept = self._registry.snapshot(self._browser_id)
        return {key.model: snapshot for key, snapshot in kept.items()}

    def restore(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Go on where another worker's breakers of this slot were. Tells of no change."""
        keys = {BreakerKey(self._browser_id, model): each for model, each in snapshots.items()}
        self._registry.restore(keys)
        for model in snapshots:
            self._sort(model)

    def _sort(self, model: str) -> None:
        breaker = self._registry.breaker(self._browser_id, model)
        if breaker.state in _REFUSING:
            self._refusing[model] = breaker
        else:
            self._refusing.pop(model, None)

    def _changed(self, change: Change) -> None:
        kept = self._registry.snapshot(self._browser_id)
        # A report of an operation that outlived its model's breaker finds none, and is no news.
        moved = {key.model: each for key, each in kept.items() if str(key) == change.name}
        for model in moved:
            self._sort(model)
        if moved:
            self._on_change(moved)
