"""The circuit breakers of one browser: its own, and one for each model on it.

A failure of one operation counts against the model. A failure with a wider scope (the browser
died, its connection broke) is counted once by the browser's breaker, and not again for each
operation that it interrupted. This module must not act on a failure, nor wait.
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

_FOR_EVER_SECONDS = 1e9  # until switched by hand: statuses are sent as JSON, without infinity
_REFUSING = frozenset({CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.FORCED_OPEN})


class _OwnRegistry(CircuitBreakerRegistry):
    """A registry of one browser, with the states of its peers.

    Without peers (no supervisor has reported any) the cap on open breakers does not apply.
    """

    has_peers = False

    def may_open(self, key: BreakerKey) -> bool:
        return not self.has_peers or super().may_open(key)


class Admission:
    """Permits of both breakers for one operation. Report its outcome once."""

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
        """The operation failed. `retried`: it will be retried on another browser."""
        self._model.failure(self._model_permit, failure, retried=retried)
        self._browser.abandon(self._browser_permit)  # counts neither for nor against the browser

    def abandoned(self) -> None:
        """It ended without saying anything about the model: cancelled, or the browser died."""
        self._model.abandon(self._model_permit)
        self._browser.abandon(self._browser_permit)


class HostBreakers:
    """`on_change` is called with breakers that changed state, as `{model or "": snapshot}`."""

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
        self._refusing: dict[str, CircuitBreaker] = {}  # those that `blocked` must check

    def admit(self, model: str) -> Admission | None:
        """Admit one operation on a model; None while either breaker refuses."""
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
        """Count a failure with a wider scope than one operation."""
        self._registry.breaker(self._browser_id).observe(failure)

    def repaired(self, method: str) -> None:
        """The browser was repaired by `method`, which is credited if its breakers close now."""
        for key in self._registry.snapshot(self._browser_id):
            self._registry.breaker(*key).repaired(method)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Metrics of each breaker, by model ("" the browser's own)."""
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
        if not self._refusing:  # the usual case, on the hot path
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
        """Take the breaker states of the pool's other browsers, for the cap on open ones."""
        self._registry.has_peers = True
        self._registry.note_elsewhere(states)

    def forget(self, model: str) -> None:
        """The model was unloaded."""
        self._registry.forget(self._browser_id, model)
        self._refusing.pop(model, None)

    def snapshots(self) -> dict[str, Snapshot]:
        """By model ("" the browser's own), for `restore` in another process."""
        kept = self._registry.snapshot(self._browser_id)
        return {key.model: snapshot for key, snapshot in kept.items()}

    def restore(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Restore the state of another worker's breakers of this slot, without `on_change`."""
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
        # An operation that outlived its model's breaker finds none here.
        changed = {key.model: each for key, each in kept.items() if str(key) == change.name}
        for model in changed:
            self._sort(model)
        if changed:
            self._on_change(changed)
