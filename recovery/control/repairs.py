"""What is tried about a browser that failed: climbing the steps of a plan.

A repair goes through its plan's steps until a rung of one works. A rung works on the browser itself
(reconnect, restart, restart adjusted) or starts another one to take its place, a stand-in. The last
step that fails, or a limit on restarts, ends the repair. This module must not make the plan
(`recovery.plan` does) or say which events begin and end a rung.
"""

from __future__ import annotations

import re

from recovery.adjustments import adjust, fallback_order
from recovery.control.instructions import Decision, Instruction, Launch, Reconnect, Stop
from recovery.control.records import (
    COMING,
    Adjusted,
    BrowserRecord,
    Phase,
    PoolState,
    Repair,
    StepOutcome,
    tally_key,
    with_record,
    without_models,
)
from recovery.failures import Category, Failure, Scope
from recovery.frozen import replace
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.plan import Tally
from recovery.supervision import GiveUp, record_restart

HISTORY_MAX = 64  # repairs remembered in the state; the log keeps all
DEAD_MAX = 32  # browsers that were replaced and are long gone, kept for people to look at
TALLIES_MAX = 256  # kinds of failure whose outcomes are remembered; the oldest goes


def climb(
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
            return with_record(state, record), orders
        assert record.repair is not None
        repair = _closed(record.repair, None, at, "it can't be done here")
    record = replace(record, repair=repair)
    # A level says what an operation survives. That the slot is filled again is housekeeping: a
    # pool of level none keeps its size, too.
    if state.level in (Level.NONE, Level.LOW) and can_restart:
        state, record, orders = _restart(state, record, at, record.adjusted)
        if orders:
            ended = replace(repair, outcome="filled again, not recovered")
            return end_repair(with_record(state, record), record, ended), orders
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
        record = without_models(record)  # its page may live on, but nobody asks it any more
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
        without_models(record),  # its page may have lived on until now
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
    return with_record(state, fresh), (Launch(fresh.id, kind, 0),)


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


def stand_in_failed(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    """A browser that was to replace another one did not start: try the next, or climb on."""
    stop = Stop(record.id, record.epoch)
    principal = state.browsers.get(record.stands_in_for)
    state = with_record(state, replace(record, phase=Phase.STOPPED))
    if principal is None or principal.repair is None or principal.phase not in COMING:
        return state, (stop,)
    rung = rung_at_work(principal, record)
    kinds = _substitutes(state, principal) if rung is RecoveryLevel.FALLBACK else ()
    if kinds:
        state, more = _stand_in(state, principal, kinds[0], at)
        return state, (stop, *more)
    why = record.failure.message if record.failure else ""
    state, principal = rung_failed(state, principal, rung, why, at)
    assert principal.repair is not None
    if principal.repair.trying:
        return with_record(state, principal), (stop,)
    ineffective = principal.launches_failed >= state.limit.launches_failed_max
    state, more = climb(state, principal, at, can_restart=not ineffective, touchable=False)
    return state, (stop, *more)


def rung_at_work(principal: BrowserRecord, browser: BrowserRecord) -> RecoveryLevel:
    """Which rung of the principal's step `browser` carries out."""
    if browser.id == principal.id:
        return own_rung(principal)
    same = browser.kind is principal.kind
    return RecoveryLevel.MODERATE if same else RecoveryLevel.FALLBACK


def own_rung(record: BrowserRecord) -> RecoveryLevel:
    """The rung that is being tried on the browser itself."""
    assert record.repair is not None
    if record.phase is Phase.RECONNECTING:
        return RecoveryLevel.MINIMAL
    own = [rung for rung in record.repair.trying if rung in _RESTARTS]
    return own[0] if own else RecoveryLevel.MODERATE


_RESTARTS = (RecoveryLevel.MODERATE, RecoveryLevel.AGGRESSIVE)


def rung_failed(
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


def repair_worked(
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
        record = replace(without_models(record), phase=Phase.GIVEN_UP, since=at)
        record = replace(record, replaced_by=by.id)
        stops.append(Stop(record.id, record.epoch))
    ended = replace(_closed(repair, worked, at, ""), ready=at, outcome=outcome)
    state, losers = without_stand_ins(with_record(state, record), record, at)
    return end_repair(state, record, ended), (*stops, *losers)


def without_stand_ins(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    """Stop whatever is being started in place of `record`'s browser."""
    stops = []
    for other in state.browsers.values():
        if other.stands_in_for == record.id and other.phase in COMING:
            state = with_record(state, replace(other, phase=Phase.STOPPED, since=at))
            stops.append(Stop(other.id, other.epoch))
    return state, tuple(stops)


def _give_up(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    given_up = replace(without_models(record), phase=Phase.GIVEN_UP, since=at)
    state = with_record(state, given_up)
    if record.repair is not None:
        state = end_repair(state, given_up, replace(record.repair, outcome="given up"))
    return state, (Stop(record.id, record.epoch),)


def end_repair(state: PoolState, record: BrowserRecord, repair: Repair) -> PoolState:
    repairs = (*state.repairs, replace(repair, trying=()))[-HISTORY_MAX:]
    for other in state.browsers.values():
        if other.stands_in_for == record.id and other.phase not in COMING:
            state = with_record(state, replace(other, stands_in_for=""))
    return replace(with_record(state, replace(record, repair=None)), repairs=repairs)


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


def lives_on(failure: Failure) -> bool:
    """Whether the browser goes on: only its page's connection, or one operation, was lost."""
    connection = failure.category is Category.CONNECTION_FAILURE
    return failure.scope is Scope.OPERATION or (connection and failure.scope is Scope.PAGE)


def model_type_of(state: PoolState, record: BrowserRecord, failure: Failure) -> ModelType:
    """The type of the model that a browser failed with.

    That is the model which it was running or loading, where its worker could say; else the one
    type that all models on the browser have, or all of the pool.
    """
    model = str(failure.evidence.get("model", ""))
    if model in state.model_types:
        return state.model_types[model]
    here = {state.model_types[name] for name in record.models if name in state.model_types}
    types = here or set(state.model_types.values())
    return types.pop() if len(types) == 1 else ModelType.UNKNOWN
