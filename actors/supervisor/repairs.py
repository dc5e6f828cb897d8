"""Repairs on request, for failures that callers detected.

The journal decides how to repair. This module must not call a host.
"""

from __future__ import annotations

from actors.supervisor.changes import Changes
from actors.supervisor.journal import Journal
from recovery.control import BrowserFailed, Phase, Repair
from recovery.errors import BadInput
from recovery.failures import Failure
from recovery.kinds import RecoveryLevel


class Repairs:
    """Logs failures reported by callers, and waits for their repair."""

    def __init__(self, journal: Journal, changes: Changes) -> None:
        self._journal = journal
        self._changes = changes

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None = None
    ) -> Repair:
        """See `Supervisor.repair`; the pool must be open. Raises `BadInput`."""
        record = self._journal.state.browsers.get(browser_id)
        if record is None:
            raise BadInput(f"there is no browser {browser_id!r} in this pool.", got=browser_id)
        # Only the first failure of an incarnation counts.
        epoch = failure.ref.epoch if failure.ref else record.epoch
        if record.epoch == epoch and record.repair is None and record.phase is Phase.READY:
            await self._journal.happen(BrowserFailed(browser_id, epoch, failure, start=start))
        await self._changes.until(lambda: self._journal.state.browsers[browser_id].repair is None)
        for repair in reversed(self._journal.state.repairs):
            if (repair.browser_id, repair.from_epoch) == (browser_id, epoch):
                return repair
        raise BadInput(f"browser {browser_id!r} is not in service, so it can't be repaired.")
