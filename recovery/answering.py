"""What the caller of one operation does next: send it, wait, or give up.

Pure: the caller passes what it knows (candidates, past attempts, the time left) and carries out the
action. An operation keeps its id over all attempts, so that a host which already answered it
returns the same answer. This module must not know how a host is reached.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from recovery.failures import Category, Failure, Scope
from recovery.kinds import BrowserType, Level
from recovery.records import HostRef, HostStatus


@dataclass(frozen=True)
class Attempt:
    """One try on one host; `failure` is None when the host was only busy."""

    ref: HostRef
    failure: Failure | None


@dataclass(frozen=True)
class Send:
    """Send it to this host."""

    status: HostStatus


@dataclass(frozen=True)
class WaitForHost:
    """No host can take it now: wait until the host table changes, or for the deadline."""

    why: str


@dataclass(frozen=True)
class Refuse:
    """Every queue is full and the caller asked for an error rather than a wait."""

    why: str


@dataclass(frozen=True)
class GiveUp:
    why: str


Action = Send | WaitForHost | Refuse | GiveUp


@dataclass(frozen=True)
class AnsweringPolicy:
    level: Level
    attempts_max: int  # failed attempts after which the operation fails
    wait_when_full: bool


_LOST_RATIO = 4  # lost connections and workers allowed for each attempt that may fail


def next_action(
    policy: AnsweringPolicy,
    model: str,
    attempts: Sequence[Attempt],
    hosts: Sequence[HostStatus],
    seconds_left: float,
    rng: random.Random,
    *,
    coming: bool = True,
    taken: Collection[HostRef] = (),
    engines: Collection[BrowserType | None] = (),
) -> Action:
    """Decide the next step of one operation.

    `coming`: whether any browser may still become able to take it. `taken` are the hosts that
    have a copy of it or have answered one, and `engines` their browser types: a further copy goes
    to another host, of another type if there is one.

    A failed incarnation is not tried again, except after a failure that did not harm it (a dropped
    connection; an error that it reported, when there is no other host). Of the rest, the less
    loaded of two drawn at random is chosen (power of two choices, Mitzenmacher 2001): nearly as
    good as comparing all, and callers do not all pick the same one.
    """
    failures = [attempt.failure for attempt in attempts if attempt.failure is not None]
    if failures:
        verdict = _stop(policy, failures)
        if verdict is not None:
            return verdict
    if seconds_left <= 0:
        return GiveUp("the deadline has passed")
    harmed = {
        attempt.ref
        for attempt in attempts
        if attempt.failure is not None and not _host_unharmed(attempt.failure)
    }
    loaded = [host for host in hosts if host.can_take(model) and host.ref not in taken]
    able = [host for host in loaded if host.ref not in harmed]
    if not able:  # no other host may ever come: this one is alive
        able = [host for host in loaded if _only_reported(host.ref, attempts)]
    if policy.level is Level.LOW and failures:
        # Rung 1 only: the same browser again, not another one.
        last = failures[-1]
        if not (_host_unharmed(last) or is_reported(last)):
            return GiveUp(
                "level low does not recover from the loss of a browser; use medium or above"
            )
        if all(host.ref != last.ref for host in hosts):
            return GiveUp(
                "level low does not recover from the loss of a browser, and this one was replaced; "
                "use medium or above"
            )
        able = [host for host in loaded if host.ref == last.ref]
    free = [host for host in able if not host.full]
    free = [host for host in free if host.browser not in engines] or free
    if free:
        pair = rng.sample(free, 2) if len(free) > 1 else free
        return Send(min(pair, key=lambda host: host.queue))
    if able and not policy.wait_when_full:
        return Refuse("every browser that has the model is at its queue limit")
    if not loaded and not coming and not taken:
        return GiveUp(
            "no browser is left that could load the model: each was stopped, was given up, or "
            "failed to load it"
        )
    if able:
        return WaitForHost("queues are full")
    blocked = any(host.blocked and model in host.models for host in hosts)
    return WaitForHost("circuit breakers are open" if blocked else "no browser has the model ready")


def _stop(policy: AnsweringPolicy, failures: Sequence[Failure]) -> GiveUp | None:
    if policy.level is Level.NONE:
        return GiveUp("level none does not retry; use low or above")
    # A browser's failure may be caused by the operation, so each attempt may cost another browser.
    # A lost connection or worker is not: a node that dies takes several with it at once.
    maybe_caused = [f for f in failures if not (_host_unharmed(f) or _worker_lost(f))]
    lost = len(failures) - len(maybe_caused)
    if len(maybe_caused) >= policy.attempts_max or lost >= _LOST_RATIO * policy.attempts_max:
        return GiveUp(f"{len(failures)} attempts failed")
    last = failures[-1]
    if is_reported(last) and any(
        is_reported(failure) and failure.message == last.message for failure in failures[:-1]
    ):
        return GiveUp("the same error was reported twice: check the input and the model")
    return None


def _only_reported(ref: HostRef, attempts: Sequence[Attempt]) -> bool:
    """Whether every failure on `ref` was an error reported by a page that stayed alive."""
    return all(
        is_reported(attempt.failure)
        for attempt in attempts
        if attempt.ref == ref and attempt.failure is not None
    )


def is_reported(failure: Failure) -> bool:
    """Whether a host that is still alive reported an error of this operation."""
    reports = (Category.API_ERROR, Category.INTERNAL_ERROR)
    return failure.category in reports and failure.scope is Scope.OPERATION


def _worker_lost(failure: Failure) -> bool:
    return failure.evidence.get("what") == "worker_exited"


def _host_unharmed(failure: Failure) -> bool:
    """Whether the host can be retried: only its connection or this attempt was lost."""
    return failure.category is Category.CONNECTION_FAILURE and failure.scope in (
        Scope.OPERATION,
        Scope.PAGE,
    )
