"""What `BrowserPool.state` shows, put together from what supervisor and client know.

This module must not ask anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actors.messages import LaunchReport
from actors.supervisor.records import Table
from recovery.control import Phase, PoolState
from recovery.kinds import Level
from recovery.levels import effective_level
from recovery.records import HostStatus


@dataclass(frozen=True)
class PoolView:
    """A pool as it is now."""

    name: str
    level: Level
    level_effective: Level
    degraded: bool
    control: PoolState
    hosts: tuple[HostStatus, ...]
    launches: Mapping[str, LaunchReport]
    memory_bytes: Mapping[str, int]
    dashboard_url: str
    operations: Mapping[str, int]
    log_trouble: str = ""  # why the control log can't be written, or what of it was lost
    faults: tuple[str, ...] = ()  # what the supervisor could not carry out, the last of it


def view_of(
    table: Table,
    *,
    name: str,
    wanted_level: Level,
    level: Level,
    hosts: tuple[HostStatus, ...],
    launches: Mapping[str, LaunchReport],
    memory: Mapping[str, int],
    dashboard_url: str,
    operations: Mapping[str, int],
) -> PoolView:
    """`wanted_level` is what the pool was asked to hold, `level` what it was opened at."""
    records = table.state.browsers.values()
    alive = [record for record in records if record.phase is Phase.READY]
    wanted = [
        record
        for record in records
        if record.phase is not Phase.STOPPED and not record.replaced_by and not record.stands_in_for
    ]
    effective = effective_level(level, len(alive))
    return PoolView(
        name,
        wanted_level,
        effective,
        degraded=len(alive) < len(wanted)
        or effective is not wanted_level
        or bool(table.log_trouble),
        control=table.state,
        hosts=hosts,
        launches=launches,
        memory_bytes=memory,
        dashboard_url=dashboard_url,
        operations=dict(operations),
        log_trouble=table.log_trouble,
        faults=table.faults,
    )
