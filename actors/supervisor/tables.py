"""The table for clients: routes to browsers, and the pool's state.

Built from the other parts at each request. This module must not change any of them.
"""

from __future__ import annotations

from actors.supervisor.changes import Changes
from actors.supervisor.hosts import Hosts
from actors.supervisor.journal import Journal
from actors.supervisor.models import Models
from actors.supervisor.records import Route, Table
from actors.supervisor.tasks import Tasks
from recovery.control import Phase
from recovery.kinds import Readiness
from recovery.records import HostRef, HostStatus

_FAULTS_SHOWN = 8
_ROUTED = {
    Phase.READY: Readiness.READY,
    Phase.RECONNECTING: Readiness.STARTING,  # it may be back soon, with its models
    Phase.DRAINING: Readiness.DRAINING,
}


class Tables:
    """Builds the table of one term."""

    def __init__(
        self,
        hosts: Hosts,
        journal: Journal,
        models: Models,
        tasks: Tasks,
        changes: Changes,
        term: int,
    ) -> None:
        self._hosts = hosts
        self._journal = journal
        self._models = models
        self._tasks = tasks
        self._changes = changes
        self._term = term

    def table(self) -> Table:
        """The table as it is now."""
        state = self._journal.state
        routes = []
        for record in state.browsers.values():
            host = self._hosts.get(record.id)
            report = self._hosts.report(record.id)
            if host is None or report is None or record.phase not in _ROUTED:
                continue
            status = HostStatus(
                HostRef(record.id, record.epoch, report.node, report.address),
                record.kind,
                _ROUTED[record.phase],
                queue_max=1,  # a guess until the host itself replies
                models=record.numeric,
                term=self._term,
            )
            routes.append(Route(status, host, report.data_token))
        return Table(
            self._changes.version,
            state,
            tuple(routes),
            self._models.orders(),
            self._journal.trouble,
            tuple(self._tasks.faults)[-_FAULTS_SHOWN:],
        )
