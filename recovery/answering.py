"""What the caller of one operation does next: send it, wait, or give up.

Pure: the caller tells what it knows (candidates, what was tried, the time left) and carries the
answer out. An operation keeps its id over all attempts, so that a host which already answered it
answers the same again. This module must not know how a host is reached.
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
    """Nobody can take it now: wait for a change of the table, `until` the deadline."""

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


_LOST_RATIO = 4  # so many connections and workers may be lost for each attempt that may fail


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

    `coming` says whether any browser is left that may yet be able to take it. `taken` are those
    that have a copy of it, or have answered one, and `engines` their types: a further copy goes
    to another browser, of another type where there is one.

    A failed incarnation is not tried again, except after a failure that left it whole (a dropped
    connection; an error that it reported, when there is no other to ask). Of the rest, the
    better of two drawn at random is chosen: as good as asking all, without every caller herding
    to the same one (Mitzenmacher 2001).
    """
    failures = [attempt.failure for attempt in attempts if attempt.failure is not None]
    if failures:
        verdict = _stop(policy, failures)
        if verdict is not None:
            return verdict
    if seconds_left <= 0:
        return GiveUp("the deadline has passed")
    burnt = {
        attempt.ref
        for attempt in attempts
        if attempt.failure is not None and not _left_whole(attempt.failure)
    }
    having = [host for host in hosts if host.can_take(model) and host.ref not in taken]
    able = [host for host in having if host.ref not in burnt]
    if not able:  # waiting for another would be waiting for a death that need not come
        able = [host for host in having if _only_reported(host.ref, attempts)]
    if policy.level is Level.LOW and failures:
        # Rung 1 only: the same browser again, not another one.
        last = failures[-1]
        if not (_left_whole(last) or is_reported(last)):
            return GiveUp("level low survives no death of a browser")
        if all(host.ref != last.ref for host in hosts):
            return GiveUp("level low survives no death of a browser, and this one was replaced")
        able = [host for host in having if host.ref == last.ref]
    free = [host for host in able if not host.full]
    free = [host for host in free if host.browser not in engines] or free
    if free:
        pair = rng.sample(free, 2) if len(free) > 1 else free
        return Send(min(pair, key=lambda host: host.queue))
    if able and not policy.wait_when_full:
        return Refuse("every browser that has the model is at its queue limit")
    if not having and not coming and not taken:
        return GiveUp(
            "no browser is left that could have the model: each was stopped or given up, or "
            "could not load it"
        )
    if able:
        return WaitForHost("queues are full")
    blocked = any(host.blocked and model in host.models for host in hosts)
    return WaitForHost("circuit breakers are open" if blocked else "no browser has the model ready")


def _stop(policy: AnsweringPolicy, failures: Sequence[Failure]) -> GiveUp | None:
    if policy.level is Level.NONE:
        return GiveUp("level none recovers from nothing")
    # What a browser did may be the operation's doing, and each attempt may cost another browser.
    # The loss of a connection or of a worker is not: a node that dies costs several at once.
    may_be_its_doing = [f for f in failures if not (_left_whole(f) or _worker_lost(f))]
    lost = len(failures) - len(may_be_its_doing)
    if len(may_be_its_doing) >= policy.attempts_max or lost >= _LOST_RATIO * policy.attempts_max:
        return GiveUp(f"{len(failures)} attempts failed")
    last = failures[-1]
    if is_reported(last) and any(
        is_reported(failure) and failure.message == last.message for failure in failures[:-1]
    ):
        return GiveUp("the very same error was reported twice: the input or model is at fault")
    return None


def _only_reported(ref: HostRef, attempts: Sequence[Attempt]) -> bool:
    """Whether every failure there was an error that the page reported, and lived on."""
    return all(
        is_reported(attempt.failure)
        for attempt in attempts
        if attempt.ref == ref and attempt.failure is not None
    )


def is_reported(failure: Failure) -> bool:
    """Whether a host that lives on said that this operation does not work."""
    reports = (Category.API_ERROR, Category.INTERNAL_ERROR)
    return failure.category in reports and failure.scope is Scope.OPERATION


def _worker_lost(failure: Failure) -> bool:
    return failure.evidence.get("what") == "worker_exited"


def _left_whole(failure: Failure) -> bool:
    """Whether the host can be asked again: only its connection or this attempt was lost."""
    return failure.category is Category.CONNECTION_FAILURE and failure.scope in (
        Scope.OPERATION,
        Scope.PAGE,
    )
