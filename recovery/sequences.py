"""What follows when a stage of a sequence has no answer: ask again, rebuild, or give up; and where.

A stage is a shard of a model at work on one sequence in one browser, with caches in the page. Pure
functions of level, failure and what is known of the hosts. This module must not talk to one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from recovery.failures import Category, Failure, Scope
from recovery.kinds import Level
from recovery.levels import COPIES, COPIES_MAX, REDUNDANT
from recovery.records import HostRef, HostStatus, NumericId

QUORUM = {Level.CRITICAL: 2}
# The host is well, but does not have what was meant: another incarnation, or a sequence that it
# does not know or knows otherwise. Nothing has failed there.
MISADDRESSED = frozenset(
    {"replaced", "not_loaded", "out_of_step", "stale_step", "stale_frame", "too_many_sequences"}
)
RETRIES_MAX = (
    2  # times that a page which is cut off is asked again, where it can be built elsewhere
)


class RecoveryAction(StrEnum):
    ASK_AGAIN = "ask_again"  # the page may still have its caches
    REBUILD = "rebuild"  # caches have to be made anew, there or elsewhere
    GIVE_UP = "give_up"


def recovery_action(
    level: Level, failure: Failure, failures: int, failures_max: int, asked: int = 0
) -> RecoveryAction:
    """What to do about a stage that did not answer, `failures` of this step included.

    `low` survives what leaves the page its caches: a lost connection, a step that took too long.
    From `medium` on they can be made again, which is done once the page has been asked again
    `asked` times in vain.
    """
    if level is Level.NONE or failures > failures_max:
        return RecoveryAction.GIVE_UP
    if failure.evidence.get("what") in MISADDRESSED:
        return RecoveryAction.GIVE_UP if level is Level.LOW else RecoveryAction.REBUILD
    brief = failure.category in (Category.CONNECTION_FAILURE, Category.TIMEOUT)
    brief = brief and failure.scope in (Scope.PAGE, Scope.OPERATION)
    if brief and (asked < RETRIES_MAX or level is Level.LOW):
        return RecoveryAction.ASK_AGAIN
    return RecoveryAction.GIVE_UP if level is Level.LOW else RecoveryAction.REBUILD


def copies_of_stage(level: Level, answers: int, pending: int, *, late: bool) -> int:
    """On how many browsers a stage should be at work on a step.

    One; three at `critical`; one more where that one is late, at the levels that keep another
    ready; and one more while those that have answered don't agree.
    """
    wanted = COPIES[level]
    if late and level in REDUNDANT:
        wanted += 1
    if answers >= wanted and not pending:
        wanted = answers + 1
    return min(wanted, COPIES_MAX)


def choose_stage_host(
    hosts: Iterable[HostStatus],
    model: str,
    *,
    taken: Collection[HostRef] = (),
    avoid: Collection[HostRef] = (),
    numeric: NumericId | None = None,
    load: Mapping[HostRef, int] | None = None,
) -> HostStatus | None:
    """The host on which a stage should be built, of those that have its shard loaded; None: none.

    Equal numbers come first, since only there are the bits the same; then the least busy. `load`
    counts the stages that the sequence has on each.
    """
    counts = load or {}
    fit = [
        status
        for status in hosts
        if status.can_take(model) and status.ref not in taken and status.ref not in avoid
    ]
    return min(
        fit,
        key=lambda status: (
            numeric is not None and status.models[model] != numeric,
            counts.get(status.ref, 0),
            status.queue,
            status.ref,
        ),
        default=None,
    )
