"""How a new supervisor resolves differences between its log and the workers' actual state.

Pure: `reconcile(state, seen)` compares the state of the log with what workers report. The old
supervisor may have died at any point: after it logged an event but before it sent the order, or
after the order was carried out but before its outcome was logged. So an outcome that is observed
becomes an event, and an order that may not have arrived is sent again; all orders are idempotent.
This module must not query a worker or carry out anything.
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
    """What a worker reported. `facts` while ready; `cause` when its browser has ended or is
    disconnected.

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
    """`events` come first; then the orders of old decisions that may not have arrived."""

    events: tuple[Body, ...] = ()
    orders: tuple[Instruction, ...] = ()

    def __add__(self, other: Reconciliation) -> Reconciliation:
        return Reconciliation(self.events + other.events, self.orders + other.orders)


def reconcile(state: PoolState, seen: Mapping[str, Seen], at: float) -> Reconciliation:
    """The events and orders that bring the browsers to `state`.

    `seen` holds the workers that answered, by browser id. `at` is wall time in seconds, for the
    failures of those that did not.
    """
    found = Reconciliation()
    for record in state.browsers.values():
        if record.phase not in ALIVE or state.closing:
            stop = Stop(record.id, record.epoch)
            stopped = record.id not in seen and record.phase not in ALIVE
            found += Reconciliation(orders=() if stopped else (stop,))
        else:
            found += _reconcile_browser(state, record, seen.get(record.id), at)
    return found


def _reconcile_browser(
    state: PoolState, record: BrowserRecord, seen: Seen | None, at: float
) -> Reconciliation:
    browser_id, epoch = record.id, record.epoch
    again = Launch(browser_id, record.kind, epoch, adjusted=record.adjusted)
    if record.phase is Phase.REPLACING:
        return Reconciliation()  # its stand-in has a record of its own
    if seen is None:
        if record.phase is Phase.STARTING:
            return Reconciliation(orders=(again,))
        if record.phase is Phase.DRAINING:
            return Reconciliation(events=(BrowserStopped(browser_id),))
        exited = _failure("its worker has exited", "worker_exited", record, at)
        return Reconciliation(events=(BrowserFailed(browser_id, epoch, exited),))
    changed = _breaker_changes(record, seen)
    if seen.epoch > epoch:  # the log has lost events
        lost = _failure("this incarnation is missing from the log", "log_lost", record, at)
        lost_at = BrowserFailed(browser_id, seen.epoch, lost)
        return changed + Reconciliation(events=(BrowserFound(browser_id, seen.epoch), lost_at))
    if record.phase is Phase.DRAINING:
        return changed + Reconciliation(orders=(Drain(browser_id, epoch),))
    not_launched = seen.epoch < epoch or seen.readiness is Readiness.STARTING
    # Dead without a cause: its launch had not begun, or was cut short with the supervisor.
    cut_short = seen.readiness is Readiness.DEAD and seen.cause is None
    if record.phase is Phase.STARTING and (not_launched or cut_short):
        return changed + Reconciliation(orders=(again,))
    if seen.epoch < epoch or seen.readiness is not Readiness.READY:
        cause = seen.cause or _failure("its browser has ended", "browser_exited", record, at)
        return changed + Reconciliation(events=(BrowserFailed(browser_id, epoch, cause),))
    if record.phase is Phase.STARTING and seen.facts is not None:
        return changed + Reconciliation(events=(BrowserReady(browser_id, epoch, seen.facts),))
    if record.phase is Phase.RECONNECTING:
        return changed + Reconciliation(orders=(Reconnect(browser_id, epoch),))
    if seen.cause is not None:
        return changed + Reconciliation(events=(BrowserFailed(browser_id, epoch, seen.cause),))
    return changed + _models(state, record, seen)


def _models(state: PoolState, record: BrowserRecord, seen: Seen) -> Reconciliation:
    """Of a ready browser: models that are loaded, missing, or no longer wanted."""
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


def _breaker_changes(record: BrowserRecord, seen: Seen) -> Reconciliation:
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
