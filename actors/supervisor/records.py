"""What a supervisor is told and what it tells its clients: its configuration, orders, the table.

Frozen data that crosses process borders. Nothing here acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.supervisor.hosts import Host
from recovery.control import PoolState
from recovery.history.config import HistoryConfig
from recovery.kinds import Backend, BrowserType, Level
from recovery.placement import Placing
from recovery.plan import StrategyOrder
from recovery.records import HostStatus
from recovery.resources import ResourceLimits
from recovery.scaling import ScalingLimits
from recovery.supervision import RestartLimit
from sharding.models.known_answers import KnownAnswer
from sharding.models.signature import ModelSpec


@dataclass(frozen=True)
class SupervisorConfig:
    """What a pool's supervisor is told once. `creator` is the client whose lease is the pool's."""

    name: str
    level: Level
    strategy: StrategyOrder
    limit: RestartLimit
    lease_seconds: float
    persistent: bool  # outlive the creator
    browsers_max: int = 32
    creator: str = ""
    run: str = ""  # tells pools of one name apart, one after the other
    folder: str = ""  # of the log and the model orders; empty: in memory only
    checkpoint_seconds: float = 60.0
    resources: ResourceLimits = field(default_factory=ResourceLimits)
    scaling: Mapping[BrowserType, ScalingLimits] = field(default_factory=dict)
    care_seconds: float = 5.0  # between two looks at memory, wear and size; 0: never
    history: str = ""  # file of the samples; empty: none are kept
    history_spare: str = ""  # to be used while another pool writes to that
    history_limits: HistoryConfig = field(default_factory=HistoryConfig)


@dataclass(frozen=True)
class ModelOrder:
    """A model to load. `entry` is the pool's own record of it as plain JSON, for clients.

    `known` is what the native runtime answers to a question that any browser can be asked.
    """

    spec: ModelSpec
    backends: tuple[Backend, ...]
    entry: Mapping[str, Any]
    known: KnownAnswer | None = None
    placing: Placing | None = None  # None: on every browser


@dataclass(frozen=True)
class Route:
    """A host that clients may ask."""

    status: HostStatus
    host: Host
    data_token: str = field(default="", repr=False)  # of the data plane at `status.ref.address`


@dataclass(frozen=True)
class Table:
    """What clients know of the pool. A newer one has a higher version."""

    version: int
    state: PoolState
    routes: tuple[Route, ...]
    models: Mapping[str, ModelOrder] = field(default_factory=dict)
    log_trouble: str = ""  # why the log can't be written, or what of it was lost
    faults: tuple[str, ...] = ()  # what the supervisor itself could not carry out, the last of it
