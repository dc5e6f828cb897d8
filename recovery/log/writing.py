"""Writing a log: recovery when it is opened, appending, checkpoints, deletion of old files.

All calls block and belong to one thread. Every change to a file goes through `Disk`. This module
must not decide when anything is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from recovery.control import PoolState
from recovery.errors import CallerError
from recovery.log.codec import state_to_plain
from recovery.log.reading import Place, Scan, read_mark, scan
from recovery.log.segments import (
    CHECKPOINT_BYTES_MAX,
    MARKS,
    Damage,
    LogUnavailable,
    Lost,
    checkpoint_name,
    checkpoints_in,
    first_seq,
    mark_line,
    seal,
    segment_name,
    segments_in,
)

LOST_MAX = 64  # ranges that a checkpoint remembers
DAMAGED_MAX = 16  # files set aside that are kept


class LogInUse(CallerError):
    """Another process (or another opener in this one) writes this log."""


@dataclass(frozen=True)
class LogConfig:
    segment_bytes_max: int = 16 * 2**20  # a segment that has grown this long is followed by another
    checkpoints_kept: int = 3  # and the segments since the oldest of them
    queue_max: int = 4096  # appends that wait for the disk; further ones wait for room
    batch_max: int = 1024  # events that share one write


@dataclass(frozen=True)
class Recovery:
    """What a log held when it was opened. The next event is number `last_seq + 1`.

    `lost` are events that `state` lacks although they were acknowledged; `lost_before` those of
    earlier recoveries. Damage without loss hit what a checkpoint already covers.
    """

    state: PoolState
    last_seq: int
    term: int
    checkpoint_seq: int
    replayed: int
    cut_bytes: int
    lost: tuple[Lost, ...] = ()
    lost_before: tuple[Lost, ...] = ()
    damage: tuple[Damage, ...] = ()


class Disk:
    """Every change that a log makes to its files, so that a test can make one fail."""

    def open(self, path: Path, *, append: bool) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | (os.O_APPEND if append else 0), 0o644)

    def write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def overwrite(self, fd: int, data: bytes) -> None:
        os.pwrite(fd, data, 0)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync leaves data in the drive's cache
        else:
            os.fdatasync(fd)

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


class Store:
    """The log's files, opened for writing. One thread at a time."""

    def __init__(self, folder: Path, config: LogConfig, disk: Disk) -> None:
        self._folder = folder
        self._config = config
        self._disk = disk
        self._lock_fd: int | None = None
        self._mark_fds: list[int] = []
        self._slot = 0  # the mark to be written next
        self._mark_synced = True
        self._fd: int | None = None  # of the segment that is being written; None: open it first
        self._path = folder
        self._size = 0  # of that segment, as far as it was acknowledged
        self._lost: tuple[Lost, ...] = ()
        self.acknowledged = 0
        self.checkpointed = 0

    def open(self, at: float) -> Recovery:
        """Recover, at wall time `at`. Raises `LogInUse`, `LogUnavailable` or `CorruptLog`."""
        try:
            with self._translated("opened"):
                self._take_lock()
                for stray in self._folder.glob("*.new"):
                    self._disk.unlink(stray)
                found = scan(self._folder)
                self._mend(found, at)
        except BaseException:
            self.close()
            raise
        return Recovery(
            found.state,
            found.last_seq,
            found.term,
            found.base.seq,
            found.replayed,
            found.cut_bytes,
            (found.lost,) if found.lost else (),
            found.base.lost,
            tuple(found.damage),
        )

    def append(self, lines: Sequence[bytes], last_seq: int) -> None:
        """Write events up to number `last_seq`; all of them are on disk when this returns.

        Raises `LogUnavailable`; then none of them is in the log. Call `sync_mark`
        afterwards, without waiting for it: until then a crash of the machine (not of the process)
        may set the mark back by these events, but does not lose them.
        """
        data = b"".join(lines)
        with self._translated("written"):
            try:
                self._sync_mark()
                fd = self._ready()
                self._disk.write(fd, data)
                self._disk.sync(fd)
                self._disk.overwrite(self._mark_fds[self._slot], mark_line(last_seq))
            except OSError:
                self._undo()
                raise
        self._mark_synced = False
        self.acknowledged = last_seq
        self._size += len(data)
        if self._size >= self._config.segment_bytes_max:
            self._start_segment()

    def sync_mark(self) -> None:
        with contextlib.suppress(OSError):  # then the next append tries again, and says so
            self._sync_mark()

    def checkpoint(self, seq: int, state: PoolState, at: float) -> None:
        """Store `state`, which includes the events up to `seq`, and delete old files."""
        plain = {
            "seq": seq,
            "at": at,
            "lost": [(lost.first, lost.last) for lost in self._lost],
            "state": state_to_plain(state),
        }
        content = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        sealed = seal(content.encode())
        if len(sealed) > CHECKPOINT_BYTES_MAX:  # it could not be read again
            raise LogUnavailable(
                f"the checkpoint of {self._folder} takes {len(sealed):,} bytes, more than "
                f"{CHECKPOINT_BYTES_MAX:,}",
                folder=str(self._folder),
            )
        with self._translated("written"):
            self._create(self._folder / checkpoint_name(seq), sealed)
        self.checkpointed = seq
        with contextlib.suppress(OSError):  # the next checkpoint tries again
            self._let_go()

    def close(self) -> None:
        try:
            self.sync_mark()
        finally:
            self._close_segment()
            for fd in self._mark_fds:
                os.close(fd)
            self._mark_fds = []
            self._mark_synced = True
            if self._lock_fd is not None:
                os.close(self._lock_fd)  # and with it the lock
                self._lock_fd = None

    # -- opening ----------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            self._disk.sync_folder(self._folder.parent)
        fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LogInUse(
                f"the log in {self._folder} is in use: a pool of this name is open, in this or "
                "another process",
                folder=str(self._folder),
            ) from None
        self._lock_fd = fd

    def _mend(self, found: Scan, at: float) -> None:
        """Make the files agree with `found`, and get ready to append.

        A crash on the way leaves files that lead to the same state again.
        """
        self._lost = found.base.lost
        self.checkpointed = found.base.seq
        for path in found.damaged_files:
            self._set_aside(path)
        if found.cut is not None:
            self._shorten(found.segments, found.cut, keep=False)
        if found.lost is not None:
            # This checkpoint records the lost numbers.
            self._lost = (*self._lost, found.lost)[-LOST_MAX:]
            self.checkpoint(found.last_seq, found.state, at)
            if found.lost_from is not None and found.segments:
                self._shorten(found.segments, found.lost_from, keep=True)
        if found.continues:
            self._path = found.segments[found.cut.segment if found.cut else -1]
            self._size = self._path.stat().st_size
            # Unacknowledged events that are readable are kept: sync them to disk.
            self._disk.sync(self._ready())
        if any(read_mark(self._folder / name) != found.last_seq for name in MARKS):
            for name in MARKS:
                self._create(self._folder / name, mark_line(found.last_seq))
        self._mark_fds = [self._disk.open(self._folder / name, append=False) for name in MARKS]
        self.acknowledged = found.last_seq
        if not found.continues or self._size >= self._config.segment_bytes_max:
            self._start_segment()

    def _shorten(self, segments: Sequence[Path], place: Place, *, keep: bool) -> None:
        """Cut everything from `place` on; with `keep`, it is set aside first."""
        path = segments[place.segment]
        for later in reversed(segments[place.segment + 1 :]):
            if keep:
                self._set_aside(later)
            else:
                self._disk.unlink(later)
        if keep and place.offset == 0:
            self._set_aside(path)
        elif path.stat().st_size > place.offset:
            if keep:
                self._create(path.with_name(f"{path.name}.damaged"), path.read_bytes())
            fd = self._disk.open(path, append=True)
            try:
                self._disk.truncate(fd, place.offset)
                self._disk.sync(fd)
            finally:
                os.close(fd)
        self._disk.sync_folder(self._folder)

    def _set_aside(self, path: Path) -> None:
        self._disk.replace(path, path.with_name(f"{path.name}.damaged"))

    # -- appending --------------------------------------------------------------------------------

    def _start_segment(self) -> None:
        """What comes next goes into a new file, which `_ready` makes."""
        self._close_segment()
        self._path = self._folder / segment_name(self.acknowledged + 1)
        self._size = 0

    def _close_segment(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _ready(self) -> int:
        """The open segment, exactly as long as what was acknowledged."""
        if self._fd is None:
            fd = self._disk.open(self._path, append=True)
            try:
                if os.fstat(fd).st_size != self._size:
                    self._disk.truncate(fd, self._size)
                    self._disk.sync(fd)
                if self._size == 0:
                    self._disk.sync_folder(self._folder)
            except OSError:
                os.close(fd)
                raise
            self._fd = fd
        return self._fd

    def _sync_mark(self) -> None:
        if not self._mark_synced:
            self._disk.sync(self._mark_fds[self._slot])
            self._mark_synced = True
            self._slot = 1 - self._slot

    def _undo(self) -> None:
        """After a failed append: first the mark, or the tail would look like a loss."""
        fd, self._fd = self._fd, None  # opened, and cut to its length, again before the next write
        with contextlib.suppress(OSError):
            if self._mark_synced:
                self._disk.overwrite(self._mark_fds[self._slot], mark_line(self.acknowledged))
            if fd is not None:
                self._disk.truncate(fd, self._size)
        if fd is not None:
            os.close(fd)

    # -- whole files ------------------------------------------------------------------------------

    def _create(self, path: Path, data: bytes) -> None:
        """Write a file aside and move it into place."""
        aside = path.with_name(f"{path.name}.new")
        try:
            fd = self._disk.open(aside, append=False)
            try:
                self._disk.truncate(fd, 0)
                self._disk.write(fd, data)
                self._disk.sync(fd)
            finally:
                os.close(fd)
            self._disk.replace(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                self._disk.unlink(aside)
            raise
        self._disk.sync_folder(path.parent)

    def _let_go(self) -> None:
        """Delete what no kept checkpoint needs, oldest first, so that no gap can arise."""
        kept = self._config.checkpoints_kept
        checkpoints = checkpoints_in(self._folder)
        for _, path in checkpoints[:-kept]:
            self._disk.unlink(path)
        if len(checkpoints) >= kept:
            oldest = checkpoints[-kept][0]
            for path, after in pairwise(segments_in(self._folder)):
                if first_seq(after) > oldest + 1:
                    break
                self._disk.unlink(path)
        damaged = sorted(self._folder.glob("*.damaged"), key=lambda path: path.stat().st_mtime)
        for path in damaged[:-DAMAGED_MAX]:
            self._disk.unlink(path)
        self._disk.sync_folder(self._folder)

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogUnavailable(
                f"the log in {self._folder} can't be {what}: {error.strerror or error}",
                folder=str(self._folder),
                errno=error.errno,
            ) from error
