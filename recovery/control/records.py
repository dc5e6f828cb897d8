"""The state of a pool: its browsers, their models and their repairs, as frozen data.

A `PoolState` is all of it, and is what a checkpoint stores. The functions only look up or replace
a record. This module must not know of events or instructions, and
must not decide what becomes of a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from recovery.breaker import CircuitState, Snapshot
from recovery.errors import IllegalTransition
from recovery.failures import Category, Failure
from recovery.frozen import replace
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.placement import Placing
from recovery.plan import STRATEGIES, Plan, StrategyOrder, Tally
from recovery.records import BrowserFacts, NumericId
from recovery.supervision import RestartLimit


class Phase(StrEnum):
    """The phase of a browser's life cycle.

    RECONNECTING: its processes are alive, its page is disconnected. REPLACING: it is dead, and
    another browser is being started in its place.
    """

    STARTING = "starting"
    READY = "ready"
    RECONNECTING = "reconnecting"
    REPLACING = "replacing"
    DRAINING = "draining"
    STOPPED = "stopped"
    GIVEN_UP = "given_up"


ALIVE = (Phase.STARTING, Phase.READY, Phase.RECONNECTING, Phase.REPLACING, Phase.DRAINING)
COMING = (Phase.STARTING, Phase.RECONNECTING, Phase.REPLACING)  # may still become ready


class ModelPhase(StrEnum):
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True)
class Adjusted:
    """What the arguments of a launch are adjusted to (the AGGRESSIVE rung)."""

    model_type: ModelType
    category: Category


@dataclass(frozen=True)
class StepOutcome:
    """One finished step of a repair: the rungs that were tried, and the one that worked."""

    rungs: tuple[RecoveryLevel, ...]
    began: float
    ended: float
    worked: RecoveryLevel | None
    note: str = ""


@dataclass(frozen=True)
class Repair:
    """The repair of one failure of one browser, under way or finished.

    `step` is the index of the plan's step under way, which began at `step_began`. `ready` is when
    the repair ended well, `outcome` how it ended, in words.
    """

    browser_id: str
    from_epoch: int
    failure: Failure
    began: float
    plan: Plan
    model_type: ModelType = ModelType.UNKNOWN
    step: int = -1
    step_began: float = 0.0
    trying: tuple[RecoveryLevel, ...] = ()  # rungs of this step that have not failed yet
    steps: tuple[StepOutcome, ...] = ()
    ready: float | None = None
    outcome: str = ""


@dataclass(frozen=True)
class BrowserRecord:
    """One slot. `restarts` holds the times of its recent restarts (seconds, event time).

    `loads_failed` counts, by model, loads in a row that failed or in which the browser died.
    `repair` is the one under way. `stands_in_for` names the browser that this one was started to
    replace, `replaced_by` the one that took its place. `breakers` are its circuit breakers as
    last reported, by model; the empty name is the browser's own.
    """

    id: str
    kind: BrowserType
    epoch: int
    phase: Phase
    since: float
    facts: BrowserFacts | None = None
    models: Mapping[str, ModelPhase] = field(default_factory=dict)
    numeric: Mapping[str, NumericId] = field(default_factory=dict)
    load_failures: Mapping[str, Failure] = field(default_factory=dict)
    loads_failed: Mapping[str, int] = field(default_factory=dict)
    restarts: tuple[float, ...] = ()
    launches_failed: int = 0  # in a row, since it was last ready
    failure: Failure | None = None
    repair: Repair | None = None
    adjusted: Adjusted | None = None
    served: bool = False  # whether it has ever been ready
    stands_in_for: str = ""
    replaced_by: str = ""
    recycling: bool = False  # it is drained in order to be restarted
    breakers: Mapping[str, Snapshot] = field(default_factory=dict)

    @property
    def circuit(self) -> CircuitState:
        """The state of the browser's own breaker, as last reported."""
        known = self.breakers.get("")
        return known.breaker.state if known else CircuitState.CLOSED


@dataclass(frozen=True)
class PoolState:
    """`tallies` counts each rung's attempts and successes, by kind of failure: see `tally_key`.

    `stand_ins` counts the browsers that were started to replace others: each has a name of its
    own, so that no two incarnations ever share a name and an epoch.
    """

    name: str = ""
    level: Level = Level.MEDIUM
    strategy: StrategyOrder = STRATEGIES["progressive"]
    limit: RestartLimit = field(default_factory=RestartLimit)
    term: int = 0
    browsers: Mapping[str, BrowserRecord] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)  # wanted: name -> digest
    model_types: Mapping[str, ModelType] = field(default_factory=dict)
    # Of the wanted ones, those that not every browser loads.
    placed: Mapping[str, Placing] = field(default_factory=dict)
    parked: Mapping[str, str] = field(default_factory=dict)  # unloaded until wanted again
    missing: tuple[BrowserType, ...] = ()  # kinds that launches found not installed
    repairs: tuple[Repair, ...] = ()  # finished ones
    tallies: Mapping[str, Mapping[RecoveryLevel, Tally]] = field(default_factory=dict)
    stand_ins: int = 0
    closing: bool = False


# An alias for those who look for a browser state manager: it is a value, not an object with
# methods; `decide` returns the next one.
BrowserStateManager = PoolState


def tally_key(category: Category, kind: BrowserType, model_type: ModelType) -> str:
    return f"{category}/{kind}/{model_type}"


def record_of(state: PoolState, browser_id: str) -> BrowserRecord:
    try:
        return state.browsers[browser_id]
    except KeyError:
        raise IllegalTransition(f"browser {browser_id} is not in the pool's state") from None


def with_record(state: PoolState, record: BrowserRecord) -> PoolState:
    return replace(state, browsers={**state.browsers, record.id: record})


def without_models(record: BrowserRecord) -> BrowserRecord:
    """The record of a dead browser; its failed loads are kept."""
    return replace(record, models={}, numeric={})


def without_model(record: BrowserRecord, model: str) -> BrowserRecord:
    return replace(
        record,
        models=without(record.models, model),
        numeric=without(record.numeric, model),
        load_failures=without(record.load_failures, model),
        loads_failed=without(record.loads_failed, model),
    )


def without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}
