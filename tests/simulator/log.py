"""The log, in memory: it outlives its supervisor, and can be full.

What is on disk is what `recovery.log.codec` writes, so that a replay sees what a real one would.
This module must not check what a state means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import reduce
from typing import Any

from recovery.control import Event, PoolState, apply
from recovery.log.codec import decode, encode, state_from_plain, state_to_plain
from recovery.log.segments import LogUnavailable
from tests.simulator.plans import Fault
from tests.simulator.verdict import Verdict


class Store:
    """What of the log is on disk, and the state that it replays to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.replayed = PoolState()
        self.checkpoint: tuple[int, dict[str, Any]] | None = None
        self.full = False

    def write(self, event: Event) -> None:
        line = encode(event)
        self.lines.append(line)
        self.replayed = apply(self.replayed, decode(line))

    def recovered(self) -> PoolState:
        """As a new incarnation reads it: the last checkpoint, and the events after it."""
        seq, plain = self.checkpoint or (0, state_to_plain(PoolState()))
        return reduce(apply, map(decode, self.lines[seq:]), state_from_plain(plain))


class SimLog:
    """One incarnation's handle of the log. Writing takes a millisecond."""

    def __init__(
        self, store: Store, verdict: Verdict, dies_at: Callable[[int], Fault | None]
    ) -> None:
        self._store = store
        self._verdict = verdict
        self._dies_at = dies_at
        self._checkpointed = len(self._store.lines)

    @property
    def last_seq(self) -> int:
        return len(self._store.lines)

    @property
    def events_since_checkpoint(self) -> int:
        return self.last_seq - self._checkpointed

    async def append(self, event: Event) -> None:
        dies = self._dies_at(self.last_seq + 1)
        if dies is not None and not dies.logged:
            await asyncio.sleep(60)  # it is cancelled here
        await asyncio.sleep(0.0005)
        if self._store.full:
            raise LogUnavailable("the disk is full")
        if event.seq != self.last_seq + 1:
            self._verdict.violated(f"event {event.seq} was logged after {self.last_seq}")
        self._store.write(event)
        await asyncio.sleep(60 if dies is not None else 0.0005)

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        if self._store.full:
            raise LogUnavailable("the disk is full")
        if seq != self.last_seq or state != self._store.replayed:
            self._verdict.violated(f"the checkpoint of event {seq} is not what the log replays to")
        self._store.checkpoint = seq, state_to_plain(state)
        self._checkpointed = seq

    async def close(self) -> None:
        """Nothing is open."""
