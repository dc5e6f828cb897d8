"""The pool's control state, and what every event makes of it: frozen data, one function.

`decide(state, event)` returns the next state and the instructions that follow; `apply` is
`decide` without the instructions, which is how a log is replayed. Time arrives inside the event.
Everything that affects the state of browsers, models and repairs is here; an event that the
state does not allow raises and leaves the state alone. This module must not do anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from recovery.adjustments import adjust, fallback_order
from recovery.breaker import CircuitState, Snapshot
from recovery.errors import IllegalTransition
from recovery.failures import Category, Failure, Scope
from recovery.frozen import replace
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.placement import Placing, Slot, place
from recovery.plan import STRATEGIES, Plan, StrategyOrder, Tally, plan
from recovery.records import BrowserFacts, NumericId
from recovery.supervision import GiveUp, RestartLimit, record_restart

HISTORY_MAX = 64  # repairs remembered in the state; the log keeps all
LOAD_ATTEMPTS_MAX = 2  # of a model on one browser; the second failure in a row settles it
LOAD_AGAIN_SECONDS = 0.5
DEAD_MAX = 32  # browsers that were replaced and are long gone, kept for people to look at
TALLIES_MAX = 256  # kinds of failure whose outcomes are remembered; the oldest goes


class Phase(StrEnum):
    """Where a browser is in its life.

    RECONNECTING: its processes live, its page is out of touch. REPLACING: it is gone, and another
    browser is being started in its place.
    """

    STARTING = "starting"
    READY = "ready"
    RECONNECTING = "reconnecting"
    REPLACING = "replacing"
    DRAINING = "draining"
    STOPPED = "stopped"
    GIVEN_UP = "given_up"


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
    """One step of a repair that is over: the rungs that were tried, and the one that worked."""

    rungs: tuple[RecoveryLevel, ...]
    began: float
    ended: float
    worked: RecoveryLevel | None
    note: str = ""


@dataclass(frozen=True)
class Repair:
    """What is being done, or was done, about one failure of one browser.

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
    last heard of, by model; the empty name is the browser's own.
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
    recycling: bool = False  # it is drained only to be started anew
    breakers: Mapping[str, Snapshot] = field(default_factory=dict)

    @property
    def circuit(self) -> CircuitState:
        """The state of the browser's own breaker, as last heard of."""
        known = self.breakers.get("")
        return known.breaker.state if known else CircuitState.CLOSED


@dataclass(frozen=True)
class PoolState:
    """`tallies` counts what came of each rung, by kind of failure: see `tally_key`.

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
    parked: Mapping[str, str] = field(default_factory=dict)  # unloaded until somebody asks again
    missing: tuple[BrowserType, ...] = ()  # kinds that are not installed, as launches have shown
    repairs: tuple[Repair, ...] = ()  # that are over
    tallies: Mapping[str, Mapping[RecoveryLevel, Tally]] = field(default_factory=dict)
    stand_ins: int = 0
    closing: bool = False


def tally_key(category: Category, kind: BrowserType, model_type: ModelType) -> str:
    return f"{category}/{kind}/{model_type}"


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolOpened:
    name: str
    level: Level
    strategy: StrategyOrder
    limit: RestartLimit
    term: int


@dataclass(frozen=True)
class TermBegan:
    """A new incarnation of the supervisor goes on with this state."""

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
    """A worker has been seen at this incarnation, which the log may have lost."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class BrowserReconnected:
    """The page of an incarnation that was out of touch is back, with everything it had."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class BreakersMoved:
    """Breakers of a browser have changed state; `breakers` are those of `BrowserRecord`."""

    browser_id: str
    breakers: Mapping[str, Snapshot]


@dataclass(frozen=True)
class BrowserFailed:
    """An incarnation is over, or out of touch (a connection failure whose scope is the page).

    `final`: trying again can't help (nothing is installed). `start`: the rung to begin with, if
    whoever reports it has decided that.
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
    """A browser in service is to be started anew: it finishes what it has first."""

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
    """A model is taken out of every browser, until it is wanted again."""

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


# -- instructions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Start incarnation `epoch`, after `delay` seconds."""

    browser_id: str
    kind: BrowserType
    epoch: int
    delay: float = 0.0
    adjusted: Adjusted | None = None


@dataclass(frozen=True)
class Reconnect:
    """Get back in touch with the page of an incarnation that lives."""

    browser_id: str
    epoch: int


@dataclass(frozen=True)
class Load:
    """Load a model, after `delay` seconds."""

    browser_id: str
    epoch: int
    model: str
    delay: float = 0.0


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


Instruction = Launch | Reconnect | Load | Unload | Drain | Stop
Decision = tuple[PoolState, tuple[Instruction, ...]]


def apply(state: PoolState, event: Event) -> PoolState:
    """The state after `event`. Replaying a log is `reduce(apply, events, checkpoint)`."""
    return decide(state, event)[0]


def decide(state: PoolState, event: Event) -> Decision:
    """The state after `event`, and what is to be done. Raises `IllegalTransition`.

    News of an incarnation that has been replaced changes nothing: it is not illegal, only late.
    """
    state, orders = _decide(state, event)
    if not state.placed or state.closing:
        return state, orders
    state, loads = _placed(state)
    return state, (*orders, *loads)


def _decide(state: PoolState, event: Event) -> Decision:
    match event.body:
        case PoolOpened(name, level, strategy, limit, term):
            opened = replace(
                state, name=name, level=level, strategy=strategy, limit=limit, term=term
            )
            return opened, ()
        case TermBegan(term):
            return replace(state, term=term), ()
        case BrowserFound(browser_id, epoch):
            record = _record(state, browser_id)
            return _with(state, replace(record, epoch=max(record.epoch, epoch))), ()
        case BrowserWanted(browser_id, kind):
            return _wanted(state, browser_id, kind, event.at)
        case BrowserReady() as body:
            return _ready(state, body, event.at)
        case BrowserReconnected() as body:
            return _reconnected(state, body, event.at)
        case BreakersMoved(browser_id, breakers):
            record = _record(state, browser_id)
            return _with(state, replace(record, breakers={**record.breakers, **breakers})), ()
        case BrowserFailed() as body:
            return _failed(state, body, event.at)
        case BrowserUnwanted(browser_id):
            return _unwanted(state, browser_id, event.at)
        case BrowserRecycled(browser_id, epoch):
            return _recycled(state, browser_id, epoch, event.at)
        case BrowserStopped(browser_id):
            return _stopped(state, _record(state, browser_id), event.at)
        case ModelWanted() as body:
            return _model_wanted(state, body)
        case ModelUnwanted(model):
            return _model_unwanted(state, model)
        case ModelParked(model):
            return _model_parked(state, model)
        case ModelLoaded() as body:
            return _model_loaded(state, body), ()
        case ModelFailed() as body:
            return _model_failed(state, body)
        case PoolClosing():
            stops = tuple(Stop(r.id, r.epoch) for r in state.browsers.values() if r.phase in ALIVE)
            return replace(state, closing=True), stops


ALIVE = (Phase.STARTING, Phase.READY, Phase.RECONNECTING, Phase.REPLACING, Phase.DRAINING)
COMING = (Phase.STARTING, Phase.RECONNECTING, Phase.REPLACING)  # may yet be ready by themselves


def _wanted(state: PoolState, browser_id: str, kind: BrowserType, at: float) -> Decision:
    known = state.browsers.get(browser_id)
    if state.closing or (known is not None and known.phase in ALIVE):
        raise IllegalTransition(f"{browser_id} can't be wanted now", state=str(known))
    epoch = known.epoch + 1 if known else 0
    record = BrowserRecord(browser_id, kind, epoch, Phase.STARTING, at)
    return _with(state, record), (Launch(browser_id, kind, epoch),)


def _ready(state: PoolState, body: BrowserReady, at: float) -> Decision:
    record = _record(state, body.browser_id)
    over = (Phase.STOPPED, Phase.GIVEN_UP, Phase.REPLACING)
    if record.epoch != body.epoch or record.phase in over:
        return state, ()
    if record.phase is not Phase.STARTING:
        raise IllegalTransition(f"{record.id} was ready while {record.phase}", epoch=body.epoch)
    record = replace(
        record,
        phase=Phase.READY,
        since=at,
        facts=body.facts,
        launches_failed=0,
        served=True,
        models={
            model: ModelPhase.FAILED if _hopeless(record, model) else ModelPhase.LOADING
            for model in _everywhere(state)
        },
    )
    state = _with(state, record)
    loads = _loads(record)
    repaired = record
    if record.stands_in_for:
        repaired = _record(state, record.stands_in_for)
        state = _with(state, replace(record, stands_in_for=""))
    if repaired.repair is None:
        return state, loads
    worked = _rung_at_work(repaired, record)
    state, stops = _repaired(state, repaired, worked, at, by=record)
    return state, (*loads, *stops)


def _reconnected(state: PoolState, body: BrowserReconnected, at: float) -> Decision:
    record = _record(state, body.browser_id)
    if record.epoch != body.epoch or record.phase is not Phase.RECONNECTING:
        return state, ()  # it failed in some other way meanwhile
    models = {**dict.fromkeys(_everywhere(state), ModelPhase.LOADING), **record.models}
    record = replace(record, phase=Phase.READY, since=at, models=models)
    loads = _loads(record)
    state, stops = _repaired(_with(state, record), record, RecoveryLevel.MINIMAL, at, by=record)
    return state, (*loads, *stops)


def _failed(state: PoolState, body: BrowserFailed, at: float) -> Decision:
    record = _record(state, body.browser_id)
    if record.epoch != body.epoch or record.phase in (
        Phase.STOPPED,
        Phase.GIVEN_UP,
        Phase.REPLACING,
    ):
        return state, ()
    touchable = _lives_on(body.failure) and record.phase is Phase.READY
    ended = record if touchable else _without_models(_blamed(record, body.failure))
    ended = replace(ended, since=at, failure=body.failure)
    if record.phase is Phase.DRAINING and record.recycling and not state.closing:
        return state, ()  # the end of its drain starts it anew
    if state.closing or record.phase is Phase.DRAINING:
        stopped = replace(_without_models(ended), phase=Phase.STOPPED, repair=None)
        return _with(state, stopped), (Stop(record.id, record.epoch),)
    launching = body.failure.category is Category.LAUNCH_FAILURE
    ended = replace(ended, launches_failed=record.launches_failed + launching)
    if body.final and not record.served and record.kind not in state.missing:
        state = replace(state, missing=(*state.missing, record.kind))
    if record.stands_in_for:
        return _stand_in_failed(state, ended, at)
    if ended.repair is None:
        if at - record.since >= state.limit.period_seconds:  # it served well: back to full speed
            ended = replace(ended, adjusted=None)
        model_type = _model_type(state, body.failure)
        key = tally_key(body.failure.category, record.kind, model_type)
        todo = plan(
            state.level,
            state.strategy,
            body.failure,
            ended.circuit,
            state.tallies.get(key),
            start=body.start,
        )
        repair = Repair(record.id, record.epoch, body.failure, at, todo, model_type)
        ended = replace(ended, repair=repair)
    else:
        state, ended = _rung_failed(state, ended, _own_rung(ended), body.failure.message, at)
        if ended.repair is not None and ended.repair.trying:  # others of its step are at work
            waiting = replace(ended, phase=Phase.REPLACING)
            return _with(state, waiting), ()
    # What was installed when it served is installed: such an error passes (no memory, an upgrade).
    final = body.final and not ended.served
    hopeless = final or ended.launches_failed >= state.limit.launches_failed_max
    return _climb(state, ended, at, can_restart=not hopeless, touchable=touchable)


# -- repairs: climbing the steps of a plan --------------------------------------------------------


def _climb(
    state: PoolState, record: BrowserRecord, at: float, *, can_restart: bool, touchable: bool
) -> Decision:
    """Begin the next step of a repair that can be begun at all, or end the repair."""
    repair = record.repair
    assert repair is not None
    for index in range(repair.step + 1, len(repair.plan.steps)):
        repair = replace(repair, step=index, step_began=at, trying=())
        record = replace(record, repair=repair)
        state, record, orders = _begin(state, record, at, can_restart, touchable)
        if orders:
            return _with(state, record), orders
        assert record.repair is not None
        repair = _closed(record.repair, None, at, "it can't be done here")
    record = replace(record, repair=repair)
    # A level says what an operation survives. That the slot is filled again is housekeeping: a
    # pool of level none keeps its size, too.
    if state.level in (Level.NONE, Level.LOW) and can_restart:
        state, record, orders = _restart(state, record, at, record.adjusted)
        if orders:
            ended = replace(repair, outcome="filled again, not recovered")
            return _end_repair(_with(state, record), record, ended), orders
    return _give_up(state, record, at)


def _begin(
    state: PoolState, record: BrowserRecord, at: float, can_restart: bool, touchable: bool
) -> tuple[PoolState, BrowserRecord, tuple[Instruction, ...]]:
    """Order what the rungs of the current step do. No orders: none of them can be tried."""
    repair = record.repair
    assert repair is not None
    orders: tuple[Instruction, ...] = ()
    trying: tuple[RecoveryLevel, ...] = ()
    busy = False  # whether a rung of this step is at work on the browser itself
    record = replace(record, phase=Phase.REPLACING)
    for rung in repair.plan.steps[repair.step]:
        more: tuple[Instruction, ...] = ()
        match rung:
            case RecoveryLevel.MINIMAL if touchable:
                record = replace(record, phase=Phase.RECONNECTING)
                more = (Reconnect(record.id, record.epoch),)
            case RecoveryLevel.MODERATE if can_restart and busy:
                state, more = _stand_in(state, record, record.kind, at)
            case RecoveryLevel.MODERATE if can_restart:
                state, record, more = _restart(state, record, at, record.adjusted)
            case RecoveryLevel.AGGRESSIVE if can_restart and not busy and _adjustable(record):
                adjusted = Adjusted(repair.model_type, repair.failure.category)
                state, record, more = _restart(state, record, at, adjusted)
            case RecoveryLevel.FALLBACK if record.served:
                kinds = _substitutes(state, record)
                if kinds:
                    state, more = _stand_in(state, record, kinds[0], at)
            case _:
                pass
        if more:
            trying, orders = (*trying, rung), (*orders, *more)
        busy = record.phase is not Phase.REPLACING
    if record.phase is not Phase.RECONNECTING:
        record = _without_models(record)  # its page may live on, but nobody asks it any more
    assert record.repair is not None
    return state, replace(record, repair=replace(record.repair, trying=trying)), orders


def _adjustable(record: BrowserRecord) -> bool:
    """Whether there is anything to adjust; else the rung would only be the one before again."""
    repair = record.repair
    assert repair is not None
    return bool(adjust(record.kind, repair.model_type, repair.failure.category))


def _restart(
    state: PoolState, record: BrowserRecord, at: float, adjusted: Adjusted | None
) -> tuple[PoolState, BrowserRecord, tuple[Instruction, ...]]:
    verdict = record_restart(record.restarts, at, state.limit)
    if isinstance(verdict, GiveUp):
        return state, record, ()
    again = replace(
        _without_models(record),  # its page may have lived on until now
        phase=Phase.STARTING,
        epoch=record.epoch + 1,
        restarts=verdict.history,
        adjusted=adjusted,
    )
    # A browser that died in service starts again at once; one that can't start waits longer
    # each time.
    delay = verdict.delay if record.launches_failed else 0.0
    return state, again, (Launch(record.id, record.kind, again.epoch, delay, adjusted),)


def _stand_in(
    state: PoolState, record: BrowserRecord, kind: BrowserType, at: float
) -> tuple[PoolState, tuple[Instruction, ...]]:
    """Start another browser to take the place of `record`'s; it counts as a restart of that."""
    verdict = record_restart(record.restarts, at, state.limit)
    if isinstance(verdict, GiveUp):
        return state, ()
    state = _without_long_dead(state, at)
    number = state.stand_ins + 1
    while f"{kind}-r{number}" in state.browsers:  # a caller may have named a browser so
        number += 1
    state = replace(state, stand_ins=number)
    fresh = BrowserRecord(
        f"{kind}-r{number}",
        kind,
        0,
        Phase.STARTING,
        at,
        restarts=verdict.history,
        stands_in_for=record.id,
    )
    return _with(state, fresh), (Launch(fresh.id, kind, 0),)


def _without_long_dead(state: PoolState, at: float) -> PoolState:
    """Forget the oldest of the browsers that were replaced, or replaced others, and are gone."""
    dead = [
        record
        for record in state.browsers.values()
        if record.phase in (Phase.STOPPED, Phase.GIVEN_UP)
        and (record.replaced_by or _STAND_IN.search(record.id))
        and not record.stands_in_for
        and at - record.since >= state.limit.period_seconds  # nobody is about to speak of it
    ]
    oldest = sorted(dead, key=lambda record: record.since)[: max(len(dead) - DEAD_MAX, 0)]
    gone = {record.id for record in oldest}
    kept = {name: record for name, record in state.browsers.items() if name not in gone}
    return replace(state, browsers=kept)


_STAND_IN = re.compile(r"-r\d+\Z")


def _substitutes(state: PoolState, record: BrowserRecord) -> tuple[BrowserType, ...]:
    """The kinds to try instead, in the order that suits the models, those tried before left out."""
    assert record.repair is not None
    tried = {other.kind for other in state.browsers.values() if other.stands_in_for == record.id}
    available = set(BrowserType) - set(state.missing) - tried
    return fallback_order(record.repair.model_type, record.kind, available)


def _stand_in_failed(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    """A browser that was to replace another one did not start: try the next, or climb on."""
    stop = Stop(record.id, record.epoch)
    principal = state.browsers.get(record.stands_in_for)
    state = _with(state, replace(record, phase=Phase.STOPPED))
    if principal is None or principal.repair is None or principal.phase not in COMING:
        return state, (stop,)
    rung = _rung_at_work(principal, record)
    kinds = _substitutes(state, principal) if rung is RecoveryLevel.FALLBACK else ()
    if kinds:
        state, more = _stand_in(state, principal, kinds[0], at)
        return state, (stop, *more)
    why = record.failure.message if record.failure else ""
    state, principal = _rung_failed(state, principal, rung, why, at)
    assert principal.repair is not None
    if principal.repair.trying:
        return _with(state, principal), (stop,)
    hopeless = principal.launches_failed >= state.limit.launches_failed_max
    state, more = _climb(state, principal, at, can_restart=not hopeless, touchable=False)
    return state, (stop, *more)


def _rung_at_work(principal: BrowserRecord, browser: BrowserRecord) -> RecoveryLevel:
    """Which rung of the principal's step `browser` carries out."""
    if browser.id == principal.id:
        return _own_rung(principal)
    same = browser.kind is principal.kind
    return RecoveryLevel.MODERATE if same else RecoveryLevel.FALLBACK


def _own_rung(record: BrowserRecord) -> RecoveryLevel:
    """The rung that is being tried on the browser itself."""
    assert record.repair is not None
    if record.phase is Phase.RECONNECTING:
        return RecoveryLevel.MINIMAL
    own = [rung for rung in record.repair.trying if rung in _RESTARTS]
    return own[0] if own else RecoveryLevel.MODERATE


_RESTARTS = (RecoveryLevel.MODERATE, RecoveryLevel.AGGRESSIVE)


def _rung_failed(
    state: PoolState, record: BrowserRecord, rung: RecoveryLevel, why: str, at: float
) -> tuple[PoolState, BrowserRecord]:
    """Take a rung out of the step under way; with the last one the step is over."""
    repair = record.repair
    assert repair is not None
    state = _tallied(state, record, rung, worked=False)
    repair = replace(repair, trying=tuple(r for r in repair.trying if r is not rung))
    if not repair.trying:
        repair = _closed(repair, None, at, why)
    return state, replace(record, repair=repair)


def _closed(repair: Repair, worked: RecoveryLevel | None, at: float, note: str) -> Repair:
    rungs = repair.plan.steps[repair.step] if repair.step >= 0 else ()
    outcome = StepOutcome(rungs, repair.step_began, at, worked, note[:200])
    return replace(repair, steps=(*repair.steps, outcome), trying=())


def _repaired(
    state: PoolState, record: BrowserRecord, worked: RecoveryLevel, at: float, by: BrowserRecord
) -> Decision:
    """A step of `record`'s repair worked, on the browser `by`; whoever raced with it is stopped."""
    repair = record.repair
    if repair is None:
        return state, ()
    state = _tallied(state, record, worked, worked=True)
    stops: list[Instruction] = []
    outcome = "reconnected" if worked is RecoveryLevel.MINIMAL else "restarted"
    if by.id != record.id:
        outcome = f"replaced by {by.id}"
        record = replace(_without_models(record), phase=Phase.GIVEN_UP, since=at)
        record = replace(record, replaced_by=by.id)
        stops.append(Stop(record.id, record.epoch))
    ended = replace(_closed(repair, worked, at, ""), ready=at, outcome=outcome)
    state, losers = _without_stand_ins(_with(state, record), record, at)
    return _end_repair(state, record, ended), (*stops, *losers)


def _without_stand_ins(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    """Stop whatever is being started in place of `record`'s browser."""
    stops = []
    for other in state.browsers.values():
        if other.stands_in_for == record.id and other.phase in COMING:
            state = _with(state, replace(other, phase=Phase.STOPPED, since=at))
            stops.append(Stop(other.id, other.epoch))
    return state, tuple(stops)


def _give_up(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    given_up = replace(_without_models(record), phase=Phase.GIVEN_UP, since=at)
    state = _with(state, given_up)
    if record.repair is not None:
        state = _end_repair(state, given_up, replace(record.repair, outcome="given up"))
    return state, (Stop(record.id, record.epoch),)


def _end_repair(state: PoolState, record: BrowserRecord, repair: Repair) -> PoolState:
    repairs = (*state.repairs, replace(repair, trying=()))[-HISTORY_MAX:]
    for other in state.browsers.values():
        if other.stands_in_for == record.id and other.phase not in COMING:
            state = _with(state, replace(other, stands_in_for=""))
    return replace(_with(state, replace(record, repair=None)), repairs=repairs)


def _tallied(
    state: PoolState, record: BrowserRecord, rung: RecoveryLevel, *, worked: bool
) -> PoolState:
    repair = record.repair
    assert repair is not None
    key = tally_key(repair.failure.category, record.kind, repair.model_type)
    known = state.tallies.get(key, {})
    tally = known.get(rung, Tally())
    tally = Tally(tally.attempts + 1, tally.successes + worked)
    others = {k: v for k, v in state.tallies.items() if k != key}
    while len(others) >= TALLIES_MAX:
        del others[next(iter(others))]
    return replace(state, tallies={**others, key: {**known, rung: tally}})


def _lives_on(failure: Failure) -> bool:
    """Whether the browser goes on: only its page's connection, or one operation, was lost."""
    connection = failure.category is Category.CONNECTION_FAILURE
    return failure.scope is Scope.OPERATION or (connection and failure.scope is Scope.PAGE)


def _model_type(state: PoolState, failure: Failure) -> ModelType:
    """The type of the model that failed, or the one type that all models of the pool have."""
    model = str(failure.evidence.get("model", ""))
    if model in state.model_types:
        return state.model_types[model]
    types = set(state.model_types.values())
    return types.pop() if len(types) == 1 else ModelType.UNKNOWN


# -- leaving, and models --------------------------------------------------------------------------


def _unwanted(state: PoolState, browser_id: str, at: float) -> Decision:
    record = _record(state, browser_id)
    if record.phase is Phase.READY:
        draining = replace(record, phase=Phase.DRAINING, since=at)
        return _with(state, draining), (Drain(record.id, record.epoch),)
    if record.phase is Phase.DRAINING:
        return _with(state, replace(record, recycling=False)), ()
    if record.phase not in COMING:
        return state, ()
    if record.stands_in_for:
        return _stand_in_failed(state, replace(record, since=at), at)
    stopped = replace(_without_models(record), phase=Phase.STOPPED, since=at)
    state, losers = _without_stand_ins(_with(state, stopped), stopped, at)
    if record.repair is not None:
        state = _end_repair(state, stopped, replace(record.repair, outcome="stopped"))
    return state, (Stop(record.id, record.epoch), *losers)


def _recycled(state: PoolState, browser_id: str, epoch: int, at: float) -> Decision:
    record = _record(state, browser_id)
    if record.epoch != epoch or record.phase is not Phase.READY or state.closing:
        return state, ()
    draining = replace(record, phase=Phase.DRAINING, since=at, recycling=True)
    return _with(state, draining), (Drain(browser_id, epoch),)


def _stopped(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    gone = replace(_without_models(record), since=at, repair=None, recycling=False)
    if record.recycling and not state.closing:
        again = replace(gone, phase=Phase.STARTING, epoch=record.epoch + 1)
        order = Launch(again.id, again.kind, again.epoch, adjusted=again.adjusted)
        return _with(state, again), (order,)
    return _with(state, replace(gone, phase=Phase.STOPPED)), ()


def _model_wanted(state: PoolState, body: ModelWanted) -> Decision:
    model, loads = body.model, []
    for record in state.browsers.values():
        record = _without_model(record, model)  # of that name, another file perhaps
        if record.phase is Phase.READY and body.placing is None:
            loads.append(Load(record.id, record.epoch, model))
            record = replace(record, models={**record.models, model: ModelPhase.LOADING})
        state = _with(state, record)
    models = {**state.models, model: body.digest}
    types = {**state.model_types, model: body.type}
    placed, parked = _without(state.placed, model), _without(state.parked, model)
    if body.placing is not None:
        placed[model] = body.placing
    state = replace(state, models=models, model_types=types, parked=parked, placed=placed)
    return state, tuple(loads)


def _everywhere(state: PoolState) -> list[str]:
    return [model for model in state.models if model not in state.placed]


def _placed(state: PoolState) -> Decision:
    """Have models of which there are too few copies loaded by whoever should."""
    slots = [
        Slot(
            record.id,
            str(record.kind),
            record.phase is Phase.READY,
            {model for model, phase in record.models.items() if phase is not ModelPhase.FAILED},
            {model for model in state.placed if _hopeless(record, model)},
        )
        for record in state.browsers.values()
        if record.phase in (Phase.READY, *COMING) and not record.stands_in_for
    ]
    loads = []
    for browser_id, model in place(state.placed, slots):
        record = state.browsers[browser_id]
        record = replace(record, models={**record.models, model: ModelPhase.LOADING})
        state = _with(state, record)
        loads.append(Load(browser_id, record.epoch, model))
    return state, tuple(loads)


def _model_parked(state: PoolState, model: str) -> Decision:
    if model not in state.models:
        return state, ()
    parked = {**state.parked, model: state.models[model]}
    types = state.model_types
    state, unloads = _model_unwanted(state, model)
    return replace(state, parked=parked, model_types=types), unloads


def _model_unwanted(state: PoolState, model: str) -> Decision:
    unloads = []
    for record in state.browsers.values():
        if model in record.models:
            unloads.append(Unload(record.id, record.epoch, model))
        breakers = _without(record.breakers, model)  # as its worker forgets it
        state = _with(state, replace(_without_model(record, model), breakers=breakers))
    models, types = _without(state.models, model), _without(state.model_types, model)
    placed, parked = _without(state.placed, model), _without(state.parked, model)
    state = replace(state, models=models, model_types=types, parked=parked, placed=placed)
    return state, tuple(unloads)


def _model_loaded(state: PoolState, body: ModelLoaded) -> PoolState:
    record = _record(state, body.browser_id)
    if record.epoch != body.epoch or body.model not in record.models:
        return state
    record = replace(
        record,
        models={**record.models, body.model: ModelPhase.LOADED},
        numeric={**record.numeric, body.model: body.numeric},
        load_failures=_without(record.load_failures, body.model),
        loads_failed=_without(record.loads_failed, body.model),
    )
    return _with(state, record)


def _model_failed(state: PoolState, body: ModelFailed) -> Decision:
    record = _record(state, body.browser_id)
    if record.epoch != body.epoch or body.model not in record.models:
        return state, ()
    record = _counted_load(record, body.model, body.failure)
    record = replace(record, numeric=_without(record.numeric, body.model))
    if not _hopeless(record, body.model):
        again = Load(record.id, record.epoch, body.model, LOAD_AGAIN_SECONDS)
        return _with(state, record), (again,)
    models = {**record.models, body.model: ModelPhase.FAILED}
    return _with(state, replace(record, models=models)), ()


def _blamed(record: BrowserRecord, failure: Failure) -> BrowserRecord:
    """A browser that died while it loaded a model: that load counts as failed.

    Loads are carried out one at a time in their order, so the first that is not done is the one.
    """
    loading = [m for m, phase in record.models.items() if phase is ModelPhase.LOADING]
    return _counted_load(record, loading[0], failure) if loading else record


def _counted_load(record: BrowserRecord, model: str, failure: Failure) -> BrowserRecord:
    counts = {**record.loads_failed, model: record.loads_failed.get(model, 0) + 1}
    failures = {**record.load_failures, model: failure}
    return replace(record, loads_failed=counts, load_failures=failures)


def _hopeless(record: BrowserRecord, model: str) -> bool:
    return record.loads_failed.get(model, 0) >= LOAD_ATTEMPTS_MAX


def _loads(record: BrowserRecord) -> tuple[Instruction, ...]:
    return tuple(
        Load(record.id, record.epoch, model)
        for model, phase in record.models.items()
        if phase is ModelPhase.LOADING
    )


def _record(state: PoolState, browser_id: str) -> BrowserRecord:
    try:
        return state.browsers[browser_id]
    except KeyError:
        raise IllegalTransition(f"no browser {browser_id} was ever wanted") from None


def _with(state: PoolState, record: BrowserRecord) -> PoolState:
    return replace(state, browsers={**state.browsers, record.id: record})


def _without_models(record: BrowserRecord) -> BrowserRecord:
    """What a dead browser has; which models it could not load is remembered."""
    return replace(record, models={}, numeric={})


def _without_model(record: BrowserRecord, model: str) -> BrowserRecord:
    return replace(
        record,
        models=_without(record.models, model),
        numeric=_without(record.numeric, model),
        load_failures=_without(record.load_failures, model),
        loads_failed=_without(record.loads_failed, model),
    )


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}
