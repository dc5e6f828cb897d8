"""A client's requests about browsers: scale, drain, repair, find.

The supervisor carries them out. This module must not start, stop or repair a browser itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from pool.connection import Connection, browser_ids, why_lost
from recovery import checks
from recovery.control import ALIVE, COMING, ModelPhase, Phase, PoolState, Repair
from recovery.errors import BadInput
from recovery.failures import Failure
from recovery.kinds import RecoveryLevel
from recovery.records import HostRef, HostStatus

_ID_MAX = 128


class Browsers:
    """The slots of one pool."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def hosts(self) -> tuple[HostStatus, ...]:
        """The last known status of each browser; sends no request."""
        return tuple(self._connection.routing.candidates())

    def serving(self, browser_id: str) -> HostRef:
        """The current incarnation of this slot or its replacement. Raises `BadInput`."""
        check_browser_id(browser_id)
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
        check_browser_id(browser_id)
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
        check_browser_id(browser_id)
        checks.instance("failure", failure, Failure, "a recovery.failures.Failure")
        if start is not None:
            start = RecoveryLevel(checks.whole("start", start, 1, len(RecoveryLevel), "a rung"))
        supervisor, routing = self._connection.require()
        if failure.ref is None:  # fix the incarnation, in case the call is repeated
            refs = {status.ref.browser_id: status.ref for status in routing.candidates()}
            failure = replace(failure, ref=refs.get(browser_id))
        return await routing.unless_gone(supervisor.repair(browser_id, failure, start))

    async def scale(self, browsers: Mapping[str, int]) -> None:
        """See `BrowserPool.scale`."""
        connection = self._connection
        config = connection.config
        counts = replace(config, browsers=browsers).kinds()
        supervisor, routing = connection.require()
        table = await supervisor.table(connection.client)
        running = [
            record
            for record in table.state.browsers.values()
            if record.phase in (Phase.READY, *COMING) and not record.stands_in_for
        ]
        untouched = sum(record.kind not in counts for record in running)
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
            have = [record for record in running if record.kind is kind]
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


def check_browser_id(browser_id: object) -> None:
    """Raises `BadInput` for what names no browser of any pool."""
    checks.text("browser_id", browser_id, _ID_MAX)


def _serve(state: PoolState, names: Mapping[str, object]) -> bool:
    """Whether these browsers exist, and have finished starting and loading."""
    return names.keys() <= state.browsers.keys() and all(
        state.browsers[name].phase not in COMING
        and ModelPhase.LOADING not in state.browsers[name].models.values()
        for name in names
    )
