"""The journal: logs events and applies them to the state. Only this module does so.

The instructions that follow from an event (`recovery.control.decide`) are carried out after the
event is in the log. While the log can't be written, events are buffered in memory. This module
must not call a host.
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

_UNLOGGED_MAX = 1000  # events buffered while the log can't be written
_CHECKPOINT_EVENTS = 1000  # between checkpoints; limits the replay of a new supervisor


class EventLog(Protocol):
    """Stores events before their instructions run. See `recovery.log.log.Log`."""

    @property
    def last_seq(self) -> int: ...
    @property
    def events_since_checkpoint(self) -> int: ...
    async def append(self, event: Event) -> None: ...
    async def checkpoint(self, state: PoolState, seq: int) -> None: ...
    async def close(self) -> None: ...


class MemoryLog:
    """A bounded log in memory, lost with the supervisor."""

    def __init__(self, events_max: int = 10_000) -> None:
        self.events: deque[Event] = deque(maxlen=events_max)
        self.last_seq = 0
        self.events_since_checkpoint = 0

    async def append(self, event: Event) -> None:
        self.events.append(event)
        self.last_seq = event.seq

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        """Nothing to do: the state is in memory."""

    async def close(self) -> None:
        """Nothing to close."""


class Journal:
    """The state of one term, and the log from which it can be restored.

    `carry_out` is called with each instruction, in order; `on_repair` with each completed repair.
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
        self._lost = ""  # which events are lost for good
        self._order = asyncio.Lock()  # events are logged and applied one at a time
        self._happening: dict[asyncio.Task[None], None] = {}  # being logged and applied

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
        """Report lost events of the log in `trouble`, for the rest of this term."""
        self._lost = text

    @property
    def is_behind(self) -> bool:
        """Whether events wait for the log."""
        return bool(self._unlogged)

    @property
    def is_busy(self) -> bool:
        """Whether an event or a checkpoint is being written."""
        return self._order.locked()

    @property
    def under_way(self) -> tuple[asyncio.Task[None], ...]:
        """The tasks of events not yet applied, oldest first."""
        return tuple(self._happening)

    async def happen(self, body: Body, *, ordered: bool = False) -> None:
        """Log and apply an event, then carry out its instructions.

        While the log can't be written, clients' orders (`ordered`) are refused with
        `LogUnavailable`; other events are applied and logged later. If the caller is cancelled,
        the event is still completed: otherwise log and state would diverge.
        """
        happening = asyncio.create_task(self._log_and_apply(body, ordered), name="event")
        self._happening[happening] = None
        happening.add_done_callback(self._happened)
        await asyncio.shield(happening)

    def _happened(self, happening: asyncio.Task[None]) -> None:
        self._happening.pop(happening, None)
        if not happening.cancelled():
            happening.exception()  # mark as retrieved: the caller gets it, if not cancelled

    async def _log_and_apply(self, body: Body, ordered: bool) -> None:
        async with self._order:
            # Through the codec, so that the live state equals a replayed one.
            event = as_logged(Event(self._seq + 1, self._term, self._wall(), body))
            before = self._state
            state, instructions = decide(before, event)
            await self._append(event, ordered)
            self._seq, self._state = event.seq, state
        for instruction in instructions:
            self._carry_out(instruction)
        await self._changes.announce()
        self._report_repairs(before, state)
        if self._log.events_since_checkpoint >= _CHECKPOINT_EVENTS:
            await self.checkpoint()

    async def _append(self, event: Event, ordered: bool) -> None:
        try:
            await self._flush_unlogged()
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

    async def _flush_unlogged(self) -> None:
        while self._unlogged:
            await self._log.append(self._unlogged[0])
            self._unlogged.popleft()

    async def checkpoint(self) -> None:
        """Write the state beside the log, to shorten the replay of a new supervisor."""
        async with self._order:
            try:
                await self._flush_unlogged()
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

    def _report_repairs(self, before: PoolState, after: PoolState) -> None:
        """Report completed repairs to the history."""
        if self._on_repair is None or after.repairs is before.repairs:
            return
        for repair in after.repairs:
            if repair not in before.repairs:  # deferred, so that it can't delay or fail the event
                record = after.browsers[repair.browser_id]
                asyncio.get_running_loop().call_soon(self._on_repair, record, repair)

    async def close(self) -> None:
        await self._log.close()
