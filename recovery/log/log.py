"""The control log: every event is on disk before it is acted on.

One thread writes; events appended while it waits for the disk share its next write. The
form of the files is in `recovery.log.segments`. `show` and `verify` only read, also while a
pool writes. This module must not decide what an event means, or what a loss of events calls for.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recovery.control import Event, PoolState
from recovery.errors import IllegalTransition
from recovery.log.codec import CorruptLog
from recovery.log.reading import Scan, lines_of, scan
from recovery.log.segments import Damage, LogUnavailable, Lost, event_line
from recovery.log.writing import Disk, LogConfig, LogInUse, Recovery, Store

__all__ = [
    "CorruptLog",
    "Damage",
    "Disk",
    "Log",
    "LogConfig",
    "LogInUse",
    "LogUnavailable",
    "Lost",
    "Recovery",
    "Report",
    "show",
    "verify",
]

_SCANS_MAX = 10


class _Line(NamedTuple):  # a tuple, since many are made and dataclasses are slower to make
    """An event to be written."""

    seq: int
    data: bytes
    done: asyncio.Future[None]


@dataclass(frozen=True)
class _Checkpoint:
    seq: int
    state: PoolState
    done: asyncio.Future[None]


class Log:
    """The log of one pool, in a folder of its own.

    An append that is cancelled may or may not be in the log: compare `last_seq` later.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig | None = None,
        disk: Disk | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._config = config or LogConfig()
        self._store = Store(folder, self._config, disk or Disk())
        self._wall = wall
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._queue: deque[_Line | _Checkpoint] = deque()  # the loop adds, the writer takes
        self._next = 1
        self._wake = threading.Condition()  # guards the next three
        self._due = False  # whether the writer may take what is queued
        self._failed = False  # whether it must not, until the failed events are out of the queue
        self._closing = False
        self._kicked = False
        self._turn = asyncio.Lock()  # held while waiting for room
        self._waiting = 0
        self._room = asyncio.Event()
        self._broken: BaseException | None = None

    @property
    def last_seq(self) -> int:
        """The number of the last event that is on disk."""
        return self._store.acknowledged

    @property
    def events_since_checkpoint(self) -> int:
        return self._store.acknowledged - self._store.checkpointed

    async def open(self) -> Recovery:
        """Recover the existing log and get ready to append.

        Raises `LogInUse`, `LogUnavailable`, or `CorruptLog` for a log that another version wrote.
        """
        if self._loop is not None or self._closing:
            raise IllegalTransition(f"the log in {self._folder} was opened before")
        opening = asyncio.ensure_future(asyncio.to_thread(self._store.open, self._wall()))
        try:
            recovery = await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.gather(opening, return_exceptions=True)  # a thread can't be cancelled
            self._store.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._next = recovery.last_seq + 1
        self._thread = threading.Thread(target=self._write, name="tabpool-log", daemon=True)
        self._thread.start()
        return recovery

    async def append(self, event: Event) -> None:
        """Return when `event`, whose number must be the next one, is on disk.

        Raises `LogUnavailable` if it could not be written: then neither it nor any that was
        appended after it is in the log, and numbering continues from `last_seq`.
        """
        data = event_line(event)
        if self._waiting or self._full():
            self._waiting += 1
            try:
                async with self._turn:
                    while self._full():
                        self._room.clear()
                        await self._room.wait()
                    done = self._enqueue(event.seq, data)
            finally:
                self._waiting -= 1
        else:
            done = self._enqueue(event.seq, data)
        await done

    async def checkpoint(self, state: PoolState, seq: int) -> None:
        """Store `state`, which includes all events up to number `seq`, and delete old files.

        Raises `LogUnavailable`; the log is then as it was.
        """
        loop = self._require_open()
        if not 0 < seq <= self.last_seq:
            raise IllegalTransition(
                f"can't checkpoint event {seq}: the last one on disk is {self.last_seq}"
            )
        done = loop.create_future()
        self._queue.append(_Checkpoint(seq, state, done))
        self._kick_soon(loop)
        await done

    async def close(self) -> None:
        """Write queued events, and release the log's lock."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self._store.close()

    # -- the caller's side ------------------------------------------------------------------------

    def _require_open(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._closing or self._broken is not None:
            why = f": {self._broken!r}" if self._broken is not None else ""
            raise LogUnavailable(f"the log in {self._folder} is not open{why}")
        return self._loop

    def _full(self) -> bool:
        return len(self._queue) >= self._config.queue_max

    def _enqueue(self, seq: int, data: bytes) -> asyncio.Future[None]:
        loop = self._require_open()
        if seq != self._next:
            raise IllegalTransition(f"expected event {self._next}, got {seq}", seq=seq)
        self._next += 1
        done: asyncio.Future[None] = loop.create_future()
        self._queue.append(_Line(seq, data, done))
        if not self._kicked:
            self._kick_soon(loop)
        return done

    def _kick_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # At the end of this turn of the loop, so that all appends in it share a write.
        if not self._kicked:
            self._kicked = True
            loop.call_soon(self._kick)

    def _kick(self) -> None:
        self._kicked = False
        with self._wake:
            self._due = True
            self._wake.notify()

    def _succeed(self, done: list[asyncio.Future[None]]) -> None:
        for future in done:
            if not future.done():  # as it is when its caller was cancelled
                future.set_result(None)
        self._room.set()

    def _fail(self, work: list[_Line] | _Checkpoint, error: LogUnavailable) -> None:
        """Fail the failed work and every queued event after it: numbers must have no gap."""
        failed: list[_Line | _Checkpoint]
        failed = [work] if isinstance(work, _Checkpoint) else [*work]
        if self._broken is not None or not isinstance(work, _Checkpoint):
            queued = [*self._queue]
            self._queue.clear()
            for one in queued:
                lost = self._broken is not None or isinstance(one, _Line)
                (failed if lost else self._queue).append(one)
            self._next = self.last_seq + 1
        for one in failed:
            if not one.done.done():
                one.done.set_exception(copy.copy(error))  # each caller adds its own traceback
        self._room.set()
        with self._wake:
            self._failed = False
            self._wake.notify()

    # -- the writer's side ------------------------------------------------------------------------

    def _write(self) -> None:
        work: list[_Line] | _Checkpoint = []
        try:
            while work := self._take():
                try:
                    if isinstance(work, _Checkpoint):
                        self._store.checkpoint(work.seq, work.state, self._wall())
                        self._call_soon(self._succeed, [work.done])
                    else:
                        self._store.append([line.data for line in work], work[-1].seq)
                        self._call_soon(self._succeed, [line.done for line in work])
                        self._store.sync_mark()
                except LogUnavailable as error:
                    self._failed = True
                    self._call_soon(self._fail, work, error)
        except BaseException as error:  # a bug: no caller may wait for a dead writer
            self._broken = error
            ended = LogUnavailable(f"the log's writer ended: {error!r}")
            self._call_soon(self._fail, work, ended)
            raise

    def _take(self) -> list[_Line] | _Checkpoint:
        """The next work; empty when the log is closing and all is written."""
        with self._wake:
            while self._failed or not (self._closing or (self._due and self._queue)):
                self._wake.wait()
            lines: list[_Line] = []
            while self._queue and len(lines) < self._config.batch_max:
                work = self._queue[0]
                if isinstance(work, _Checkpoint):
                    if lines:
                        break
                    self._queue.popleft()
                    return work
                lines.append(work)
                self._queue.popleft()
            self._due = bool(self._queue)
            return lines

    def _call_soon(self, callback: Callable[..., None], *facts: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop and all callers have ended
            self._loop.call_soon_threadsafe(callback, *facts)


# -- inspecting a log -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `verify` found. `ok`: everything that was acknowledged is there and can be replayed.

    `torn_bytes` at the end were never acknowledged (or are just being written). `lost_before`
    are losses that an earlier recovery has reported and accounted for.
    """

    ok: bool
    segments: int
    events: int
    first_seq: int
    last_seq: int
    acknowledged: int | None
    checkpoints: tuple[int, ...]
    torn_bytes: int
    lost: tuple[Lost, ...]
    lost_before: tuple[Lost, ...]
    damage: tuple[Damage, ...]


def verify(folder: Path) -> Report:
    """Read and replay a whole log without changing it, also while it is in use.

    Raises `LogUnavailable` when there is none.
    """
    found = _steady_scan(folder)
    if isinstance(found, CorruptLog):
        damage = (Damage(folder.name, 0, str(found)),)
        return Report(False, 0, 0, 0, 0, None, (), 0, (), (), damage)
    return Report(
        not found.damage and found.lost is None,
        len(found.segments),
        found.events,
        int(found.segments[0].stem) if found.segments else found.last_seq + 1,
        found.last_seq,
        found.acknowledged,
        tuple(found.checkpoints),
        found.cut_bytes,
        (found.lost,) if found.lost else (),
        found.base.lost,
        tuple(found.damage),
    )


def _steady_scan(folder: Path) -> Scan | CorruptLog:
    """A scan whose result was seen twice: a writer may move files during one."""
    before: object = None
    for _ in range(_SCANS_MAX):
        try:
            found = scan(folder)
        except CorruptLog as error:
            if before == str(error):
                return error
            before = str(error)
        except FileNotFoundError as error:
            if not folder.is_dir():
                raise LogUnavailable(f"there is no log in {folder}", folder=str(folder)) from error
            before = None
        except OSError as error:
            raise LogUnavailable(f"the log in {folder} can't be read: {error}") from error
        else:
            if not found.damage or before == found.damage:
                return found
            before = found.damage
    raise LogUnavailable(
        f"the log in {folder} changes too fast to be read: try again", folder=str(folder)
    )


def show(folder: Path, since: int = 1, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The events from number `since` on, as plain JSON, at most `limit`; also while in use.

    A line that can't be read appears as `{"type": "unreadable", "file", "offset", "line"}`. What
    was sealed by somebody else may be of any form: only that it is an object with a type is sure.
    Raises `LogUnavailable`, and `CorruptLog` for a file that is no segment.
    """
    shown = 0
    try:
        for file, offset, line, content in lines_of(folder, since):
            if limit is not None and shown >= limit:
                return
            shown += 1
            plain = _parsed(content)
            if plain is None:
                text = line.decode(errors="replace")
                plain = {"type": "unreadable", "file": file, "offset": offset, "line": text}
            yield plain
    except OSError as error:
        raise LogUnavailable(f"the log in {folder} can't be read: {error}") from error


def _parsed(content: bytes | None) -> dict[str, Any] | None:
    try:
        plain = None if content is None else json.loads(content)
    except (ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) and isinstance(plain.get("type"), str) else None
