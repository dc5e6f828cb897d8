"""Maintenance of a pool without failures: park, recycle, grow and shrink.

It turns the reports of hosts into events for `recovery.control.decide`, by the rules of
`recovery.resources` and `recovery.scaling`. Time is an argument. This module must not query hosts,
and must not carry out anything.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from recovery.control import (
    ALIVE,
    COMING,
    Body,
    BrowserRecord,
    BrowserRecycled,
    BrowserUnwanted,
    BrowserWanted,
    ModelParked,
    Phase,
    PoolState,
)
from recovery.kinds import BrowserType
from recovery.resources import BrowserLoad, NodeLoad, Park, ResourceLimits, relieve
from recovery.scaling import READINGS_MAX, Reading, ScalingLimits, choose_leaver, scale


@dataclass
class _Scaled:
    limits: ScalingLimits
    readings: deque[Reading] = field(default_factory=lambda: deque(maxlen=READINGS_MAX))
    changed_at: float = -math.inf


class Caretaker:
    """Decides at each look at the pool. `why` is the reason of the last change of size."""

    def __init__(
        self, limits: ResourceLimits, scaling: Mapping[BrowserType, ScalingLimits]
    ) -> None:
        self._limits = limits
        self._scaled = {kind: _Scaled(each) for kind, each in scaling.items()}
        self.why = ""

    def look(
        self,
        state: PoolState,
        browsers: Sequence[BrowserLoad],
        nodes: Iterable[NodeLoad],
        now: float,
    ) -> tuple[Body, ...]:
        """The events that follow from what hosts in service have just reported."""
        if state.closing:
            return ()
        recycling = any(record.recycling for record in state.browsers.values()) or any(
            record.phase in COMING for record in state.browsers.values()
        )
        events: list[Body] = [
            ModelParked(todo.model, todo.why)
            if isinstance(todo, Park)
            else BrowserRecycled(todo.browser_id, todo.epoch, todo.why)
            for todo in relieve(self._limits, tuple(nodes), browsers, recycling=recycling)
        ]
        loads = {load.browser_id: load for load in browsers}
        for kind, scaled in self._scaled.items():
            events += self._resize(state, kind, scaled, loads, now)
        return tuple(events)

    def _resize(
        self,
        state: PoolState,
        kind: BrowserType,
        scaled: _Scaled,
        loads: Mapping[str, BrowserLoad],
        now: float,
    ) -> list[Body]:
        own = [r for r in state.browsers.values() if r.kind is kind and not r.stands_in_for]
        ready = [r for r in own if r.phase is Phase.READY]
        queues = [loads[r.id].queue for r in ready if r.id in loads]
        # A browser that was given up is counted: else it would be started again and again.
        lost = sum(r.phase is Phase.GIVEN_UP and not r.replaced_by for r in own)
        coming = lost + sum(r.phase in COMING or r.recycling for r in own)
        busy = sum(queue > 0 for queue in queues)
        if kind in state.missing:
            return []
        scaled.readings.append(Reading(now, len(ready), coming, sum(queues), busy))
        change = scale(scaled.limits, scaled.readings, scaled.changed_at, now)
        if not change.delta:
            return []
        scaled.changed_at, self.why = now, change.why
        if change.delta > 0:
            names = free_names(state, kind, change.delta)
            return [BrowserWanted(name, kind) for name in names]
        leaver = choose_leaver([(r.id, _queue(r, loads), r.since) for r in ready])
        return [BrowserUnwanted(leaver)]


def _queue(record: BrowserRecord, loads: Mapping[str, BrowserLoad]) -> int:
    load = loads.get(record.id)
    return load.queue if load else 0


def free_names(state: PoolState, kind: BrowserType, count: int) -> list[str]:
    """Names for `count` new browsers: the first numbers not used by a browser of that kind, except
    those that were stopped on request."""
    kept = (*ALIVE, Phase.GIVEN_UP)
    return first_names(kind, count, {r.id for r in state.browsers.values() if r.phase in kept})


def first_names(kind: BrowserType, count: int, taken: Collection[str]) -> list[str]:
    """The type with the first `count` numbers that are not `taken`."""
    names = (f"{kind}-{number}" for number in itertools.count())
    return list(itertools.islice((name for name in names if name not in taken), count))
