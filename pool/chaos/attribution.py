"""Assigns the observations of a run to its faults.

A fault gets every failure detected at its target until the next fault hits the same target.
Failures are ordered by the numbers of their log events, since a fault may have changed the
supervisor's clock. Pure: no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pool.chaos.clock import SKEW_SECONDS
from pool.chaos.evidence import Noticed, Seen, evidence, judged
from pool.chaos.records import FaultRecord, OpRecord
from recovery.control import Repair
from recovery.faults import FAULTS as KINDS
from recovery.faults import FaultSite, Injected
from recovery.kinds import RecoveryLevel


class Repaired(NamedTuple):
    """A repair, with times of the client's clock."""

    began: float
    ready: float | None
    repair: Repair


class Strike(NamedTuple):
    """A failed attempt of an operation, and its browser."""

    number: int
    category: str
    browser_id: str
    epoch: int
    at: float


@dataclass(frozen=True)
class Gathered:
    """All observations of a run. `seen` and `marks` are by a fault's number; a mark is the number
    of the log's last event before that fault."""

    noticed: Sequence[Noticed]
    strikes: Sequence[Strike]
    operations: Sequence[OpRecord]
    repairs: Iterable[Repaired]
    seen: Mapping[int, Seen]
    marks: Mapping[int, int]


def attributed(faults: Sequence[FaultRecord], gathered: Gathered) -> list[FaultRecord]:
    """The faults with their outcomes. Call it when everything has been logged."""
    return [
        record if record.injected is None else _finished(record, record.injected, faults, gathered)
        for record in faults
    ]


def _finished(
    record: FaultRecord, injected: Injected, faults: Sequence[FaultRecord], gathered: Gathered
) -> FaultRecord:
    target = injected.target
    after = _next_on(record, faults)  # later failures belong to that one
    until = after.injected.at if after is not None and after.injected else math.inf
    last = gathered.marks[after.number] if after is not None else math.inf
    noticed = [
        failure
        for failure in gathered.noticed
        if failure.browser_id == target
        and failure.epoch >= injected.epoch
        and gathered.marks[record.number] < failure.seq <= last
    ]
    strikes = [
        strike
        for strike in gathered.strikes
        if (strike.browser_id, strike.epoch) == (target, injected.epoch)
        and injected.at - SKEW_SECONDS <= strike.at < until
    ]
    wrong = [op for op in gathered.operations if op.wrong and op.browser_id == target]
    answers = [strike.category for strike in strikes] + ["wrong"] * len(wrong)
    seen = replace(gathered.seen.get(record.number, Seen()), noticed=noticed, answers=answers)
    shown = evidence(injected, seen)
    repair = _repair_of(injected, until, gathered.repairs)
    aimed_at_browser = KINDS[injected.fault.kind].place is FaultSite.BROWSER
    return replace(
        record,
        outcome="happened" if shown else "unseen",
        evidence=shown,
        noticed=tuple(failure.category for failure in noticed),
        noticed_ms=(noticed[0].at - injected.at) * 1e3 if noticed else None,
        right=judged(injected, noticed) if aimed_at_browser else None,
        ladder=_ladder(repair.repair) if repair else (),
        repair_seconds=repair.ready - repair.began if repair and repair.ready else None,
        struck=tuple(dict.fromkeys(strike.number for strike in strikes)),
    )


def _next_on(record: FaultRecord, faults: Sequence[FaultRecord]) -> FaultRecord | None:
    """The next fault injected into the same slot."""
    made = record.injected
    for other in faults[record.number + 1 :]:
        if made and other.injected and other.injected.target == made.target:
            return other
    return None


def _repair_of(injected: Injected, until: float, repairs: Iterable[Repaired]) -> Repaired | None:
    """The last repair started because of a fault."""
    found = [
        repaired
        for repaired in repairs
        if (repaired.repair.browser_id, repaired.repair.from_epoch)
        == (injected.target, injected.epoch)
        and injected.at - SKEW_SECONDS <= repaired.began < until
    ]
    return max(found, key=lambda repaired: repaired.began, default=None)


def _ladder(repair: Repair) -> tuple[str, ...]:
    return tuple(
        " and ".join(f"{int(rung)} {RecoveryLevel(rung).name}" for rung in step.rungs)
        + ("" if step.worked else " (failed)")
        for step in repair.steps
    )
