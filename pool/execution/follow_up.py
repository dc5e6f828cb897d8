"""What this client has the supervisor do about browsers and models that operations stumble over.

A browser whose answer was outvoted is excluded and replaced; a parked model that is asked for is
loaded again. Both go on behind the operation. This module must not decide whether an answer is
wrong.
"""

from __future__ import annotations

import asyncio
import contextlib

from pool.background import BackgroundTasks
from pool.connection import Connection
from recovery.errors import PoolError
from recovery.failures import Failure
from recovery.records import HostRef


class FaultyBrowsers:
    """Browsers that this client has seen outvoted."""

    def __init__(self, connection: Connection, tasks: BackgroundTasks) -> None:
        self._connection = connection
        self._tasks = tasks

    def charge(self, ref: HostRef, failure: Failure) -> None:
        """A browser was outvoted: leave it alone, and have it replaced."""
        routing = self._connection.known_routing
        if routing is not None:
            routing.exclude_faulty(ref)
        self._tasks.start(self._replace(ref, failure), "charge")

    async def _replace(self, ref: HostRef, failure: Failure) -> None:
        with contextlib.suppress(PoolError):  # it is gone already, or so is the pool
            supervisor, routing = self._connection.require()
            try:
                await routing.unless_gone(supervisor.repair(ref.browser_id, failure, None))
            finally:
                routing.readmit(ref)  # if it is still there, nobody could replace it


class ParkedModels:
    """Models that this client has asked to be loaded again."""

    def __init__(self, connection: Connection, tasks: BackgroundTasks) -> None:
        self._connection = connection
        self._tasks = tasks
        self._reloads: dict[str, asyncio.Task[str]] = {}

    def reload(self, model: str) -> str:
        """If a model is parked, have it loaded again. Returns why that failed, if it did."""
        routing = self._connection.known_routing
        table = routing.table if routing else None
        if table is None or model not in table.state.parked:
            return ""
        reload = self._reloads.get(model)
        if reload is not None and reload.done():
            del self._reloads[model]
            return reload.result()
        if reload is None:
            self._reloads[model] = self._tasks.start(self._ask(model), "reload")
        return ""

    async def _ask(self, model: str) -> str:
        why = ""
        try:
            supervisor, routing = self._connection.require()
            await routing.unless_gone(supervisor.reload(model))
        except PoolError as error:
            why = str(error)
        known = self._connection.known_routing
        if known is not None:
            await known.announce()
        return why
