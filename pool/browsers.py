"""The browsers of a pool, as a client may order about them: scale, drain, repair, find.

The supervisor carries it out. This module must not start, stop or repair a browser itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from pool.connection import Connection, browser_ids, why_lost
from recovery.control import ALIVE, COMING, ModelPhase, Phase, PoolState, Repair
from recovery.errors import BadInput
from recovery.failures import Failure
from recovery.kinds import RecoveryLevel
from recovery.records import HostRef, HostStatus


class Browsers:
    """The slots of one pool."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def hosts(self) -> tuple[HostStatus, ...]:
        """What this client knows of each browser, without asking anybody."""
        return tuple(self._connection.routing.candidates())

    def serving(self, browser_id: str) -> HostRef:
        """The incarnation that serves in this slot now, or in its place. Raises `BadInput`."""
        routing = self._connection.routing
        refs = {status.ref.browser_id: status.ref for status in routing.candidates()}
        records = routing.table.state.browsers if routing.table else {}
        name = browser_id
        while name not in refs and name in records and records[name].replaced_by:
            name = records[name].replaced_by
        if name not in refs:
            raise BadInput(f"browser {browser_id!r} is not in service.", got=browser_id)
        return refs[name]

    async def control(self) -> PoolState:
        """The supervisor's state as it is now."""
        return (await self._connection.supervisor.table(self._connection.client)).state

    async def drain(self, browser_id: str) -> None:
        """See `BrowserPool.drain`."""
        supervisor, routing = self._connection.require()
        table = routing.table
        if table is None or browser_id not in table.state.browsers:
            known = list(table.state.browsers) if table else []
            raise BadInput(
                f"no browser {browser_id!r} in this pool; it has {', '.join(known)}.",
                expected=known,
                got=browser_id,
            )
        await routing.unless_gone(supervisor.drain(browser_id))

    async def repair(
        self, browser_id: str, failure: Failure, start: RecoveryLevel | None
    ) -> Repair:
        """See `BrowserPool.repair`."""
        supervisor, routing = self._connection.require()
        if failure.ref is None:  # which incarnation is meant, should the call be repeated
            refs = {status.ref.browser_id: status.ref for status in routing.candidates()}
            failure = replace(failure, ref=refs.get(browser_id))
        return await routing.unless_gone(supervisor.repair(browser_id, failure, start))

    async def scale(self, browsers: Mapping[str, int]) -> None:
        """See `BrowserPool.scale`."""
        connection = self._connection
        config, (supervisor, routing) = connection.config, connection.require()
        counts = replace(config, browsers=dict(browsers)).kinds()
        table = await supervisor.table(connection.client)
        living = [
            record
            for record in table.state.browsers.values()
            if record.phase in (Phase.READY, *COMING) and not record.stands_in_for
        ]
        untouched = sum(record.kind not in counts for record in living)
        total = untouched + sum(counts.values())
        if not 1 <= total <= config.max_connections:
            raise BadInput(
                f"browsers: expected 1 to {config.max_connections} (max_connections) in "
                f"all, got {total}.",
                expected=config.max_connections,
                got=total,
            )
        missing = {}
        for kind, count in counts.items():
            have = [record for record in living if record.kind is kind]
            drains = [supervisor.drain(record.id) for record in have[count:]]
            await routing.unless_gone(asyncio.gather(*drains))
            missing[kind] = max(count - len(have), 0)
        taken = [record.id for record in table.state.browsers.values() if record.phase in ALIVE]
        fresh = browser_ids(missing, tuple(taken))
        await supervisor.want(fresh)
        await connection.table_when(
            lambda table: _serve(table.state, fresh), config.launch_seconds + config.load_seconds
        )
        for browser_id in fresh:
            table = await supervisor.table(connection.client)
            if table.state.browsers[browser_id].phase is Phase.GIVEN_UP and config.strict:
                raise why_lost(table.state.browsers[browser_id])


def _serve(state: PoolState, names: Mapping[str, object]) -> bool:
    """Whether these browsers are known, and neither start nor load any more."""
    return names.keys() <= state.browsers.keys() and all(
        state.browsers[name].phase not in COMING
        and ModelPhase.LOADING not in state.browsers[name].models.values()
        for name in names
    )
