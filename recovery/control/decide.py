"""The pool's transition function: one case for each event.

`decide(state, event)` returns the next state and the instructions that follow; `apply` is
`decide` without the instructions, which is how a log is replayed. Time arrives inside the event.
An event that the state does not allow raises and changes nothing. The cases for models are in
`recovery.control.models`, repairs of failed browsers in `recovery.control.repairs`. This module
must not carry out anything.
"""

from __future__ import annotations

from recovery.control.events import (
    BreakersMoved,
    BrowserFailed,
    BrowserFound,
    BrowserReady,
    BrowserReconnected,
    BrowserRecycled,
    BrowserStopped,
    BrowserUnwanted,
    BrowserWanted,
    Event,
    ModelFailed,
    ModelLoaded,
    ModelParked,
    ModelUnwanted,
    ModelWanted,
    PoolClosing,
    PoolOpened,
    TermBegan,
)
from recovery.control.instructions import Decision, Drain, Launch, Stop
from recovery.control.models import (
    load_given_up,
    loaded_everywhere,
    loads_of,
    model_failed,
    model_loaded,
    model_parked,
    model_unwanted,
    model_wanted,
    placed,
    with_interrupted_load,
)
from recovery.control.records import (
    ALIVE,
    COMING,
    BrowserRecord,
    ModelPhase,
    Phase,
    PoolState,
    Repair,
    record_of,
    tally_key,
    with_record,
    without_models,
)
from recovery.control.repairs import (
    browser_survives,
    climb,
    end_repair,
    model_type_of,
    own_rung,
    repair_worked,
    rung_at_work,
    rung_failed,
    stand_in_failed,
    without_stand_ins,
)
from recovery.errors import IllegalTransition
from recovery.failures import Category
from recovery.frozen import replace
from recovery.kinds import BrowserType, RecoveryLevel
from recovery.plan import plan

_OVER = (Phase.STOPPED, Phase.GIVEN_UP, Phase.REPLACING)  # no word of that browser counts any more


def apply(state: PoolState, event: Event) -> PoolState:
    """The state after `event`. Replaying a log is `reduce(apply, events, checkpoint)`."""
    return decide(state, event)[0]


def decide(state: PoolState, event: Event) -> Decision:
    """The state after `event`, and the instructions. Raises `IllegalTransition`.

    An event of an incarnation that has been replaced is late, not illegal, and is ignored.
    """
    state, orders = _decide(state, event)
    if not state.placed or state.closing:
        return state, orders
    state, loads = placed(state)
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
            record = record_of(state, browser_id)
            return with_record(state, replace(record, epoch=max(record.epoch, epoch))), ()
        case BrowserWanted(browser_id, kind):
            return _wanted(state, browser_id, kind, event.at)
        case BrowserReady() as body:
            return _ready(state, body, event.at)
        case BrowserReconnected() as body:
            return _reconnected(state, body, event.at)
        case BreakersMoved(browser_id, breakers):
            record = record_of(state, browser_id)
            return with_record(state, replace(record, breakers={**record.breakers, **breakers})), ()
        case BrowserFailed() as body:
            return _failed(state, body, event.at)
        case BrowserUnwanted(browser_id):
            return _unwanted(state, browser_id, event.at)
        case BrowserRecycled(browser_id, epoch):
            return _recycled(state, browser_id, epoch, event.at)
        case BrowserStopped(browser_id):
            return _stopped(state, record_of(state, browser_id), event.at)
        case ModelWanted() as body:
            return model_wanted(state, body)
        case ModelUnwanted(model):
            return model_unwanted(state, model)
        case ModelParked(model):
            return model_parked(state, model)
        case ModelLoaded() as body:
            return model_loaded(state, body), ()
        case ModelFailed() as body:
            return model_failed(state, body)
        case PoolClosing():
            stops = tuple(Stop(r.id, r.epoch) for r in state.browsers.values() if r.phase in ALIVE)
            return replace(state, closing=True), stops


def _wanted(state: PoolState, browser_id: str, kind: BrowserType, at: float) -> Decision:
    known = state.browsers.get(browser_id)
    if state.closing or (known is not None and known.phase in ALIVE):
        raise IllegalTransition(
            f"browser {browser_id} can't be started now: it is running, or the pool is closing",
            state=str(known),
        )
    epoch = known.epoch + 1 if known else 0
    record = BrowserRecord(browser_id, kind, epoch, Phase.STARTING, at)
    return with_record(state, record), (Launch(browser_id, kind, epoch),)


def _ready(state: PoolState, body: BrowserReady, at: float) -> Decision:
    record = record_of(state, body.browser_id)
    if record.epoch != body.epoch or record.phase in _OVER:
        return state, ()
    if record.phase is not Phase.STARTING:
        raise IllegalTransition(
            f"browser {record.id} reported ready while {record.phase}, expected starting",
            epoch=body.epoch,
        )
    record = replace(
        record,
        phase=Phase.READY,
        since=at,
        facts=body.facts,
        launches_failed=0,
        served=True,
        models={
            model: ModelPhase.FAILED if load_given_up(record, model) else ModelPhase.LOADING
            for model in loaded_everywhere(state)
        },
    )
    state = with_record(state, record)
    loads = loads_of(record)
    repaired = record
    if record.stands_in_for:
        repaired = record_of(state, record.stands_in_for)
        state = with_record(state, replace(record, stands_in_for=""))
    if repaired.repair is None:
        return state, loads
    worked = rung_at_work(repaired, record)
    state, stops = repair_worked(state, repaired, worked, at, by=record)
    return state, (*loads, *stops)


def _reconnected(state: PoolState, body: BrowserReconnected, at: float) -> Decision:
    record = record_of(state, body.browser_id)
    if record.epoch != body.epoch or record.phase is not Phase.RECONNECTING:
        return state, ()  # it has failed in another way since
    models = {**dict.fromkeys(loaded_everywhere(state), ModelPhase.LOADING), **record.models}
    record = replace(record, phase=Phase.READY, since=at, models=models)
    loads = loads_of(record)
    state, stops = repair_worked(
        with_record(state, record), record, RecoveryLevel.MINIMAL, at, by=record
    )
    return state, (*loads, *stops)


def _failed(state: PoolState, body: BrowserFailed, at: float) -> Decision:
    record = record_of(state, body.browser_id)
    if record.epoch != body.epoch or record.phase in _OVER:
        return state, ()
    page_alive = browser_survives(body.failure) and record.phase is Phase.READY
    ended = record if page_alive else without_models(with_interrupted_load(record, body.failure))
    ended = replace(ended, since=at, failure=body.failure)
    if record.phase is Phase.DRAINING and record.recycling and not state.closing:
        return state, ()  # it is restarted when its drain ends
    if state.closing or record.phase is Phase.DRAINING:
        stopped = replace(without_models(ended), phase=Phase.STOPPED, repair=None)
        return with_record(state, stopped), (Stop(record.id, record.epoch),)
    launching = body.failure.category is Category.LAUNCH_FAILURE
    ended = replace(ended, launches_failed=record.launches_failed + launching)
    if body.final and not record.served and record.kind not in state.missing:
        state = replace(state, missing=(*state.missing, record.kind))
    if record.stands_in_for:
        return stand_in_failed(state, ended, at)
    if ended.repair is None:
        if (
            at - record.since >= state.limit.period_seconds
        ):  # long without failure: drop the adjustment
            ended = replace(ended, adjusted=None)
        model_type = model_type_of(state, record, body.failure)
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
        state, ended = rung_failed(state, ended, own_rung(ended), body.failure.message, at)
        if (
            ended.repair is not None and ended.repair.trying
        ):  # other rungs of its step are still being tried
            waiting = replace(ended, phase=Phase.REPLACING)
            return with_record(state, waiting), ()
    # A browser that has served is installed, so this error may pass (no memory, an upgrade).
    final = body.final and not ended.served
    ineffective = final or ended.launches_failed >= state.limit.launches_failed_max
    return climb(state, ended, at, can_restart=not ineffective, page_alive=page_alive)


def _unwanted(state: PoolState, browser_id: str, at: float) -> Decision:
    record = record_of(state, browser_id)
    if record.phase is Phase.READY:
        draining = replace(record, phase=Phase.DRAINING, since=at)
        return with_record(state, draining), (Drain(record.id, record.epoch),)
    if record.phase is Phase.DRAINING:
        return with_record(state, replace(record, recycling=False)), ()
    if record.phase not in COMING:
        return state, ()
    if record.stands_in_for:
        return stand_in_failed(state, replace(record, since=at), at)
    stopped = replace(without_models(record), phase=Phase.STOPPED, since=at)
    state, losers = without_stand_ins(with_record(state, stopped), stopped, at)
    if record.repair is not None:
        state = end_repair(state, stopped, replace(record.repair, outcome="stopped"))
    return state, (Stop(record.id, record.epoch), *losers)


def _recycled(state: PoolState, browser_id: str, epoch: int, at: float) -> Decision:
    record = record_of(state, browser_id)
    if record.epoch != epoch or record.phase is not Phase.READY or state.closing:
        return state, ()
    draining = replace(record, phase=Phase.DRAINING, since=at, recycling=True)
    return with_record(state, draining), (Drain(browser_id, epoch),)


def _stopped(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    stopped = replace(without_models(record), since=at, repair=None, recycling=False)
    if record.recycling and not state.closing:
        again = replace(stopped, phase=Phase.STARTING, epoch=record.epoch + 1)
        order = Launch(again.id, again.kind, again.epoch, adjusted=again.adjusted)
        return with_record(state, again), (order,)
    return with_record(state, replace(stopped, phase=Phase.STOPPED)), ()
