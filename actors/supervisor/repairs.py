"""Repairs on request: for callers who know of a failure that no watch can see.

How a browser is repaired is decided in the journal. This module must not call a host.
"""

from __future__ import annotations

from actors.supervisor.changes import Changes
from actors.supervisor.journal import Journal
from recovery.control import BrowserFailed, Phase, Repair
from recovery.errors import BadInput
from recovery.failures import Failure
from recovery.kinds import RecoveryLevel


class Repairs:
    """Reports failures in somebody's name, and waits for what comes of them."""

    def __init__(self, journal: Journal, changes: Changes) -> None:
        self._journal = journal
        self._changes = changes

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None = None
    ) -> Repair:
        """As `Supervisor.repair`, of a pool that is open. Raises `BadInput`."""
        record = self._journal.state.browsers.get(browser_id)
        if record is None:
            raise BadInput(f"there is no browser {browser_id!r} in this pool.", got=browser_id)
        # Of one incarnation a failure is told once, however often and by whomever.
        epoch = failure.ref.epoch if failure.ref else record.epoch
        if record.epoch == epoch and record.repair is None and record.phase is Phase.READY:
            await self._journal.happen(BrowserFailed(browser_id, epoch, failure, start=start))
        await self._changes.until(lambda: self._journal.state.browsers[browser_id].repair is None)
        for repair in reversed(self._journal.state.repairs):
            if (repair.browser_id, repair.from_epoch) == (browser_id, epoch):
                return repair
        raise BadInput(f"browser {browser_id!r} is not in service, so there is nothing to do.")
