"""Recovery by hand: the public faces of the supervisor's ladder of rungs.

A pool recovers by itself from what its watches see. Who knows of a failure that no watch can see
(an answer that is wrong, a page that looks odd) reports it here, and the pool's own strategy does
the rest. This module must not touch a browser: the supervisor does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from pool.browsers import check_browser_id
from recovery import checks
from recovery.control import PoolState, Repair
from recovery.errors import BadInput
from recovery.failures import Failure, categorize_browser_failure
from recovery.kinds import RecoveryLevel
from recovery.records import HostRef, HostStatus


class Repairable(Protocol):
    """What a `BrowserPool` has that is needed here."""

    async def repair(
        self, browser_id: str, failure: Failure, *, start: RecoveryLevel | None = None
    ) -> Repair: ...
    async def control(self) -> PoolState: ...
    def hosts(self) -> tuple[HostStatus, ...]: ...


async def recover_browser(
    pool: Repairable,
    browser_id: str,
    error: BaseException | str,
    context: Mapping[str, Any] | None = None,
) -> Repair:
    """Recover one browser of `pool` from `error`; returns the repair as it ended.

    `context` may hold what is known around it (`what`, `model`, ...; see
    `categorize_browser_failure`). `repair.ready` is None if nothing helped, and `repair.steps`
    tells what was tried. Raises `BadInput` if the browser is not in service.
    """
    check_browser_id(browser_id)
    if not isinstance(error, BaseException | str):
        raise checks.refusal("error", "an exception, or what happened as text", error)
    context = checks.optional(checks.mapping, "context", context, "a mapping of facts")
    statuses = {status.ref.browser_id: status for status in pool.hosts()}
    if browser_id not in statuses:
        raise BadInput(
            f"no browser {browser_id!r} is in service; there are {', '.join(statuses) or 'none'}.",
            expected=list(statuses),
            got=browser_id,
        )
    status = statuses[browser_id]
    known = {
        "ref": HostRef(browser_id, status.ref.epoch),
        "at": time.time(),
        "browser": str(status.browser),
    }
    failure = categorize_browser_failure(error, {**known, **(context or {})})
    return await pool.repair(browser_id, failure)


class ProgressiveRecoveryManager:
    """The ladder of rungs over one pool, with the rung to begin with as an argument."""

    def __init__(self, pool: Repairable) -> None:
        self._pool = pool

    async def execute_progressive_recovery(
        self, browser_id: str, failure: Failure, start_level: RecoveryLevel | None = None
    ) -> Repair:
        """Climb from `start_level` (by default where such a failure begins) until a rung works."""
        return await self._pool.repair(browser_id, failure, start=start_level)

    async def get_strategy_stats(self) -> dict[str, dict[str, dict[str, int]]]:
        """What came of each rung in this pool so far, by kind of failure.

        The keys are `category/browser/model type` and the rung's name; `plan` decides by the same
        counts.
        """
        state = await self._pool.control()
        return {
            key: {
                rung.name.lower(): {"attempts": tally.attempts, "successes": tally.successes}
                for rung, tally in tallies.items()
            }
            for key, tallies in state.tallies.items()
        }


__all__ = ["ProgressiveRecoveryManager", "recover_browser"]
