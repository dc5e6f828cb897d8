"""Records of the supervisor: its configuration, model orders, and the table for clients.

Frozen data, sent between processes. This module must not act.
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
    """Configuration of a pool's supervisor. The pool closes when the lease of `creator` ends."""

    name: str
    level: Level
    strategy: StrategyOrder
    limit: RestartLimit
    lease_seconds: float
    persistent: bool  # outlive the creator
    browsers_max: int = 32
    creator: str = ""
    run: str = ""  # distinguishes successive pools of one name
    folder: str = ""  # of the log and the model orders; empty: in memory only
    checkpoint_seconds: float = 60.0
    resources: ResourceLimits = field(default_factory=ResourceLimits)
    scaling: Mapping[BrowserType, ScalingLimits] = field(default_factory=dict)
    care_seconds: float = 5.0  # between maintenance checks; 0: never
    history: str = ""  # file of the samples; empty: no history
    history_spare: str = ""  # used while another pool writes to `history`
    history_limits: HistoryConfig = field(default_factory=HistoryConfig)


@dataclass(frozen=True)
class ModelOrder:
    """A model to load. `entry` is the pool's own record of it as plain JSON, for clients.

    `known` is an answer of the native runtime, to check browsers with.
    """

    spec: ModelSpec
    backends: tuple[Backend, ...]
    entry: Mapping[str, Any]
    known: KnownAnswer | None = None
    placing: Placing | None = None  # None: on every browser


@dataclass(frozen=True)
class Route:
    """A host that clients may send operations to."""

    status: HostStatus
    host: Host
    data_token: str = field(default="", repr=False)  # of the data plane at `status.ref.address`


@dataclass(frozen=True)
class Table:
    """The state of the pool for clients. A newer one has a higher version."""

    version: int
    state: PoolState
    routes: tuple[Route, ...]
    models: Mapping[str, ModelOrder] = field(default_factory=dict)
    log_trouble: str = ""  # why the log can't be written, or what of it was lost
    faults: tuple[str, ...] = ()  # the supervisor's own latest errors
