"""The circuit breaker: frozen data, transition functions, and a small shell around them.

Everything that affects a breaker's state is in the first half of this file. `admit` answers a
call that asks to go through; `step` makes the next state of any event; `succeed` and `fail` are
the two that every call takes, so that the shell can reach them without an event. Time arrives as
an argument (monotonic seconds), and the jitter comes from a seed in the state. An illegal event
raises `IllegalTransition` and leaves the state alone.

Each admitted call gets a `Permit` with the breaker's generation, which changes with every state:
a report from another generation is late, and changes nothing.

The states are named tuples where the rest of the house has frozen dataclasses: a call makes three
of them, and a frozen dataclass takes four times as long to make.

The shell (`CircuitBreaker`) holds the current state, reads the clock and tells of changes. It
never holds its lock across a call. This module must not wait, retry or repair.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast, overload

from recovery.errors import (
    BadInput,
    BrowserError,
    CallerError,
    IllegalTransition,
    OperationFailed,
    PoolBusy,
)
from recovery.failures import Category, Failure, Scope, Severity, categorize_browser_failure

P = ParamSpec("P")
T = TypeVar("T")

_new = tuple.__new__  # what a named tuple's own constructor comes to, in half the time
_BUCKETS = 10  # a window by time slides in steps of a tenth
_GROWTH_STEPS_MAX = 64  # keeps growth ** steps a finite float
_BIGGEST = 1_000_000  # of any count in the configuration


class CircuitState(StrEnum):
    """What a breaker does with a call.

    FORCED_OPEN refuses and DISABLED admits whatever happens, until somebody switches it back.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"


_CLOSED, _OPEN, _HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
_FORCED_OPEN, _DISABLED = CircuitState.FORCED_OPEN, CircuitState.DISABLED


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """When a breaker opens, for how long, and what closes it again. 0 switches a window off."""

    failure_threshold: int = 3  # recorded failures in a row that open it
    recovery_timeout: float = 10.0  # seconds until the first probe; jitter only shortens it
    half_open_max_calls: int = 1  # probes under way at once
    success_threshold: int = 2  # probes in a row that must succeed to close it
    metrics_window_size: int = 100  # latest calls that the rates in the metrics are made of
    min_samples_for_stats: int = 5  # calls below which those rates mean nothing

    window_calls: int = 0  # look at the latest so many calls ...
    window_seconds: float = 0.0  # ... or at those of the latest so many seconds
    minimum_calls: int = 10  # in the window, before a rate counts
    failure_rate_threshold: float = 0.0  # share of failed calls in the window that opens it
    slow_call_rate_threshold: float = 0.0  # share of slow calls in the window that opens it
    slow_call_seconds: float = 0.0  # a call that took so long is slow

    recovery_timeout_growth: float = 2.0  # each opening in a row is so many times longer
    recovery_timeout_max: float = 120.0  # seconds; or recovery_timeout, where that is longer
    recovery_timeout_jitter: float = 0.1  # up to this share is taken off, by chance
    probe_timeout: float = 30.0  # seconds; a probe that hasn't reported by then has failed
    recovery_history_max: int = 32  # recoveries kept for the metrics

    windowed: bool = field(init=False, repr=False, compare=False)
    metrics_mask: int = field(init=False, repr=False, compare=False)
    window_mask: int = field(init=False, repr=False, compare=False)
    bucket_seconds: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("failure_threshold", 1, _BIGGEST),
            ("recovery_timeout", 0.0, math.inf),
            ("half_open_max_calls", 1, _BIGGEST),
            ("success_threshold", 1, _BIGGEST),
            ("metrics_window_size", 1, _BIGGEST),
            ("min_samples_for_stats", 1, _BIGGEST),
            ("window_calls", 0, _BIGGEST),
            ("window_seconds", 0.0, math.inf),
            ("minimum_calls", 1, _BIGGEST),
            ("failure_rate_threshold", 0.0, 1.0),
            ("slow_call_rate_threshold", 0.0, 1.0),
            ("slow_call_seconds", 0.0, math.inf),
            ("recovery_timeout_growth", 1.0, 100.0),
            ("recovery_timeout_max", 0.0, math.inf),
            ("recovery_timeout_jitter", 0.0, 1.0),
            ("probe_timeout", 0.0, math.inf),
            ("recovery_history_max", 0, _BIGGEST),
        ):
            value = getattr(self, name)
            kinds = (int,) if isinstance(low, int) else (int, float)
            if not isinstance(value, kinds) or not low <= value <= high or value == math.inf:
                raise BadInput(
                    f"{name} must be {'a whole' if isinstance(low, int) else 'a'} number "
                    f"from {low} to {high}, and it is {value!r}.",
                    expected=[low, high],
                    got=value,
                )
        by_rate = self.failure_rate_threshold or self.slow_call_rate_threshold
        if self.window_calls and self.window_seconds:
            raise BadInput("A window is by window_calls or by window_seconds, not by both.")
        if by_rate and not (self.window_calls or self.window_seconds):
            raise BadInput("A rate threshold needs a window: window_calls or window_seconds.")
        if bool(self.slow_call_rate_threshold) is not bool(self.slow_call_seconds):
            raise BadInput("slow_call_rate_threshold and slow_call_seconds go together.")
        if 0 < self.window_calls < self.minimum_calls:
            raise BadInput("minimum_calls can't be more than window_calls: no rate would count.")
        windowed = bool(self.window_calls or self.window_seconds)
        object.__setattr__(self, "windowed", windowed)
        object.__setattr__(self, "metrics_mask", (1 << self.metrics_window_size) - 1)
        object.__setattr__(self, "window_mask", (1 << self.window_calls) - 1)
        object.__setattr__(self, "bucket_seconds", self.window_seconds / _BUCKETS)


class Permit(NamedTuple):
    """Leave for one call: report it once. `probe` is 0 but in the half-open state."""

    generation: int
    probe: int
    at: float


class Bucket(NamedTuple):
    """The calls reported in one stretch of a window by time, from `start` on."""

    start: float
    calls: int
    failed: int
    slow: int


class Window(NamedTuple):
    """What the rates are made of: three sums, and what it takes to slide them.

    By count, a bit is a call, the lowest the latest. By time, `buckets` are the stretches before
    the one that began at `start`; what is in that one is the sums less what is in those.
    """

    calls: int = 0
    failed: int = 0
    slow: int = 0
    failed_bits: int = 0
    slow_bits: int = 0
    start: float = 0.0
    buckets: tuple[Bucket, ...] = ()


class Calls(NamedTuple):
    """Reported calls since the breaker was made. `recent`: a bit a call, set where it failed.

    The last seven fields are the window's, here because one tuple is made faster than two.
    """

    successes: int = 0
    failures: int = 0
    recorded: int = 0  # failures that counted towards opening
    slow: int = 0
    recent: int = 0
    shown: int = 0
    shown_failed: int = 0
    shown_slow: int = 0
    failed_bits: int = 0
    slow_bits: int = 0
    start: float = 0.0
    buckets: tuple[Bucket, ...] = ()

    @property
    def window(self) -> Window:
        return Window(*self[5:])

    def with_window(self, window: Window) -> Calls:
        return _new(Calls, (*self[:5], *window))


class Outage(NamedTuple):
    """From the first opening to the next closing; empty while closed."""

    began: float | None = None
    until: float = 0.0  # when the first probe may go through
    openings: int = 0  # in this outage
    probes: tuple[Permit, ...] = ()  # under way
    probes_made: int = 0
    probe_successes: int = 0
    method: str = ""  # what was done about it, if anybody said so


class Recovery(NamedTuple):
    """One outage that ended by probes that succeeded."""

    at: float
    downtime: float
    method: str


class Ledger(NamedTuple):
    """What the metrics tell of outages."""

    openings: int = 0
    recoveries: int = 0
    downtime: float = 0.0  # of all recoveries
    held: int = 0  # times it would have opened, but for the cap of the pool
    history: tuple[Recovery, ...] = ()


class Breaker(NamedTuple):
    """The whole state of one breaker. `category` is that of the failure before, in a row."""

    state: CircuitState = CircuitState.CLOSED
    generation: int = 0
    since: float = 0.0
    failures: int = 0
    category: Category | None = None
    calls: Calls = Calls()
    outage: Outage = Outage()
    ledger: Ledger = Ledger()
    seed: int = 0


# -- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A call wants to go through. `admit` does the same and also answers."""

    at: float


@dataclass(frozen=True, slots=True)
class Succeeded:
    at: float
    permit: Permit


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed; with no permit, something failed outside any call (a browser died).

    `cured`: a retry helped, so the operation did not fail for its caller. `components`: how many
    are affected. `may_open`: whether the pool's cap leaves room for one more open circuit.
    """

    at: float
    permit: Permit | None
    category: Category
    severity: Severity
    cured: bool = False
    components: int = 1
    may_open: bool = True


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A call ended without a verdict (cancelled, or refused for the caller's own fault)."""

    at: float
    permit: Permit


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time went by: probes beyond their limit have failed."""

    at: float


@dataclass(frozen=True, slots=True)
class Repaired:
    """Something was done about an outage. The probes still have to show that it helped."""

    at: float
    method: str


@dataclass(frozen=True, slots=True)
class Switched:
    """Somebody decided: FORCED_OPEN, DISABLED, or CLOSED (start afresh)."""

    at: float
    to: CircuitState


Event = Asked | Succeeded | Failed | Abandoned | Ticked | Repaired | Switched


# -- transitions -----------------------------------------------------------------------------------


def step(breaker: Breaker, event: Event, config: BreakerConfig) -> Breaker:
    """The state after `event`. Raises `IllegalTransition`."""
    match event:
        case Asked(at):
            return admit(breaker, at, config)[0]
        case Succeeded(at, permit):
            return succeed(breaker, at, permit, config)
        case Failed():
            return fail(breaker, event, config)
        case Abandoned(at, permit):
            return _abandon(breaker, at, permit, config)
        case Ticked(at):
            return _expire(breaker, at, config)
        case Repaired(_, method):
            if breaker.outage.began is None:
                return breaker
            return breaker._replace(outage=breaker.outage._replace(method=method))
        case Switched(at, to):
            return _switch(breaker, at, to)


def admit(breaker: Breaker, at: float, config: BreakerConfig) -> tuple[Breaker, Permit | None]:
    """The state after a call asked to go through, and its permit; None: refused."""
    state = breaker.state
    if state is _CLOSED or state is _DISABLED:
        return breaker, _new(Permit, (breaker.generation, 0, at))
    if state is _HALF_OPEN:
        breaker = _expire(breaker, at, config)
        if breaker.state is not _HALF_OPEN:
            return breaker, None
    elif state is _OPEN and at >= breaker.outage.until:
        breaker = _moved(breaker, _HALF_OPEN, at)
    else:
        return breaker, None
    outage = breaker.outage
    if len(outage.probes) >= config.half_open_max_calls:
        return breaker, None
    permit = Permit(breaker.generation, outage.probes_made + 1, at)
    outage = outage._replace(probes=(*outage.probes, permit), probes_made=permit.probe)
    return breaker._replace(outage=outage), permit


def succeed(
    breaker: Breaker,
    at: float,
    permit: Permit,
    config: BreakerConfig,
    *,
    may_open: bool = True,
) -> Breaker:
    """The state after an admitted call succeeded. It can open the breaker by being slow."""
    state, generation, since, _, _, calls, outage, ledger, seed = breaker
    if permit.generation != generation:
        return _late(breaker, permit)
    slow_seconds = config.slow_call_seconds
    slow = 1 if slow_seconds and at - permit.at >= slow_seconds else 0
    if state is _CLOSED:
        calls = _counted(calls, at, 0, 0, slow, config)
        # As `Breaker(...)`, in half the time: this is what nearly every call comes to.
        after = _new(Breaker, (state, generation, since, 0, None, calls, outage, ledger, seed))
        if (calls.shown_failed or calls.shown_slow) and _over_rate(calls, config):
            return _opened(after, at, config) if may_open else _held(after)
        return after
    if state is _DISABLED:
        return breaker._replace(calls=_counted(calls, at, 0, 0, slow, config))
    breaker = _reported(breaker, at, permit, config)
    if breaker.state is not _HALF_OPEN:
        return breaker
    if slow:  # where slowness opens a circuit, a slow probe can't close it
        return _opened(breaker._replace(calls=_counted(calls, at, 0, 0, slow, config)), at, config)
    outage = breaker.outage._replace(probe_successes=breaker.outage.probe_successes + 1)
    breaker = breaker._replace(calls=_counted(calls, at, 0, 0, 0, config), outage=outage)
    return _closed(breaker, at, config) if _enough(outage, config) else breaker


def fail(breaker: Breaker, event: Failed, config: BreakerConfig) -> Breaker:
    """The state after a failure."""
    at, permit = event.at, event.permit
    if permit is not None and permit.generation != breaker.generation:
        return _late(breaker, permit)
    if permit is not None and breaker.state not in (_CLOSED, _DISABLED):
        breaker = _reported(breaker, at, permit, config)
        if breaker.state is not _HALF_OPEN:
            return breaker
    slow_seconds = config.slow_call_seconds
    slow = int(bool(slow_seconds) and permit is not None and at - permit.at >= slow_seconds)
    recorded = breaker.state in (_CLOSED, _HALF_OPEN) and is_recorded(breaker, event)
    calls = _counted(breaker.calls, at, 1, int(recorded), slow, config)
    breaker = breaker._replace(calls=calls)
    if breaker.state is _HALF_OPEN:
        return _opened(breaker._replace(category=event.category), at, config)
    if breaker.state is not _CLOSED:
        return breaker
    breaker = breaker._replace(failures=breaker.failures + int(recorded), category=event.category)
    if breaker.failures >= config.failure_threshold or _over_rate(calls, config):
        return _opened(breaker, at, config) if event.may_open else _held(breaker)
    return breaker


def is_recorded(breaker: Breaker, failure: Failed) -> bool:
    """Whether a failure counts towards opening; every failure counts in the metrics.

    The rules that say "always" come before those that say "never": a mild failure that a retry
    cured is recorded where it is the second of its category in a row.
    """
    if (
        failure.severity is Severity.SEVERE
        or failure.category is Category.CRASH
        or breaker.state is _HALF_OPEN
        or failure.category is breaker.category
    ):
        return True
    if failure.severity is Severity.MILD:
        return not failure.cured
    return not failure.cured or failure.components > 1


def retry_at(breaker: Breaker, config: BreakerConfig) -> float | None:
    """When a call that is refused now may be tried again; None: when somebody switches it.

    Where nothing is refused, a time that has passed.
    """
    if breaker.state is _OPEN:
        return breaker.outage.until
    if breaker.state is _HALF_OPEN and breaker.outage.probes:
        return min(probe.at for probe in breaker.outage.probes) + config.probe_timeout
    return None if breaker.state is _FORCED_OPEN else breaker.since


def open_seconds(breaker: Breaker, config: BreakerConfig) -> float:
    """How long the breaker will stay open if it opens now."""
    steps = min(breaker.outage.openings, _GROWTH_STEPS_MAX)
    longest = max(config.recovery_timeout, config.recovery_timeout_max)
    seconds = min(config.recovery_timeout * config.recovery_timeout_growth**steps, longest)
    chance = random.Random(f"{breaker.seed}:{breaker.generation}").random()
    return seconds * (1.0 - config.recovery_timeout_jitter * chance)


def shifted(breaker: Breaker, by: float) -> Breaker:
    """The same breaker on a clock that shows `by` seconds more. Its probes are let go."""
    outage, ledger, window = breaker.outage, breaker.ledger, breaker.calls.window
    buckets = tuple(bucket._replace(start=bucket.start + by) for bucket in window.buckets)
    window = window._replace(start=window.start + by, buckets=buckets)
    began = None if outage.began is None else outage.began + by
    history = tuple(entry._replace(at=entry.at + by) for entry in ledger.history)
    return breaker._replace(
        since=breaker.since + by,
        calls=breaker.calls.with_window(window),
        outage=outage._replace(began=began, until=outage.until + by, probes=()),
        ledger=ledger._replace(history=history),
    )


def _moved(breaker: Breaker, to: CircuitState, at: float) -> Breaker:
    return breaker._replace(state=to, generation=breaker.generation + 1, since=at)


def _opened(breaker: Breaker, at: float, config: BreakerConfig) -> Breaker:
    outage, ledger = breaker.outage, breaker.ledger
    outage = Outage(
        began=at if outage.began is None else outage.began,
        until=at + open_seconds(breaker, config),
        openings=outage.openings + 1,
    )
    ledger = ledger._replace(openings=ledger.openings + 1)
    return _moved(breaker, _OPEN, at)._replace(outage=outage, ledger=ledger)


def _held(breaker: Breaker) -> Breaker:
    ledger = breaker.ledger
    return breaker._replace(ledger=ledger._replace(held=ledger.held + 1))


def _closed(breaker: Breaker, at: float, config: BreakerConfig) -> Breaker:
    outage, ledger = breaker.outage, breaker.ledger
    downtime = at - (at if outage.began is None else outage.began)
    kept = (*ledger.history, Recovery(at, downtime, outage.method or "probe"))
    ledger = ledger._replace(
        recoveries=ledger.recoveries + 1,
        downtime=ledger.downtime + downtime,
        history=kept[max(len(kept) - config.recovery_history_max, 0) :],
    )
    return _afresh(_moved(breaker, _CLOSED, at))._replace(ledger=ledger)


def _afresh(breaker: Breaker) -> Breaker:
    """Forget what led to the last state; the totals stay."""
    calls = breaker.calls.with_window(Window())
    return breaker._replace(failures=0, category=None, calls=calls, outage=Outage())


def _enough(outage: Outage, config: BreakerConfig) -> bool:
    return outage.probe_successes >= config.success_threshold


def _switch(breaker: Breaker, at: float, to: CircuitState) -> Breaker:
    if to not in (_CLOSED, _FORCED_OPEN, _DISABLED):
        raise IllegalTransition(f"nobody can switch a breaker to {to}", state=str(breaker.state))
    if to is breaker.state and to is not _CLOSED:
        return breaker
    return _afresh(_moved(breaker, to, at))


def _late(breaker: Breaker, permit: Permit) -> Breaker:
    if permit.generation > breaker.generation:
        raise IllegalTransition(
            f"a call of generation {permit.generation} can't report to a breaker of "
            f"generation {breaker.generation}: the permit is another breaker's",
            state=str(breaker.state),
        )
    return breaker


def _reported(breaker: Breaker, at: float, permit: Permit, config: BreakerConfig) -> Breaker:
    """The state without the probe that reports; no longer half-open if it reports too late."""
    outage = breaker.outage
    if breaker.state is not _HALF_OPEN or permit not in outage.probes:
        raise IllegalTransition(
            f"no such call is under way while {breaker.state}", state=str(breaker.state)
        )
    breaker = _expire(breaker, at, config)
    if breaker.state is not _HALF_OPEN:
        return breaker
    probes = tuple(probe for probe in outage.probes if probe != permit)
    return breaker._replace(outage=outage._replace(probes=probes))


def _abandon(breaker: Breaker, at: float, permit: Permit, config: BreakerConfig) -> Breaker:
    if permit.generation != breaker.generation:
        return _late(breaker, permit)
    if breaker.state in (_CLOSED, _DISABLED):
        return breaker
    return _reported(breaker, at, permit, config)


def _expire(breaker: Breaker, at: float, config: BreakerConfig) -> Breaker:
    """Reopen the breaker if a probe is beyond its limit: whatever hangs has failed."""
    if breaker.state is not _HALF_OPEN or not breaker.outage.probes:
        return breaker
    if all(at - probe.at < config.probe_timeout for probe in breaker.outage.probes):
        return breaker
    calls = _counted(breaker.calls, at, 1, 1, 0, config)
    return _opened(breaker._replace(category=Category.TIMEOUT, calls=calls), at, config)


def _counted(
    calls: Calls, at: float, failed: int, recorded: int, slow: int, config: BreakerConfig
) -> Calls:
    """The calls with one more, and the window without those that it no longer shows.

    A failure that is not recorded stays out of the window. One long function, because every call
    takes it and calls are what Python is slow at.
    """
    (
        successes,
        failures,
        recorded_before,
        slow_before,
        recent,
        shown,
        shown_failed,
        shown_slow,
        failed_bits,
        slow_bits,
        start,
        buckets,
    ) = calls
    if config.windowed and recorded >= failed:
        if not config.window_calls:
            if at - start >= config.bucket_seconds:
                buckets = _buckets_shown(calls.window, at - config.window_seconds)
                shown = sum(bucket.calls for bucket in buckets)
                shown_failed = sum(bucket.failed for bucket in buckets)
                shown_slow = sum(bucket.slow for bucket in buckets)
                start = at
            shown += 1
            shown_failed += failed
            shown_slow += slow
        else:
            if shown < config.window_calls:
                shown += 1
            if failed or failed_bits:
                failed_bits = (failed_bits << 1 | failed) & config.window_mask
                shown_failed = failed_bits.bit_count()
            if slow or slow_bits:
                slow_bits = (slow_bits << 1 | slow) & config.window_mask
                shown_slow = slow_bits.bit_count()
    if failed or recent:
        recent = (recent << 1 | failed) & config.metrics_mask
    return _new(
        Calls,
        (
            successes + 1 - failed,
            failures + failed,
            recorded_before + recorded,
            slow_before + slow,
            recent,
            shown,
            shown_failed,
            shown_slow,
            failed_bits,
            slow_bits,
            start,
            buckets,
        ),
    )


def _buckets_shown(window: Window, oldest: float) -> tuple[Bucket, ...]:
    """The finished buckets and the current one, less those that began before `oldest`."""
    latest = Bucket(
        window.start,
        window.calls - sum(bucket.calls for bucket in window.buckets),
        window.failed - sum(bucket.failed for bucket in window.buckets),
        window.slow - sum(bucket.slow for bucket in window.buckets),
    )
    return tuple(bucket for bucket in (*window.buckets, latest) if bucket.start > oldest)


def _over_rate(calls: Calls, config: BreakerConfig) -> bool:
    shown = calls.shown
    if not shown or shown < config.minimum_calls:
        return False
    failure_rate, slow_rate = config.failure_rate_threshold, config.slow_call_rate_threshold
    return (failure_rate > 0.0 and calls.shown_failed >= failure_rate * shown) or (
        slow_rate > 0.0 and calls.shown_slow >= slow_rate * shown
    )


# -- the shell -------------------------------------------------------------------------------------


class CircuitOpenError(BrowserError):
    """The breaker refused the call, and nothing was touched. Try again later, or elsewhere."""

    @property
    def retry_after(self) -> float | None:
        """Seconds after which to try again; None: not before somebody switches it back."""
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
    """A breaker as another process can go on with it: its times are relative to `at` (wall)."""

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

    All raise `CircuitOpenError` instead of calling while the breaker refuses. An error that
    leaves the call is a failure, unless it is the caller's fault or nobody's (`ignored`); a
    cancelled call has no verdict.

    Settings are a `BreakerConfig`, or its fields by name. One thread (or event loop) needs no
    lock; several that share a breaker pass `lock=threading.Lock()`, which is held for the
    transition only. `on_change` hears of each change of state once, outside the lock, and must
    not raise. `may_open` is asked before the breaker opens out of the closed state.
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
        self.config = _configured(config or BreakerConfig(), settings)
        self._clock = clock
        self._wall = wall
        self._on_change = on_change
        self._may_open = may_open
        self._lock = lock
        self._ignored = ignored
        self._refused = 0
        # Breakers of one pool must not all come back in the same moment, hence the name.
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
        """The state as the last event left it: OPEN ends with the first call admitted."""
        return self._breaker.state

    @property
    def breaker(self) -> Breaker:
        """The whole state, as data."""
        return self._breaker

    def get_state(self) -> str:
        return str(self._breaker.state)

    # -- by hand --

    def allow(self) -> Permit:
        """Leave for one call, to be reported once; or `CircuitOpenError`."""
        at = self._clock()
        before = self._breaker
        after, permit = admit(before, at, self.config)
        if after is not before:  # hardly ever; so closed, nobody waits for the lock
            with self._lock:
                before = self._breaker
                after, permit = admit(before, at, self.config)
                self._breaker = after
            self._tell(before, after, at)
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
            if before.state is _CLOSED and not self._may_open():  # it was slow once too often
                after = succeed(before, at, permit, self.config, may_open=False)
            self._breaker = after
        self._tell(before, after, at)

    def failure(
        self,
        permit: Permit | None,
        what: Failure | BaseException,
        *,
        cured: bool = False,
        components: int = 1,
    ) -> None:
        """Report a failure of an admitted call; with no permit, one outside any call.

        `cured` says that a retry helped, `components` how many components are affected.
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
            event = Failed(at, permit, what.category, what.severity, cured, components)
            after = fail(before, event, self.config)
            if after.state is _OPEN and before.state is _CLOSED and not self._may_open():
                after = fail(before, replace(event, may_open=False), self.config)
            self._breaker = after
        self._tell(before, after, at)

    def counts(self, error: BaseException) -> bool:
        """Whether an error that leaves a call is a failure of what the breaker protects."""
        return isinstance(error, Exception) and not isinstance(error, self._ignored)

    def abandon(self, permit: Permit) -> None:
        """The call ended without a verdict: its place is free again, and nothing is counted."""
        self._step(lambda at: Abandoned(at, permit))

    def observe(self, failure: Failure | BaseException) -> None:
        """Something failed outside any call: the browser died, say."""
        self.failure(None, failure)

    def repaired(self, method: str) -> None:
        """Name what was done about an outage, for the metrics; it stays open until it is time."""
        self._step(lambda at: Repaired(at, method))

    def tick(self) -> None:
        """Notice probes beyond their limit; asking for leave does so too."""
        self._step(Ticked)

    def force_open(self) -> None:
        """Refuse everything until `reset` or `disable`."""
        self._step(lambda at: Switched(at, _FORCED_OPEN))

    def disable(self) -> None:
        """Admit everything until `reset` or `force_open`; calls are still counted."""
        self._step(lambda at: Switched(at, _DISABLED))

    def reset(self) -> None:
        """Close it and start afresh; this is no recovery."""
        self._step(lambda at: Switched(at, _CLOSED))

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

    # -- metrics and moving house --

    def get_metrics(self) -> dict[str, Any]:
        """What happened so far. The rates mean little while `enough_samples` is false.

        `success_rate` is that of the latest `metrics_window_size` calls, `recovery_rate` the
        share of openings that ended in a recovery; both are 0.0 where there were none.
        """
        breaker, config = self._breaker, self.config
        calls, outage, ledger = breaker.calls, breaker.outage, breaker.ledger
        executions = calls.successes + calls.failures
        samples = min(executions, config.metrics_window_size)
        now, wall = self._clock(), self._wall()
        until = retry_at(breaker, config) if breaker.state in (_OPEN, _HALF_OPEN) else None
        return {
            "current_state": str(breaker.state),
            "seconds_in_state": max(now - breaker.since, 0.0),
            "retry_after_seconds": None if until is None else max(until - now, 0.0),
            "executions": executions,
            "successes": calls.successes,
            "failures": calls.failures,
            "recorded_failures": calls.recorded,
            "slow_calls": calls.slow,
            "refused": self._refused,
            "samples": samples,
            "enough_samples": samples >= config.min_samples_for_stats,
            "success_rate": 1.0 - calls.recent.bit_count() / samples if samples else 0.0,
            "failures_in_row": breaker.failures,
            "circuit_open_count": ledger.openings,
            "openings_held": ledger.held,
            "recoveries": ledger.recoveries,
            "recovery_rate": ledger.recoveries / ledger.openings if ledger.openings else 0.0,
            "avg_downtime_seconds": (
                ledger.downtime / ledger.recoveries if ledger.recoveries else 0.0
            ),
            "current_downtime_seconds": (
                0.0 if outage.began is None else max(now - outage.began, 0.0)
            ),
            "recovery_history": [
                {
                    "timestamp": datetime.fromtimestamp(wall - now + entry.at, UTC).isoformat(
                        timespec="seconds"
                    ),
                    "recovery_method": entry.method,
                    "browser": self.browser,
                    "downtime_seconds": entry.downtime,
                }
                for entry in ledger.history
            ],
        }

    def snapshot(self) -> Snapshot:
        """The breaker for another process to go on with."""
        with self._lock:
            return Snapshot(shifted(self._breaker, -self._clock()), self._refused, at=self._wall())

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where another incarnation's breaker was; what it admitted is late from now on."""
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
        self._tell(before, after, at)

    def _tell(self, before: Breaker, after: Breaker, at: float) -> None:
        if self._on_change is None or after.state is before.state:
            return
        opened = after.state is _OPEN
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
            why = "is forced open, until somebody resets it"
        elif breaker.state is _HALF_OPEN:
            why = f"is being probed: try again when that is over, or in {seconds:.3g} s"
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


def _configured(config: BreakerConfig, settings: dict[str, Any]) -> BreakerConfig:
    known = {each.name for each in fields(BreakerConfig) if each.init}
    for name in settings:
        if name not in known:
            raise BadInput(
                f"A circuit breaker has no setting {name!r}; it has {', '.join(sorted(known))}.",
                expected=sorted(known),
                got=name,
            )
    return replace(config, **settings) if settings else config


def as_failure(error: BaseException) -> Failure:
    """What a call's error says failed."""
    if isinstance(error, OperationFailed) and isinstance(error.failure, Failure):
        return error.failure
    return categorize_browser_failure(error)


def _is_async(fn: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004 - the object's own, async or not
    )
