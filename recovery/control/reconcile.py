"""What a new supervisor does about the difference between its log and the living.

Pure: `reconcile(state, seen)` compares what the log wants with what workers report of themselves.
The old supervisor may have died at any point: an event may be logged and its order never sent, or
carried out and its outcome never logged. So an outcome that is seen becomes an event, and an order
that may not have arrived is given again; every order can be given twice. This module must not ask
anybody or carry anything out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recovery.breaker import CircuitState, Snapshot
from recovery.control.events import (
    Body,
    BreakersMoved,
    BrowserFailed,
    BrowserFound,
    BrowserReady,
    BrowserStopped,
    ModelLoaded,
)
from recovery.control.instructions import Drain, Instruction, Launch, Load, Reconnect, Stop, Unload
from recovery.control.records import ALIVE, BrowserRecord, ModelPhase, Phase, PoolState
from recovery.failures import Failure, categorize_browser_failure
from recovery.kinds import Readiness
from recovery.records import BrowserFacts, HostRef, NumericId


@dataclass(frozen=True)
class Seen:
    """What a worker said of itself. `facts` while ready; `cause` when its browser is over, or out
    of touch.

    `digests` and `numeric` are of the loaded models.
    """

    epoch: int
    readiness: Readiness
    facts: BrowserFacts | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    numeric: Mapping[str, NumericId] = field(default_factory=dict)
    cause: Failure | None = None
    breakers: Mapping[str, Snapshot] = field(default_factory=dict)


@dataclass(frozen=True)
class Reconciliation:
    """`events` first, as news; then the orders of old decisions that may not have arrived."""

    events: tuple[Body, ...] = ()
    orders: tuple[Instruction, ...] = ()

    def __add__(self, other: Reconciliation) -> Reconciliation:
        return Reconciliation(self.events + other.events, self.orders + other.orders)


def reconcile(state: PoolState, seen: Mapping[str, Seen], at: float) -> Reconciliation:
    """What to report and to order, so that the living are as `state` wants them.

    `seen` holds the workers that answered, by browser. `at` is wall time, for the failures of
    those that did not.
    """
    found = Reconciliation()
    for record in state.browsers.values():
        if record.phase not in ALIVE or state.closing:
            stop = Stop(record.id, record.epoch)
            gone = record.id not in seen and record.phase not in ALIVE
            found += Reconciliation(orders=() if gone else (stop,))
        else:
            found += _of_one(state, record, seen.get(record.id), at)
    return found


def _of_one(
    state: PoolState, record: BrowserRecord, seen: Seen | None, at: float
) -> Reconciliation:
    browser_id, epoch = record.id, record.epoch
    again = Launch(browser_id, record.kind, epoch, adjusted=record.adjusted)
    if record.phase is Phase.REPLACING:
        return Reconciliation()  # its stand-in is the one that counts
    if seen is None:
        if record.phase is Phase.STARTING:
            return Reconciliation(orders=(again,))
        if record.phase is Phase.DRAINING:
            return Reconciliation(events=(BrowserStopped(browser_id),))
        gone = _failure("its worker is gone", "worker_exited", record, at)
        return Reconciliation(events=(BrowserFailed(browser_id, epoch, gone),))
    moved = _moved(record, seen)
    if seen.epoch > epoch:  # the log has lost events
        lost = _failure("the log knows nothing of this incarnation", "log_lost", record, at)
        lost_at = BrowserFailed(browser_id, seen.epoch, lost)
        return moved + Reconciliation(events=(BrowserFound(browser_id, seen.epoch), lost_at))
    if record.phase is Phase.DRAINING:
        return moved + Reconciliation(orders=(Drain(browser_id, epoch),))
    unheard = seen.epoch < epoch or seen.readiness is Readiness.STARTING
    # Dead without a cause: its launch had not begun, or was cut short with the supervisor.
    cut_short = seen.readiness is Readiness.DEAD and seen.cause is None
    if record.phase is Phase.STARTING and (unheard or cut_short):
        return moved + Reconciliation(orders=(again,))
    if seen.epoch < epoch or seen.readiness is not Readiness.READY:
        cause = seen.cause or _failure("its browser is over", "browser_exited", record, at)
        return moved + Reconciliation(events=(BrowserFailed(browser_id, epoch, cause),))
    if record.phase is Phase.STARTING and seen.facts is not None:
        return moved + Reconciliation(events=(BrowserReady(browser_id, epoch, seen.facts),))
    if record.phase is Phase.RECONNECTING:
        return moved + Reconciliation(orders=(Reconnect(browser_id, epoch),))
    if seen.cause is not None:
        return moved + Reconciliation(events=(BrowserFailed(browser_id, epoch, seen.cause),))
    return moved + _models(state, record, seen)


def _models(state: PoolState, record: BrowserRecord, seen: Seen) -> Reconciliation:
    """Of a browser that is ready: models that have arrived, are missing, or are too many."""
    events: list[Body] = []
    orders: list[Instruction] = []
    for model, phase in record.models.items():
        has = seen.digests.get(model) == state.models[model]
        if not has:
            orders.append(Load(record.id, record.epoch, model))
        elif phase is not ModelPhase.LOADED:
            events.append(ModelLoaded(record.id, record.epoch, model, seen.numeric[model]))
    for model in seen.digests.keys() - record.models.keys():
        orders.append(Unload(record.id, record.epoch, model))
    return Reconciliation(tuple(events), tuple(orders))


def _moved(record: BrowserRecord, seen: Seen) -> Reconciliation:
    changed = {
        model: snapshot
        for model, snapshot in seen.breakers.items()
        if snapshot.breaker.state is not _known_state(record, model)
    }
    return Reconciliation(events=(BreakersMoved(record.id, changed),) if changed else ())


def _known_state(record: BrowserRecord, model: str) -> CircuitState:
    known = record.breakers.get(model)
    return known.breaker.state if known else CircuitState.CLOSED


def _failure(message: str, what: str, record: BrowserRecord, at: float) -> Failure:
    ref = HostRef(record.id, record.epoch)
    context = {"what": what, "ref": ref, "at": at, "browser": str(record.kind)}
    return categorize_browser_failure(message, context)
