"""Repairs of a failed browser: climbing the steps of a plan.

A repair goes through its plan's steps until a rung of one works. A rung works on the browser itself
(reconnect, restart, restart adjusted) or starts another one to replace it, a stand-in. The failure
of the last step, or the limit on restarts, ends the repair. This module must not make the plan
(`recovery.plan` does) or decide which events begin and end a rung.
"""

from __future__ import annotations

import re

from recovery.adjustments import adjust, fallback_order
from recovery.control.instructions import Decision, Instruction, Launch, Reconnect, Stop
from recovery.control.records import (
    ALIVE,
    COMING,
    Adjusted,
    BrowserRecord,
    Phase,
    PoolState,
    Repair,
    StepOutcome,
    tally_key,
    with_record,
    without,
    without_models,
)
from recovery.failures import Category, Failure, Scope
from recovery.frozen import replace
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.plan import Tally
from recovery.supervision import GiveUp, record_restart

HISTORY_MAX = 64  # repairs remembered in the state; the log keeps all
DEAD_MAX = 32  # replaced browsers that ended long ago, kept for inspection
TALLIES_MAX = 256  # kinds of failure whose outcomes are remembered; the oldest goes


def climb(
    state: PoolState, record: BrowserRecord, at: float, *, can_restart: bool, page_alive: bool
) -> Decision:
    """Begin the next step of a repair that can be tried at all, or end the repair."""
    repair = record.repair
    assert repair is not None
    for index in range(repair.step + 1, len(repair.plan.steps)):
        repair = replace(repair, step=index, step_began=at, trying=())
        record = replace(record, repair=repair)
        state, record, orders = _begin(state, record, at, can_restart, page_alive)
        if orders:
            return with_record(state, record), orders
        assert record.repair is not None
        repair = _end_step(
            record.repair, None, at, "no rung of this step can be tried on this browser"
        )
    record = replace(record, repair=repair)
    # The level is about operations. Refilling the slot is housekeeping: a pool of level none keeps
    # its size, too.
    if state.level in (Level.NONE, Level.LOW) and can_restart:
        state, record, orders = _restart(state, record, at, record.adjusted)
        if orders:
            ended = replace(repair, outcome="slot refilled, operation not recovered")
            return end_repair(with_record(state, record), record, ended), orders
    return _give_up(state, record, at)


def _begin(
    state: PoolState, record: BrowserRecord, at: float, can_restart: bool, page_alive: bool
) -> tuple[PoolState, BrowserRecord, tuple[Instruction, ...]]:
    """Give the orders of the current step's rungs. No orders: none of them can be tried."""
    repair = record.repair
    assert repair is not None
    orders: tuple[Instruction, ...] = ()
    trying: tuple[RecoveryLevel, ...] = ()
    busy = False  # whether a rung of this step is being tried on the browser itself
    record = replace(record, phase=Phase.REPLACING)
    for rung in repair.plan.steps[repair.step]:
        more: tuple[Instruction, ...] = ()
        match rung:
            case RecoveryLevel.MINIMAL if page_alive:
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
        record = without_models(record)  # its page may be alive, but gets no more requests
    assert record.repair is not None
    return state, replace(record, repair=replace(record.repair, trying=trying)), orders


def _adjustable(record: BrowserRecord) -> bool:
    """Whether there is anything to adjust; else the rung would equal a plain restart."""
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
        without_models(record),  # its page may have been alive until now
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
    """Start another browser to replace `record`'s; it counts as a restart of the slot."""
    verdict = record_restart(record.restarts, at, state.limit)
    if isinstance(verdict, GiveUp):
        return state, ()
    state = _without_long_dead(state, at)
    number = state.stand_ins + 1
    while f"{kind}-r{number}" in state.browsers:  # a caller may have used the name
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
    """Forget the oldest ended browsers that were replaced or have replaced others."""
    dead = [
        record
        for record in state.browsers.values()
        if record.phase not in ALIVE
        and (record.replaced_by or _STAND_IN.search(record.id))
        and not record.stands_in_for
        and at - record.since >= state.limit.period_seconds  # no late event will name it
    ]
    oldest = sorted(dead, key=lambda record: record.since)[: max(len(dead) - DEAD_MAX, 0)]
    forgotten = {record.id for record in oldest}
    kept = {name: record for name, record in state.browsers.items() if name not in forgotten}
    return replace(state, browsers=kept)


_STAND_IN = re.compile(r"-r\d+\Z")


def _substitutes(state: PoolState, record: BrowserRecord) -> tuple[BrowserType, ...]:
    """The kinds to try instead that were not tried yet, in the order that suits the model type."""
    assert record.repair is not None
    tried = {other.kind for other in state.browsers.values() if other.stands_in_for == record.id}
    available = set(BrowserType) - set(state.missing) - tried
    return fallback_order(record.repair.model_type, record.kind, available)


def stand_in_failed(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    """A stand-in did not start: try the next kind, or climb to the next step."""
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
    state, more = climb(state, principal, at, can_restart=not ineffective, page_alive=False)
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
    """Remove a rung from the step under way; without rungs the step ends."""
    repair = record.repair
    assert repair is not None
    state = _count_attempt(state, record, rung, worked=False)
    repair = replace(repair, trying=tuple(r for r in repair.trying if r is not rung))
    if not repair.trying:
        repair = _end_step(repair, None, at, why)
    return state, replace(record, repair=repair)


def _end_step(repair: Repair, worked: RecoveryLevel | None, at: float, note: str) -> Repair:
    rungs = repair.plan.steps[repair.step] if repair.step >= 0 else ()
    outcome = StepOutcome(rungs, repair.step_began, at, worked, note[:200])
    return replace(repair, steps=(*repair.steps, outcome), trying=())


def repair_worked(
    state: PoolState, record: BrowserRecord, worked: RecoveryLevel, at: float, by: BrowserRecord
) -> Decision:
    """A step of `record`'s repair worked, on the browser `by`; stop those that raced with it."""
    repair = record.repair
    if repair is None:
        return state, ()
    state = _count_attempt(state, record, worked, worked=True)
    stops: list[Instruction] = []
    outcome = "reconnected" if worked is RecoveryLevel.MINIMAL else "restarted"
    if by.id != record.id:
        outcome = f"replaced by {by.id}"
        gone = without_models(record)
        record = replace(gone, phase=Phase.GIVEN_UP, since=at, replaced_by=by.id)
        stops.append(Stop(record.id, record.epoch))
    ended = replace(_end_step(repair, worked, at, ""), ready=at, outcome=outcome)
    state, losers = without_stand_ins(with_record(state, record), record, at)
    return end_repair(state, record, ended), (*stops, *losers)


def without_stand_ins(state: PoolState, record: BrowserRecord, at: float) -> Decision:
    """Stop the stand-ins that are being started for `record`'s browser."""
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


def _count_attempt(
    state: PoolState, record: BrowserRecord, rung: RecoveryLevel, *, worked: bool
) -> PoolState:
    repair = record.repair
    assert repair is not None
    key = tally_key(repair.failure.category, record.kind, repair.model_type)
    known = state.tallies.get(key, {})
    tally = known.get(rung, Tally())
    tally = Tally(tally.attempts + 1, tally.successes + worked)
    others = without(state.tallies, key)
    while len(others) >= TALLIES_MAX:
        del others[next(iter(others))]
    return replace(state, tallies={**others, key: {**known, rung: tally}})


def browser_survives(failure: Failure) -> bool:
    """Whether the browser is alive: only its page's connection, or one operation, was lost."""
    connection = failure.category is Category.CONNECTION_FAILURE
    return failure.scope is Scope.OPERATION or (connection and failure.scope is Scope.PAGE)


def model_type_of(state: PoolState, record: BrowserRecord, failure: Failure) -> ModelType:
    """The type of the model that a browser failed with.

    That is the model which it was running or loading, if its worker reported that; else the one
    type that all models on the browser have, or all models of the pool.
    """
    model = str(failure.evidence.get("model", ""))
    if model in state.model_types:
        return state.model_types[model]
    on_browser = {state.model_types[name] for name in record.models if name in state.model_types}
    types = on_browser or set(state.model_types.values())
    return types.pop() if len(types) == 1 else ModelType.UNKNOWN
