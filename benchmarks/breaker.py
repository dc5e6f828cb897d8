"""Overhead of a circuit breaker per admitted call, compared with other libraries.

Every library protects the same empty function in one thread, interleaved in one run; the cost of
the bare call is subtracted. "Everything" is a registry's breaker with a window by time, both rates,
a lock and a listener: the others have none of these but the listener and, at pybreaker, a lock.
The peers are the `bench` extra; one that is not installed is named and left out.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import repeat

from rich.console import Console
from rich.progress import Progress

from benchmarks.report import Report, run
from recovery.breaker import (
    Asked,
    Breaker,
    BreakerConfig,
    CircuitBreaker,
    CircuitBreakerRegistry,
    CircuitOpenError,
    Succeeded,
    admit,
    step,
    succeed,
)

GOAL_US = 5.0
EVERYTHING = BreakerConfig(
    half_open_max_calls=2,
    window_seconds=60.0,
    failure_rate_threshold=0.5,
    slow_call_rate_threshold=0.5,
    slow_call_seconds=1.0,
)
_CALLS = 200  # a turn: shorter than the scheduler's, so that few turns are interrupted
PEERS = ("pybreaker", "purgatory", "aiobreaker")


def _nothing() -> None:
    pass


def _ours() -> dict[str, Callable[[], object]]:
    registry = CircuitBreakerRegistry(EVERYTHING, on_change=_ignore, lock=threading.Lock())
    registry.breaker("firefox-0")
    full = registry.breaker("chrome-0")
    plain = CircuitBreaker("chrome-0")
    refusing = CircuitBreaker("chrome-0")
    refusing.force_open()

    def guard() -> None:
        with full.guard():
            _nothing()

    def manual() -> None:
        permit = full.allow()
        _nothing()
        full.success(permit)

    def refused() -> None:
        try:
            refusing.allow()
        except CircuitOpenError:
            _nothing()

    return {
        "guard_everything": guard,
        "execute_everything": lambda: full.execute(_nothing),
        "manual_everything": manual,
        "execute_defaults": lambda: plain.execute(_nothing),
        "refused": refused,
        "state_machine": _machine(BreakerConfig()),
        "state_machine_everything": _machine(EVERYTHING),
        "state_machine_by_events": _machine_by_events(EVERYTHING),
    }


def _machine(config: BreakerConfig) -> Callable[[], object]:
    """The transitions of a call alone: no shell, no clock."""
    breaker = Breaker()

    def call() -> None:
        nonlocal breaker
        _nothing()
        asked, permit = admit(breaker, 1.0, config)
        if permit is not None:
            breaker = succeed(asked, 1.5, permit, config)

    return call


def _machine_by_events(config: BreakerConfig) -> Callable[[], object]:
    breaker = Breaker()
    permit = admit(breaker, 1.0, config)[1]
    if permit is None:
        raise AssertionError("a closed breaker refused a call")

    def call() -> None:
        nonlocal breaker
        _nothing()
        breaker = step(breaker, Asked(1.0), config)
        breaker = step(breaker, Succeeded(1.5, permit), config)

    return call


def _theirs() -> dict[str, Callable[[], object]]:
    """The peers that are installed, each called in the way that its own documentation shows."""
    peers: dict[str, Callable[[], object]] = {}
    try:
        import pybreaker

        other = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=10)
        peers["pybreaker"] = lambda: other.call(_nothing)
    except ImportError:
        pass
    try:
        import purgatory

        context = purgatory.SyncCircuitBreakerFactory(default_threshold=3, default_ttl=10)
        protected = context.get_breaker("chrome-0")

        def with_purgatory() -> None:
            with protected:
                _nothing()

        peers["purgatory"] = with_purgatory
    except ImportError:
        pass
    try:
        import aiobreaker

        third = aiobreaker.CircuitBreaker(fail_max=3)
        peers["aiobreaker"] = lambda: third.call(_nothing)
    except ImportError:
        pass
    return peers


def _ignore(change: object) -> None:
    pass


def _microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in repeat(None, _CALLS):
        call()
    return (time.perf_counter() - began) * 1e6 / _CALLS


def measure(report: Report, quick: bool, console: Console) -> None:
    rounds = 300 if quick else 3_000
    ours, theirs = _ours(), _theirs()
    for name in PEERS:
        if name in theirs:
            console.print(f"{name} {version(name)}")
        else:
            console.print(f"{name} is not installed, and left out: pip install 'tabpool\\[bench]'")
    contenders = {"bare": lambda: _nothing(), **ours, **theirs}
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        _microseconds(call)  # warm up
    with Progress(console=console) as progress:
        for _ in progress.track(range(rounds), description="rounds"):
            for name, call in contenders.items():
                took[name].append(_microseconds(call))
    bare = statistics.median(took.pop("bare"))
    cost = {name: statistics.median(times) - bare for name, times in took.items()}
    for name in ours:
        with_goal = name in ("guard_everything", "execute_everything", "manual_everything")
        report.add(
            name,
            cost[name],
            "µs",
            goal=f"at most {GOAL_US:g} µs" if with_goal else "",
            met=cost[name] <= GOAL_US if with_goal else None,
        )
    for name in theirs:
        for mine in ("execute_everything", "execute_defaults"):
            key = f"{mine}_and_{name}"
            report.add(key, cost[mine], "µs", baseline=cost[name], ratio=cost[name] / cost[mine])


if __name__ == "__main__":
    sys.exit(run("breaker", measure))
