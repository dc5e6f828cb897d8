"""A breaker's state: frozen data, events, and the functions that make the next state.

Everything that affects a breaker's state is in this file, except the sums over its calls
(`window.py`). `admit` decides whether a call may pass; `step` makes the next state for any event;
`succeed` and `fail` are what most calls need, so `CircuitBreaker` calls them directly, without an
event. Time is an argument (monotonic seconds), and the jitter comes from a seed in the state. An
illegal event raises `IllegalTransition` and changes nothing.

Each admitted call gets a `Permit` with the breaker's generation, which changes with every state:
a report from another generation is late, and changes nothing.

The states are named tuples, unlike the frozen dataclasses elsewhere: a call makes three of them,
and a frozen dataclass takes four times as long to make. This module must not read a clock, wait,
or notify anybody.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from recovery.breaker.config import BreakerConfig
from recovery.breaker.window import Calls, Window, counted, over_rate
from recovery.errors import IllegalTransition
from recovery.failures import Category, Severity

_new = tuple.__new__  # what a named tuple's constructor does, in half the time
_GROWTH_STEPS_MAX = 64  # keeps growth ** steps a finite float


class CircuitState(StrEnum):
    """What a breaker does with a call.

    FORCED_OPEN refuses every call and DISABLED admits every call, until it is reset by hand.
    """

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    DISABLED = "disabled"


_CLOSED, _OPEN, _HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
_FORCED_OPEN, _DISABLED = CircuitState.FORCED_OPEN, CircuitState.DISABLED


class Permit(NamedTuple):
    """Permission for one call, to be reported once. `probe` is 0 except while half-open."""

    generation: int
    probe: int
    at: float


class Outage(NamedTuple):
    """From the first opening to the next closing; empty while closed."""

    began: float | None = None
    until: float = 0.0  # when the first probe may go through
    openings: int = 0  # in this outage
    probes: tuple[Permit, ...] = ()  # under way
    probes_made: int = 0
    probe_successes: int = 0
    method: str = ""  # the repair, if one was reported


class Recovery(NamedTuple):
    """One outage that ended by probes that succeeded."""

    at: float
    downtime: float
    method: str


class Ledger(NamedTuple):
    """The totals of outages, for the metrics."""

    openings: int = 0
    recoveries: int = 0
    downtime: float = 0.0  # of all recoveries
    held: int = 0  # times it did not open because of the pool's cap
    history: tuple[Recovery, ...] = ()


class Breaker(NamedTuple):
    """The whole state of one breaker. `category`: of the last call, if it failed."""

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
    """A call asks for a permit. `admit` does the same and also returns the permit."""

    at: float


@dataclass(frozen=True, slots=True)
class Succeeded:
    at: float
    permit: Permit


@dataclass(frozen=True, slots=True)
class Failed:
    """A call failed; with no permit, something failed outside any call (a browser died).

    `retried`: a retry succeeded, so the operation did not fail for its caller. `components`: how
    many are affected. `may_open`: whether the pool's cap leaves room for one more open circuit.
    """

    at: float
    permit: Permit | None
    category: Category
    severity: Severity
    retried: bool = False
    components: int = 1
    may_open: bool = True


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A call ended without success or failure (cancelled, or refused for a caller's error)."""

    at: float
    permit: Permit


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed: probes beyond their time limit have failed."""

    at: float


class BreakerSwitch(StrEnum):
    """The manual switches of a breaker."""

    FORCE_OPEN = "force_open"  # refuse everything until it is reset or disabled
    DISABLE = "disable"  # admit everything until it is reset or forced open; calls are counted
    RESET = "reset"  # close it, with no failures counted


@dataclass(frozen=True, slots=True)
class Repaired:
    """A repair was made during an outage. Probes still have to show that it helped."""

    at: float
    method: str


@dataclass(frozen=True, slots=True)
class Switched:
    """Switched by hand: to FORCED_OPEN, DISABLED, or CLOSED (a reset)."""

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
    """The state after a call asked for a permit, and the permit; None if it is refused."""
    state = breaker.state
    if state is _CLOSED or state is _DISABLED:
        return breaker, _new(Permit, (breaker.generation, 0, at))
    if state is _HALF_OPEN:
        breaker = _expire(breaker, at, config)
        if breaker.state is not _HALF_OPEN:
            return breaker, None
    elif state is _OPEN and at >= breaker.outage.until:
        breaker = _transition(breaker, _HALF_OPEN, at)
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
        return _check_late(breaker, permit)
    slow_seconds = config.slow_call_seconds
    slow = 1 if slow_seconds and at - permit.at >= slow_seconds else 0
    if state is _CLOSED:
        calls = counted(calls, at, 0, 0, slow, config)
        # As `Breaker(...)`, in half the time: nearly every call takes this path.
        after = _new(Breaker, (state, generation, since, 0, None, calls, outage, ledger, seed))
        if (calls.shown_failed or calls.shown_slow) and over_rate(calls, config):
            return _opened(after, at, config) if may_open else _opening_suppressed(after)
        return after
    if state is _DISABLED:
        return breaker._replace(calls=counted(calls, at, 0, 0, slow, config))
    breaker = _reported(breaker, at, permit, config)
    if breaker.state is not _HALF_OPEN:
        return breaker
    if slow:  # where slowness opens a circuit, a slow probe can't close it
        return _opened(breaker._replace(calls=counted(calls, at, 0, 0, slow, config)), at, config)
    outage = breaker.outage._replace(probe_successes=breaker.outage.probe_successes + 1)
    breaker = breaker._replace(calls=counted(calls, at, 0, 0, 0, config), outage=outage)
    return _closed(breaker, at, config) if _enough_probes(outage, config) else breaker


def fail(breaker: Breaker, event: Failed, config: BreakerConfig) -> Breaker:
    """The state after a failure."""
    at, permit = event.at, event.permit
    if permit is not None and permit.generation != breaker.generation:
        return _check_late(breaker, permit)
    if permit is not None and breaker.state not in (_CLOSED, _DISABLED):
        breaker = _reported(breaker, at, permit, config)
        if breaker.state is not _HALF_OPEN:
            return breaker
    slow_seconds = config.slow_call_seconds
    slow = int(bool(slow_seconds) and permit is not None and at - permit.at >= slow_seconds)
    recorded = breaker.state in (_CLOSED, _HALF_OPEN) and is_recorded(breaker, event)
    calls = counted(breaker.calls, at, 1, int(recorded), slow, config)
    breaker = breaker._replace(calls=calls)
    if breaker.state is _HALF_OPEN:
        return _opened(breaker._replace(category=event.category), at, config)
    if breaker.state is not _CLOSED:
        return breaker
    breaker = breaker._replace(failures=breaker.failures + int(recorded), category=event.category)
    if breaker.failures >= config.failure_threshold or over_rate(calls, config):
        return _opened(breaker, at, config) if event.may_open else _opening_suppressed(breaker)
    return breaker


def is_recorded(breaker: Breaker, failure: Failed) -> bool:
    """Whether a failure counts towards opening; every failure counts in the metrics.

    Rules that always record come before those that never do: a mild failure that a retry fixed is
    recorded if it is the second of its category in a row.
    """
    if (
        failure.severity is Severity.SEVERE
        or failure.category is Category.CRASH
        or breaker.state is _HALF_OPEN
        or failure.category is breaker.category
    ):
        return True
    if failure.severity is Severity.MILD:
        return not failure.retried
    return not failure.retried or failure.components > 1


def retry_at(breaker: Breaker, config: BreakerConfig) -> float | None:
    """When a call that is refused now may be tried again; None if not before a manual switch.

    If calls are not refused, a time in the past.
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
    """The same breaker on a clock that shows `by` seconds more. Its probes are dropped."""
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


def _transition(breaker: Breaker, to: CircuitState, at: float) -> Breaker:
    return breaker._replace(state=to, generation=breaker.generation + 1, since=at)


def _opened(breaker: Breaker, at: float, config: BreakerConfig) -> Breaker:
    outage, ledger = breaker.outage, breaker.ledger
    outage = Outage(
        began=at if outage.began is None else outage.began,
        until=at + open_seconds(breaker, config),
        openings=outage.openings + 1,
    )
    ledger = ledger._replace(openings=ledger.openings + 1)
    return _transition(breaker, _OPEN, at)._replace(outage=outage, ledger=ledger)


def _opening_suppressed(breaker: Breaker) -> Breaker:
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
    return _cleared(_transition(breaker, _CLOSED, at))._replace(ledger=ledger)


def _cleared(breaker: Breaker) -> Breaker:
    """Clear failures, window and outage; the totals stay."""
    calls = breaker.calls.with_window(Window())
    return breaker._replace(failures=0, category=None, calls=calls, outage=Outage())


def _enough_probes(outage: Outage, config: BreakerConfig) -> bool:
    return outage.probe_successes >= config.success_threshold


def _switch(breaker: Breaker, at: float, to: CircuitState) -> Breaker:
    if to not in (_CLOSED, _FORCED_OPEN, _DISABLED):
        raise IllegalTransition(
            f"a breaker can't be switched to {to}: expected closed, forced_open or disabled",
            state=str(breaker.state),
        )
    if to is breaker.state and to is not _CLOSED:
        return breaker
    return _cleared(_transition(breaker, to, at))


def _check_late(breaker: Breaker, permit: Permit) -> Breaker:
    if permit.generation > breaker.generation:
        raise IllegalTransition(
            f"a call of generation {permit.generation} can't report to a breaker of "
            f"generation {breaker.generation}: the permit belongs to another breaker",
            state=str(breaker.state),
        )
    return breaker


def _reported(breaker: Breaker, at: float, permit: Permit, config: BreakerConfig) -> Breaker:
    """The state without the reporting probe; no longer half-open if it reports too late."""
    outage = breaker.outage
    if breaker.state is not _HALF_OPEN or permit not in outage.probes:
        raise IllegalTransition(
            f"the permit is not of a probe under way while {breaker.state}",
            state=str(breaker.state),
        )
    breaker = _expire(breaker, at, config)
    if breaker.state is not _HALF_OPEN:
        return breaker
    probes = tuple(probe for probe in outage.probes if probe != permit)
    return breaker._replace(outage=outage._replace(probes=probes))


def _abandon(breaker: Breaker, at: float, permit: Permit, config: BreakerConfig) -> Breaker:
    if permit.generation != breaker.generation:
        return _check_late(breaker, permit)
    if breaker.state in (_CLOSED, _DISABLED):
        return breaker
    return _reported(breaker, at, permit, config)


def _expire(breaker: Breaker, at: float, config: BreakerConfig) -> Breaker:
    """Reopen the breaker if a probe is beyond its time limit: a hanging probe has failed."""
    if breaker.state is not _HALF_OPEN or not breaker.outage.probes:
        return breaker
    if all(at - probe.at < config.probe_timeout for probe in breaker.outage.probes):
        return breaker
    calls = counted(breaker.calls, at, 1, 1, 0, config)
    return _opened(breaker._replace(category=Category.TIMEOUT, calls=calls), at, config)
