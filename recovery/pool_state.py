"""The pool's control state, and what every event makes of it: frozen data, one function.

`decide(state, event)` returns the next state and the instructions that follow; `apply` is
`decide` without the instructions, which is how a log is replayed. Time arrives inside the event.
Everything that affects the state of browsers, models and repairs is here; an event that the
state does not allow raises and leaves the state alone. This module must not do anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from recovery.errors import IllegalTransition
from recovery.failures import Category, Failure
from recovery.kinds import BrowserType, Level, Strategy
from recovery.records import BrowserFacts, NumericId
from recovery.supervision import GiveUp, RestartLimit, record_restart

HISTORY_MAX = 64  # repairs remembered in the state; the log keeps all


class Phase(StrEnum):
    """Where a browser is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    GIVEN_UP = "given_up"


class ModelPhase(StrEnum):
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"


@dataclass(frozen=True)
class BrowserRecord:
    """One slot. `restarts` holds the times of its recent restarts (seconds, event time)."""

    id: str
    kind: BrowserType
    epoch: int
    phase: Phase
    since: float
    facts: BrowserFacts | None = None
    models: Mapping[str, ModelPhase] = field(default_factory=dict)
    numeric: Mapping[str, NumericId] = field(default_factory=dict)
    load_failures: Mapping[str, Failure] = field(default_factory=dict)
    restarts: tuple[float, ...] = ()
    launches_failed: int = 0  # in a row, since it was last ready
    failure: Failure | None = None


@dataclass(frozen=True)
class Repair:
    """One replaced browser, from the failure to the next readiness."""

    browser_id: str
    from_epoch: int
    failure: Failure
    began: float
    ready: float | None = None


@dataclass(frozen=True)
class PoolState:
    name: str = ""
    level: Level = Level.MEDIUM
    strategy: Strategy = Strategy.PROGRESSIVE
    limit: RestartLimit = field(default_factory=RestartLimit)
    term: int = 0
    browsers: Mapping[str, BrowserRecord] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)  # wanted: name -> digest
    repairs: tuple[Repair, ...] = ()
    closing: bool = False


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolOpened:
    name: str
    level: Level
    strategy: Strategy
    limit: RestartLimit
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
class BrowserFailed:
    """An incarnation is over. `final`: trying again can't help (nothing is installed)."""

    browser_id: str
    epoch: int
    failure: Failure
    final: bool = False


@dataclass(frozen=True)
class BrowserUnwanted:
    browser_id: str


@dataclass(frozen=True)
class BrowserStopped:
    browser_id: str


@dataclass(frozen=True)
class ModelWanted:
    model: str
    digest: str


@dataclass(frozen=True)
class ModelUnwanted:
    model: str


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
    | BrowserWanted
    | BrowserReady
    | BrowserFailed
    | BrowserUnwanted
    | BrowserStopped
    | ModelWanted
    | ModelUnwanted
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


# -- instructions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Start incarnation `epoch`, after `delay` seconds."""

    browser_id: str
    kind: BrowserType
    epoch: int
    delay: float = 0.0


@dataclass(frozen=True)
class Load:
    browser_id: str
    epoch: int
    model: str


@dataclass(frozen=True)
class Unload:
    browser_id: str
    epoch: int
    model: str


@dataclass(frozen=True)
class Drain:
    """Admit nothing more, answer what is in flight, then stop."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class Stop:
    browser_id: str
    epoch: int


Instruction = Launch | Load | Unload | Drain | Stop
Decision = tuple[PoolState, tuple[Instruction, ...]]


def apply(state: PoolState, event: Event) -> PoolState:
    """The state after `event`. Replaying a log is `reduce(apply, events, checkpoint)`."""
    return decide(state, event)[0]


def decide(state: PoolState, event: Event) -> Decision:
    """The state after `event`, and what is to be done. Raises `IllegalTransition`.

    News of an incarnation that has been replaced changes nothing: it is not illegal, only late.
    """
    match event.body:
        case PoolOpened(name, level, strategy, limit, term):
            opened = replace(
                state, name=name, level=level, strategy=strategy, limit=limit, term=term
            )
            return opened, ()
        case BrowserWanted(browser_id, kind):
            return _wanted(state, browser_id, kind, event.at)
        case BrowserReady() as body:
            return _ready(state, body, event.at)
        case BrowserFailed() as body:
            return _failed(state, body, event.at)
        case BrowserUnwanted(browser_id):
            return _unwanted(state, browser_id, event.at)
        case BrowserStopped(browser_id):
            record = replace(_without_models(_record(state, browser_id)), phase=Phase.STOPPED)
            return _with(state, replace(record, since=event.at)), ()
        case ModelWanted(model, digest):
            return _model_wanted(state, model, digest)
        case ModelUnwanted(model):
            return _model_unwanted(state, model)
        case ModelLoaded(browser_id, epoch, model, numeric):
            return _model_in(state, browser_id, epoch, model, numeric), ()
        case ModelFailed(browser_id, epoch, model, failure):
            return _model_in(state, browser_id, epoch, model, failure), ()
        case PoolClosing():
            stops = tuple(Stop(r.id, r.epoch) for r in state.browsers.values() if r.phase in ALIVE)
            return replace(state, closing=True), stops


ALIVE = (Phase.STARTING, Phase.READY, Phase.DRAINING)


def _wanted(state: PoolState, browser_id: str, kind: BrowserType, at: float) -> Decision:
    known = state.browsers.get(browser_id)
    if state.closing or (known is not None and known.phase in ALIVE):
        raise IllegalTransition(f"{browser_id} can't be wanted now", state=str(known))
    epoch = known.epoch + 1 if known else 0
    record = BrowserRecord(browser_id, kind, epoch, Phase.STARTING, at)
    return _with(state, record), (Launch(browser_id, kind, epoch),)


def _ready(state: PoolState, body: BrowserReady, at: float) -> Decision:
    record = _record(state, body.browser_id)
    if record.epoch != body.epoch or record.phase in (Phase.STOPPED, Phase.GIVEN_UP):
        return state, ()
    if record.phase is not Phase.STARTING:
        raise IllegalTransition(f"{record.id} was ready while {record.phase}", epoch=body.epoch)
    record = replace(
        record,
        phase=Phase.READY,
        since=at,
        facts=body.facts,
        launches_failed=0,
        models=dict.fromkeys(state.models, ModelPhase.LOADING),
    )
    repairs = tuple(
        replace(repair, ready=at)
        if repair.browser_id == record.id and repair.ready is None
        else repair
        for repair in state.repairs
    )
    loads = tuple(Load(record.id, record.epoch, model) for model in state.models)
    return replace(_with(state, record), repairs=repairs), loads


def _failed(state: PoolState, body: BrowserFailed, at: float) -> Decision:
    record = _record(state, body.browser_id)
    if record.epoch != body.epoch or record.phase in (Phase.STOPPED, Phase.GIVEN_UP):
        return state, ()
    ended = replace(_without_models(record), since=at, failure=body.failure)
    if state.closing or record.phase is Phase.DRAINING:
        return _with(state, replace(ended, phase=Phase.STOPPED)), (Stop(record.id, record.epoch),)
    verdict = record_restart(record.restarts, at, state.limit)
    launching = body.failure.category is Category.LAUNCH_FAILURE
    ended = replace(ended, launches_failed=record.launches_failed + launching)
    hopeless = body.final or ended.launches_failed >= state.limit.launches_failed_max
    if hopeless or isinstance(verdict, GiveUp):
        return _with(state, replace(ended, phase=Phase.GIVEN_UP)), (Stop(record.id, record.epoch),)
    again = replace(ended, phase=Phase.STARTING, epoch=record.epoch + 1, restarts=verdict.history)
    repair = Repair(record.id, record.epoch, body.failure, at)
    repairs = (*state.repairs, repair)[-HISTORY_MAX:]
    # A browser that died in service starts again at once; one that can't start waits longer
    # each time.
    delay = verdict.delay if launching else 0.0
    return (
        replace(_with(state, again), repairs=repairs),
        (Launch(record.id, record.kind, again.epoch, delay),),
    )


def _unwanted(state: PoolState, browser_id: str, at: float) -> Decision:
    record = _record(state, browser_id)
    if record.phase is Phase.READY:
        draining = replace(record, phase=Phase.DRAINING, since=at)
        return _with(state, draining), (Drain(record.id, record.epoch),)
    if record.phase is Phase.STARTING:
        stopped = replace(record, phase=Phase.STOPPED, since=at)
        return _with(state, stopped), (Stop(record.id, record.epoch),)
    return state, ()


def _model_wanted(state: PoolState, model: str, digest: str) -> Decision:
    loads = []
    for record in state.browsers.values():
        if record.phase is Phase.READY:
            loads.append(Load(record.id, record.epoch, model))
            record = _without_model(record, model)  # of that name, another file perhaps
            loading = {**record.models, model: ModelPhase.LOADING}
            state = _with(state, replace(record, models=loading))
    return replace(state, models={**state.models, model: digest}), tuple(loads)


def _model_unwanted(state: PoolState, model: str) -> Decision:
    unloads = []
    for record in state.browsers.values():
        if model in record.models:
            unloads.append(Unload(record.id, record.epoch, model))
            state = _with(state, _without_model(record, model))
    return replace(state, models=_without(state.models, model)), tuple(unloads)


def _model_in(
    state: PoolState, browser_id: str, epoch: int, model: str, outcome: NumericId | Failure
) -> PoolState:
    record = _record(state, browser_id)
    if record.epoch != epoch or model not in record.models:
        return state
    numeric, failures = _without(record.numeric, model), _without(record.load_failures, model)
    if isinstance(outcome, Failure):
        phase, failures[model] = ModelPhase.FAILED, outcome
    else:
        phase, numeric[model] = ModelPhase.LOADED, outcome
    models = {**record.models, model: phase}
    return _with(state, replace(record, models=models, numeric=numeric, load_failures=failures))


def _record(state: PoolState, browser_id: str) -> BrowserRecord:
    try:
        return state.browsers[browser_id]
    except KeyError:
        raise IllegalTransition(f"no browser {browser_id} was ever wanted") from None


def _with(state: PoolState, record: BrowserRecord) -> PoolState:
    return replace(state, browsers={**state.browsers, record.id: record})


def _without_models(record: BrowserRecord) -> BrowserRecord:
    return replace(record, models={}, numeric={}, load_failures={})


def _without_model(record: BrowserRecord, model: str) -> BrowserRecord:
    return replace(
        record,
        models=_without(record.models, model),
        numeric=_without(record.numeric, model),
        load_failures=_without(record.load_failures, model),
    )


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}
