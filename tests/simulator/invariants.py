"""What must always hold of the pool's state, in words where it does not.

Pure. This module must not know of the living, only of what the state says.
"""

from __future__ import annotations

from recovery.adjustments import adjust
from recovery.control import (
    ALIVE,
    COMING,
    HISTORY_MAX,
    TALLIES_MAX,
    BrowserRecord,
    ModelPhase,
    Phase,
    PoolState,
)
from recovery.kinds import Level, RecoveryLevel

SETTLE_SECONDS = 240.0  # from the last fault on, until all is in order again


def why_given_up(state: PoolState, record: BrowserRecord, at: float) -> str:
    """What allows that a browser was given up; empty if nothing does."""
    limit = state.limit
    if record.replaced_by:
        return f"replaced by {record.replaced_by}"
    if record.launches_failed >= limit.launches_failed_max:
        return f"{record.launches_failed} launches in a row failed"
    recent = [moment for moment in record.restarts if abs(at - moment) < limit.period_seconds]
    if len(recent) >= limit.restarts_max:
        return f"{len(recent)} restarts within {limit.period_seconds:g} s"
    repair = next((r for r in reversed(state.repairs) if r.browser_id == record.id), None)
    if repair is None or state.level in (Level.NONE, Level.LOW):
        return ""  # these fill a slot again, whatever the plan was
    every = len(repair.steps) == len(repair.plan.steps) and not any(s.worked for s in repair.steps)
    adjustable = bool(adjust(record.kind, repair.model_type, repair.failure.category))
    restarts = [
        rung
        for step in repair.plan.steps
        for rung in step
        if rung is RecoveryLevel.MODERATE or (rung is RecoveryLevel.AGGRESSIVE and adjustable)
    ]
    tried = state.strategy.race or record.epoch - repair.from_epoch >= len(restarts)
    return f"nothing in {repair.plan.steps} worked" if every and tried else ""


def broken(before: PoolState, state: PoolState, at: float) -> str:
    """What does not hold of the state after an event, in words; empty if all is well."""
    for record in state.browsers.values():
        fault = _broken(before.browsers.get(record.id), state, record, at)
        if fault:
            return f"{record.id}: {fault}: {record}"
    for name in before.browsers.keys() - state.browsers.keys():
        gone = before.browsers[name]
        if gone.phase in ALIVE or at - gone.since < state.limit.period_seconds:
            return f"the record of {name} is gone: {gone}"
    if len(state.repairs) > HISTORY_MAX or len(state.tallies) > TALLIES_MAX:
        return "the histories have no bound"
    return ""


def _broken(
    before: BrowserRecord | None, state: PoolState, record: BrowserRecord, at: float
) -> str:
    phase, repair = record.phase, record.repair
    stand_ins = [
        other
        for other in state.browsers.values()
        if other.stands_in_for == record.id and other.phase in COMING
    ]
    principal = state.browsers.get(record.stands_in_for)
    if before is not None and record.epoch < before.epoch:
        return f"epoch {record.epoch} after {before.epoch}"
    if phase is Phase.READY and (record.models.keys() ^ state.models.keys()) - state.placed.keys():
        return f"it has {sorted(record.models)}, and {sorted(state.models)} are wanted"
    if phase in (Phase.STARTING, Phase.REPLACING, Phase.STOPPED, Phase.GIVEN_UP) and record.models:
        return f"it has models while {phase}"
    if record.numeric.keys() - record.models.keys():
        return "it is said to have what it has not"
    if repair is not None and (phase not in COMING or not repair.trying):
        return "a repair is under way, and nothing is being tried"
    if phase in (Phase.RECONNECTING, Phase.REPLACING) and repair is None:
        return f"it is {phase} without a repair"
    if phase is Phase.REPLACING and not stand_ins:
        return "nobody is being started in its place"
    if stand_ins and (repair is None or phase not in COMING):
        return "another browser is being started in place of one that needs none"
    if phase in COMING and record.stands_in_for and (principal is None or principal.repair is None):
        return f"it stands in for {record.stands_in_for}, which is not being repaired"
    if phase is Phase.GIVEN_UP and not why_given_up(state, record, record.since):
        return "it was given up too early"
    if len(record.restarts) > state.limit.restarts_max:
        return "more restarts than the limit allows"
    if repair is not None and at - repair.began > SETTLE_SECONDS:
        return "its repair does not end"
    return ""


def any_left(state: PoolState) -> bool:
    """Whether any browser is left that has the model or may yet load it."""
    return any(
        record.phase in (Phase.READY, *COMING) and record.models.get("m") is not ModelPhase.FAILED
        for record in state.browsers.values()
    )
