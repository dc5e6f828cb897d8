"""What to do when a stage of a sequence does not answer: retry, rebuild or give up; and where.

A stage is a shard of a model that runs one sequence in one browser, with caches in the page. Pure
functions of level, failure and host status. This module must not contact a host.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from recovery.failures import Category, Failure, Scope
from recovery.kinds import Level
from recovery.records import HostRef, HostStatus, NumericId

# The host is healthy, but the request was not for its present state: another incarnation, or a
# sequence that it does not have or has at another position. The host has not failed.
MISADDRESSED = frozenset(
    {"replaced", "not_loaded", "out_of_step", "stale_step", "stale_frame", "too_many_sequences"}
)
RETRIES_MAX = 2  # of a page that is cut off, where the stage can be rebuilt elsewhere


class RecoveryAction(StrEnum):
    ASK_AGAIN = "ask_again"  # retry: the page may still have its caches
    REBUILD = "rebuild"  # the caches have to be rebuilt, there or elsewhere
    GIVE_UP = "give_up"


def recovery_action(
    level: Level, failure: Failure, failures: int, failures_max: int, retries: int = 0
) -> RecoveryAction:
    """What to do about a stage that did not answer; `failures` counts those of this step.

    `low` recovers from failures that leave the page its caches: a lost connection, a step that
    took too long. From `medium` on caches can be rebuilt, which is done after `RETRIES_MAX`
    `retries` of the page have failed.
    """
    if level is Level.NONE or failures > failures_max:
        return RecoveryAction.GIVE_UP
    if failure.evidence.get("what") in MISADDRESSED:
        return RecoveryAction.GIVE_UP if level is Level.LOW else RecoveryAction.REBUILD
    brief = failure.category in (Category.CONNECTION_FAILURE, Category.TIMEOUT)
    brief = brief and failure.scope in (Scope.PAGE, Scope.OPERATION)
    if brief and (retries < RETRIES_MAX or level is Level.LOW):
        return RecoveryAction.ASK_AGAIN
    return RecoveryAction.GIVE_UP if level is Level.LOW else RecoveryAction.REBUILD


def choose_stage_host(
    hosts: Iterable[HostStatus],
    model: str,
    *,
    taken: Collection[HostRef] = (),
    avoid: Collection[HostRef] = (),
    numeric: NumericId | None = None,
    load: Mapping[HostRef, int] | None = None,
) -> HostStatus | None:
    """The host on which to build a stage, of those with its shard loaded; None: there is none.

    Hosts with the numeric id `numeric` come first, since only they give the same bits; then the
    least busy. `load` counts the sequence's stages on each host.
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
