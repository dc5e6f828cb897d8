"""Builds the result of `BrowserPool.state` from data of supervisor and client.

This module must not send requests.
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
    """The current state of a pool."""

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
    faults: tuple[str, ...] = ()  # the supervisor's own latest errors


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
    """`wanted_level` is the configured level, `level` the one that the pool was opened at."""
    records = table.state.browsers.values()
    ready = [record for record in records if record.phase is Phase.READY]
    wanted = [
        record
        for record in records
        if record.phase is not Phase.STOPPED and not record.replaced_by and not record.stands_in_for
    ]
    effective = effective_level(level, len(ready))
    return PoolView(
        name,
        wanted_level,
        effective,
        degraded=len(ready) < len(wanted)
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
