"""The journal: an event comes in, is logged, and replaces the state. That happens here alone.

What follows from an event (`recovery.control.decide`) is handed on to be carried out, after the
event is in the log. While the log can't be written, events wait for it in memory. This module must
not call a host.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from actors.supervisor.changes import Changes
from recovery.control import (
    Body,
    BrowserRecord,
    Event,
    Instruction,
    PoolState,
    Repair,
    decide,
)
from recovery.log.codec import as_logged
from recovery.log.segments import LogUnavailable

_UNLOGGED_MAX = 1000  # events that wait for a log that can't be written
_CHECKPOINT_EVENTS = 1000  # that a new supervisor replays at most, or little more


class EventLog(Protocol):
    """Where events go before their instructions run. See `recovery.log.log.Log`."""

    @property
    def last_seq(self) -> int: ...
    @property
    def events_since_checkpoint(self) -> int: ...
    async def append(self, event: Event) -> None: ...
    async def checkpoint(self, state: PoolState, seq: int) -> None: ...
    async def close(self) -> None: ...


class MemoryLog:
    """A bounded log in memory. It does not outlive the supervisor."""

    def __init__(self, events_max: int = 10_000) -> None:
        self.events: deque[Event] = deque(maxlen=events_max)
        self.last_seq = 0
        self.events_since_checkpoint = 0

    async def append(self, event: Event) -> None:
        self.events.append(event)
        self.last_seq = event.seq

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        """A state is in memory already."""

    async def close(self) -> None:
        """Nothing is open."""


class Journal:
    """The state of one term, and the log that it can be had from again.

    `carry_out` gets each instruction, in order; `on_repair` each repair that has ended.
    """

    def __init__(
        self,
        log: EventLog,
        state: PoolState,
        term: int,
        wall: Callable[[], float],
        changes: Changes,
        carry_out: Callable[[Instruction], None],
        on_repair: Callable[[BrowserRecord, Repair], None] | None = None,
    ) -> None:
        self._log = log
        self._state = state
        self._term = term
        self._wall = wall
        self._changes = changes
        self._carry_out = carry_out
        self._on_repair = on_repair
        self._seq = log.last_seq
        self._unlogged: deque[Event] = deque()
        self._trouble = ""  # why the log can't be written now
        self._lost = ""  # what of it is lost for good
        self._order = asyncio.Lock()  # events are logged and applied one at a time
        self._happening: dict[asyncio.Task[None], None] = {}  # on their way into log and state

    @property
    def state(self) -> PoolState:
        """The state as the last event left it."""
        return self._state

    @property
    def seq(self) -> int:
        """The number of the last event that was applied."""
        return self._seq

    @property
    def trouble(self) -> str:
        """Why the log can't be written, or what of it was lost."""
        return "; ".join(filter(None, (self._lost, self._trouble)))

    def lost(self, text: str) -> None:
        """Say what of the log is lost, as long as this term lasts."""
        self._lost = text

    @property
    def is_behind(self) -> bool:
        """Whether events wait for the log."""
        return bool(self._unlogged)

    @property
    def is_busy(self) -> bool:
        """Whether an event or a checkpoint is on its way to the log."""
        return self._order.locked()

    @property
    def under_way(self) -> tuple[asyncio.Task[None], ...]:
        """The events that are not in the state yet, the oldest first."""
        return tuple(self._happening)

    async def happen(self, body: Body, *, ordered: bool = False) -> None:
        """Log and apply an event, then carry out what follows from it.

        While the log can't be written, what clients order (`ordered`) is refused with
        `LogUnavailable`; what simply happened is applied all the same, and logged later. Whoever
        asks may be cancelled meanwhile; the event is then taken to its end all the same, because
        half of one would leave the log and the state apart.
        """
        happening = asyncio.create_task(self._take_place(body, ordered), name="event")
        self._happening[happening] = None
        happening.add_done_callback(self._happened)
        await asyncio.shield(happening)

    def _happened(self, happening: asyncio.Task[None]) -> None:
        self._happening.pop(happening, None)
        if not happening.cancelled():
            happening.exception()  # told to whoever asked, if they still listen

    async def _take_place(self, body: Body, ordered: bool) -> None:
        async with self._order:
            # As a replay will see it, so that the live state can't differ from a replayed one.
            event = as_logged(Event(self._seq + 1, self._term, self._wall(), body))
            before = self._state
            state, instructions = decide(before, event)
            await self._append(event, ordered)
            self._seq, self._state = event.seq, state
        for instruction in instructions:
            self._carry_out(instruction)
        await self._changes.announce()
        self._tell_repairs(before, state)
        if self._log.events_since_checkpoint >= _CHECKPOINT_EVENTS:
            await self.checkpoint()

    async def _append(self, event: Event, ordered: bool) -> None:
        try:
            await self._log_what_waits()
            await self._log.append(event)
            self._trouble = ""
        except LogUnavailable as error:
            self._trouble = str(error)
            if ordered:
                raise
            if len(self._unlogged) >= _UNLOGGED_MAX:
                self._lost = f"the log is given up: {error}"
                await self._log.close()
                self._log = MemoryLog()
                self._unlogged.clear()
            else:
                self._unlogged.append(event)

    async def _log_what_waits(self) -> None:
        while self._unlogged:
            await self._log.append(self._unlogged[0])
            self._unlogged.popleft()

    async def checkpoint(self) -> None:
        """Write the state beside the log, so that a new supervisor has less of it to replay."""
        async with self._order:
            try:
                await self._log_what_waits()
                if not self._log.events_since_checkpoint:
                    return
                await self._log.checkpoint(self._state, self._seq)
                self._trouble = ""
            except LogUnavailable as error:
                self._trouble = str(error)

    async def checkpoint_every(self, seconds: float) -> None:
        while not self._state.closing:
            await asyncio.sleep(seconds)
            await self.checkpoint()

    def _tell_repairs(self, before: PoolState, after: PoolState) -> None:
        """Report the repairs that have ended, for the history."""
        if self._on_repair is None or after.repairs is before.repairs:
            return
        for repair in after.repairs:
            if repair not in before.repairs:  # not now: whatever it does, the event goes on
                record = after.browsers[repair.browser_id]
                asyncio.get_running_loop().call_soon(self._on_repair, record, repair)

    async def close(self) -> None:
        await self._log.close()
