"""Breakers for tests: one that a script of calls happens to, and one with a clock by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from recovery.breaker import (
    Breaker,
    BreakerConfig,
    Change,
    CircuitBreaker,
    CircuitState,
    Event,
    Failed,
    Permit,
    Succeeded,
    admit,
    step,
)
from recovery.errors import BrowserLost
from recovery.failures import Category, Severity
from tests.fakes import failure

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
FORCED_OPEN, DISABLED = CircuitState.FORCED_OPEN, CircuitState.DISABLED
SEVERE, MODERATE, MILD = Severity.SEVERE, Severity.MODERATE, Severity.MILD
CRASH, TIMEOUT, API_ERROR = Category.CRASH, Category.TIMEOUT, Category.API_ERROR

DEFAULT = BreakerConfig()
CONFIG = BreakerConfig(recovery_timeout_jitter=0.0)  # so that 10 s are 10 s
BY_COUNT = BreakerConfig(
    failure_threshold=1000, window_calls=10, minimum_calls=10, failure_rate_threshold=0.5
)
BY_TIME = BreakerConfig(
    failure_threshold=1000, window_seconds=10.0, minimum_calls=4, failure_rate_threshold=0.5
)
BY_SLOWNESS = BreakerConfig(
    window_calls=10, minimum_calls=4, slow_call_rate_threshold=0.5, slow_call_seconds=2.0
)
EVERYTHING = BreakerConfig(
    half_open_max_calls=2,
    window_seconds=30.0,
    minimum_calls=5,
    failure_rate_threshold=0.5,
    slow_call_rate_threshold=0.5,
    slow_call_seconds=4.0,
    probe_timeout=8.0,
)


class Story:
    """A breaker that calls happen to, one second apart unless said otherwise."""

    def __init__(self, config: BreakerConfig = CONFIG) -> None:
        self.config = config
        self.breaker = Breaker()
        self.at = 0.0

    def tell(self, event: Callable[[float], Event], after: float = 1.0) -> Breaker:
        self.at += after
        self.breaker = step(self.breaker, event(self.at), self.config)
        return self.breaker

    def ask(self, after: float = 0.0) -> Permit | None:
        self.at += after
        self.breaker, permit = admit(self.breaker, self.at, self.config)
        return permit

    def asked(self, after: float = 0.0) -> Permit:
        permit = self.ask(after)
        assert permit is not None
        return permit

    def succeed(self, permit: Permit | None = None, after: float = 1.0) -> Breaker:
        permit = permit or self.asked()
        return self.tell(lambda at: Succeeded(at, permit), after)

    def fail(
        self,
        permit: Permit | None = None,
        category: Category = CRASH,
        severity: Severity = SEVERE,
        after: float = 1.0,
        **more,
    ) -> Breaker:
        permit = permit or self.asked()
        return self.tell(lambda at: Failed(at, permit, category, severity, **more), after)

    def open(self) -> Breaker:
        while self.breaker.state is CLOSED:
            self.fail()
        assert self.breaker.state is OPEN
        return self.breaker

    def half_open(self) -> Permit:
        return self.asked(after=self.open().outage.until - self.at)


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Shell(CircuitBreaker):
    """A breaker with a clock of its own, which keeps the changes that it told of."""

    __slots__ = ("changes", "clock")

    def __init__(self, **more) -> None:
        self.changes: list[Change] = []
        self.clock = Clock()
        more = {"recovery_timeout_jitter": 0.0, "on_change": self.changes.append, **more}
        super().__init__("chrome-0", browser="chrome-0", clock=self.clock, wall=lambda: 1e9, **more)

    def trip(self) -> None:
        while self.state is CLOSED:
            self.observe(failure())

    def told(self) -> list[tuple[CircuitState, CircuitState]]:
        return [(change.before, change.after) for change in self.changes]


def crash(error: BaseException | None = None) -> None:
    raise error or BrowserLost("gone")


async def answer_later() -> int:
    await asyncio.sleep(0)
    return 42
