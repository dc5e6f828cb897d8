"""The events of a pool that are written to its log, one frozen dataclass each.

Their names and fields are part of the log's format (see `recovery.log.codec`), for old logs too.
This module must not decide what follows from an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recovery.breaker import Snapshot
from recovery.failures import Failure
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.placement import Placing
from recovery.plan import StrategyOrder
from recovery.records import BrowserFacts, NumericId
from recovery.supervision import RestartLimit


@dataclass(frozen=True)
class PoolOpened:
    name: str
    level: Level
    strategy: StrategyOrder
    limit: RestartLimit
    term: int


@dataclass(frozen=True)
class TermBegan:
    """A new incarnation of the supervisor continues with this state."""

    term: int


@dataclass(frozen=True)
class BrowserWanted:
    browser_id: str
    kind: BrowserType


@dataclass(frozen=True)
class BrowserReady:
    browser_id: str
    epoch: int
    facts: BrowserFacts


@dataclass(frozen=True)
class BrowserFound:
    """A worker reported this incarnation, whose events the log may have lost."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class BrowserReconnected:
    """The page of a disconnected incarnation is connected again, with its models still loaded."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class BreakersMoved:
    """Breakers of a browser have changed state; `breakers` are those of `BrowserRecord`."""

    browser_id: str
    breakers: Mapping[str, Snapshot]


@dataclass(frozen=True)
class BrowserFailed:
    """An incarnation ended, or is disconnected (a connection failure whose scope is the page).

    `final`: a retry can't help (the browser is not installed). `start`: the rung to begin with,
    if the reporter has chosen one.
    """

    browser_id: str
    epoch: int
    failure: Failure
    final: bool = False
    start: RecoveryLevel | None = None


@dataclass(frozen=True)
class BrowserUnwanted:
    browser_id: str


@dataclass(frozen=True)
class BrowserRecycled:
    """A browser in service is to be restarted, after it has drained."""

    browser_id: str
    epoch: int
    why: str


@dataclass(frozen=True)
class BrowserStopped:
    browser_id: str


@dataclass(frozen=True)
class ModelWanted:
    model: str
    digest: str
    type: ModelType = ModelType.UNKNOWN
    placing: Placing | None = None  # None: every browser loads it


@dataclass(frozen=True)
class ModelUnwanted:
    model: str


@dataclass(frozen=True)
class ModelParked:
    """A model is unloaded from every browser, until it is wanted again."""

    model: str
    why: str


@dataclass(frozen=True)
class ModelLoaded:
    browser_id: str
    epoch: int
    model: str
    numeric: NumericId


@dataclass(frozen=True)
class ModelFailed:
    browser_id: str
    epoch: int
    model: str
    failure: Failure


@dataclass(frozen=True)
class PoolClosing:
    pass


Body = (
    PoolOpened
    | TermBegan
    | BrowserWanted
    | BrowserFound
    | BrowserReady
    | BrowserReconnected
    | BreakersMoved
    | BrowserFailed
    | BrowserUnwanted
    | BrowserRecycled
    | BrowserStopped
    | ModelWanted
    | ModelUnwanted
    | ModelParked
    | ModelLoaded
    | ModelFailed
    | PoolClosing
)


@dataclass(frozen=True)
class Event:
    """One entry of the log: what happened, when (wall seconds), under which term."""

    seq: int
    term: int
    at: float
    body: Body
