"""What must hold of the pool after every event: of its state, its log, and who lives.

This module must not judge operations (`tests.simulator.judging` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from actors.messages import LaunchOrder
from recovery.control import DEAD_MAX, Phase, PoolState
from recovery.supervision import RestartLimit
from tests.simulator.clocks import Clocks
from tests.simulator.hosts import SimHost
from tests.simulator.invariants import any_left, broken
from tests.simulator.judging import Judge
from tests.simulator.log import Store
from tests.simulator.supervisor import SimSupervisor
from tests.simulator.verdict import Verdict

# Browsers remembered beyond those asked for: the long dead, and a window of races.
STAND_INS_MAX = DEAD_MAX + 2 * 3 * RestartLimit().restarts_max


class StateChecks:
    """Looks at every state beside the one before it."""

    def __init__(
        self,
        slots: Iterable[str],
        hosts: Mapping[str, list[SimHost]],
        store: Store,
        clocks: Clocks,
        judge: Judge,
        verdict: Verdict,
    ) -> None:
        self._slots = frozenset(slots)
        self._hosts = hosts
        self._store = store
        self._clocks = clocks
        self._judge = judge
        self._violated, self._require = verdict.violated, verdict.require
        self._before = PoolState()
        self._lost_events = False
        self._epochs: dict[str, int] = {}  # slot -> the newest that was launched

    def begin(self, state: PoolState) -> None:
        """A new incarnation goes on from `state`."""
        self._before = state

    def events_lost(self) -> None:
        """A supervisor died with events that its log did not have."""
        self._lost_events = True

    def after_event(self, supervisor: SimSupervisor) -> None:
        """What must hold after every event that is applied."""
        state, now = supervisor.state, self._clocks.wall()
        if not supervisor.has_unlogged and state != self._store.replayed:
            self._violated(f"the log replays to {self._store.replayed}, and not to {state}")
        self._violated(wrong) if (wrong := broken(self._before, state, now)) else None
        self._before = state
        for fault in supervisor.faults:
            if "IllegalTransition" in fault or "InternalError" in fault:
                self._violated(fault)
        fresh = state.browsers.keys() - self._slots
        self._require(len(fresh) <= STAND_INS_MAX, f"ever more browsers: {sorted(fresh)}")
        for name, hosts in self._hosts.items():
            living = [str(host.ref) for host in hosts if host.lives]
            self._require(len(living) <= 1, f"{name} has {len(living)} living workers: {living}")
        if not any_left(state):
            self._judge.none_is_left()

    def launching(self, host: SimHost, order: LaunchOrder) -> None:
        """No incarnation is launched twice, unless the worker that had the order first is dead."""
        name, epoch = order.ref.browser_id, order.ref.epoch
        others = [
            other
            for other in self._hosts[name]
            if other is not host and any(known.ref == order.ref for known in other.launches)
        ]
        self._require(not any(other.lives for other in others), f"{order.ref} is launched twice")
        record = self._store.replayed.browsers.get(name)
        if others and record is not None and not self._lost_events:
            over = record.epoch > epoch or record.phase is not Phase.STARTING
            self._require(not over, f"{order.ref} is launched again, and its time is over")
        if not self._lost_events:
            known = self._epochs.get(name, -1)
            self._require(epoch >= known, f"{order.ref} is launched after epoch {known}")
        self._epochs[name] = max(epoch, self._epochs.get(name, -1))
