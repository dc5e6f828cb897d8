"""The log's files: their form, how they are read, and how they are written.

    00000001.jsonl, 00000057.jsonl   events, a line each; a file is named by its first one's number
    checkpoint-00000056.json         a state, and the number of the last event in it
    acknowledged-0, acknowledged-1   the last number that was acknowledged, written in turns
    lock                             held by the one process that writes
    *.damaged                        what a recovery set aside

Every line ends in a CRC32 of all that comes before it, and numbers leave no gap, so whatever
changed or went is found and can be named. An event is acknowledged when it and its number are on
disk; what lies beyond that number may be torn, and is cut off. All is blocking and belongs to one
thread; `scan` only reads. This module must not decide when anything is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from zlib import crc32

from recovery.control import Event, PoolState, apply
from recovery.errors import CallerError, IllegalTransition, SetupError
from recovery.log.codec import CorruptLog, decode, encode, state_from_plain, state_to_plain

LOST_MAX = 64  # ranges that a checkpoint remembers
DAMAGED_MAX = 16  # files set aside that are kept
_CRC_CHARS = len(',"crc":"01234567"}')
_SEQ = re.compile(rb'\{"seq":(\d+),')
_SEGMENT = re.compile(r"\d{8,}\.jsonl")
_CHECKPOINT = re.compile(r"checkpoint-(\d{8,})\.json")
_MARKS = ("acknowledged-0", "acknowledged-1")


class LogUnavailable(SetupError):
    """The log can't be read or written at present: the disk is full, or worse."""


class LogInUse(CallerError):
    """Another process (or another opener in this one) writes this log."""


@dataclass(frozen=True)
class LogConfig:
    segment_bytes_max: int = 16 * 2**20  # a segment that has grown this long is followed by another
    checkpoints_kept: int = 3  # and the segments since the oldest of them
    queue_max: int = 4096  # appends that wait for the disk; further ones wait for room
    batch_max: int = 1024  # events that share one write


@dataclass(frozen=True, order=True)
class Lost:
    """Events, by their numbers, that were acknowledged and can't be applied any more."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"


@dataclass(frozen=True)
class Damage:
    """Something unreadable or missing. `events` are those that can't be read because of it."""

    file: str
    offset: int
    what: str
    events: Lost | None = None

    def __str__(self) -> str:
        events = f" (events {self.events})" if self.events else ""
        return f"{self.file} at byte {self.offset}: {self.what}{events}"


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


# -- the form -------------------------------------------------------------------------------------


def seal(content: bytes) -> bytes:
    """A JSON object as a line of its own, with its CRC as the last member."""
    head = content[:-1]
    return b'%b,"crc":"%08x"}\n' % (head, crc32(head))


def unseal(line: bytes) -> bytes | None:
    """What was sealed (the line comes without its newline), or None if a byte of it changed."""
    head = line[:-_CRC_CHARS]
    # Compared as written: int(..., 16) would let a changed letter case pass.
    if line[-_CRC_CHARS:] != b',"crc":"%08x"}' % crc32(head):
        return None
    return head + b"}"


def event_line(event: Event) -> bytes:
    return seal(encode(event))


def _mark(seq: int) -> bytes:
    return seal(b'{"acknowledged":%20d}' % seq)  # of one length, so that it is written in place


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    seq: int
    state: PoolState = field(default_factory=PoolState)
    lost: tuple[Lost, ...] = ()  # up to `seq`, in all recoveries


@dataclass(frozen=True)
class Place:
    """A byte of a segment (an index into the segments in order)."""

    segment: int
    offset: int


@dataclass
class Scan:
    """Everything there is to know of a log's files."""

    base: Checkpoint
    state: PoolState
    term: int
    segments: list[Path]
    checkpoints: list[int]  # the intact ones, oldest first
    acknowledged: int | None  # None: both marks are unreadable
    last_seq: int = 0
    events: int = 0
    replayed: int = 0
    damage: list[Damage] = field(default_factory=list)
    damaged_files: list[Path] = field(default_factory=list)  # checkpoints
    lost: Lost | None = None
    lost_from: Place | None = None
    cut: Place | None = None
    cut_bytes: int = 0
    continues: bool = False  # whether the last segment ends with the last event


def scan(folder: Path) -> Scan:
    """Read a whole log and replay it, changing nothing.

    Raises `CorruptLog` for what is intact but can't be understood, `OSError` for the rest.
    """
    marks = [_read_mark(folder / name) for name in _MARKS]  # first, as the rest may be growing
    segments = _segments_in(folder)
    damage: list[Damage] = []
    checkpoints, damaged_files = _read_checkpoints(folder, damage)
    if segments or checkpoints or damaged_files:
        for name, mark in zip(_MARKS, marks, strict=True):
            if mark is None:
                what = "the mark of what was acknowledged is unreadable"
                damage.append(Damage(name, 0, what))
    else:
        marks.append(0)  # A log that is just being made may have no marks yet.
    acknowledged = max((mark for mark in marks if mark is not None), default=None)
    base = checkpoints[-1] if checkpoints else Checkpoint(0)
    found = Scan(
        base,
        base.state,
        base.state.term,
        segments,
        [checkpoint.seq for checkpoint in checkpoints],
        acknowledged,
        damage=damage,
        damaged_files=damaged_files,
    )
    oldest = checkpoints[0].seq if checkpoints else 0
    _Walk(found, oldest).walk()
    return found


def _segments_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _SEGMENT.fullmatch(path.name)]
    return sorted(found, key=_first_seq)


def _first_seq(segment: Path) -> int:
    return int(segment.stem)


def _checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def _read_checkpoints(folder: Path, damage: list[Damage]) -> tuple[list[Checkpoint], list[Path]]:
    intact, damaged = [], []
    for seq, path in _checkpoints_in(folder):
        data = path.read_bytes()
        content = unseal(data[:-1]) if data.endswith(b"\n") else None
        if content is None:
            damage.append(Damage(path.name, 0, "a checkpoint that is not as it was written"))
            damaged.append(path)
            continue
        try:
            plain = json.loads(content)
            lost = tuple(Lost(*pair) for pair in plain["lost"])
            intact.append(Checkpoint(seq, state_from_plain(plain["state"]), lost))
        except (KeyError, TypeError) as error:
            raise CorruptLog(f"{path.name} is no checkpoint: {error}") from None
    return intact, damaged


def _read_mark(path: Path) -> int | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    digits = data[16:36].strip()
    return int(digits) if digits.isdigit() and data == _mark(int(digits)) else None


class _Walk:
    """One pass over all segments: finds gaps, and replays as far as there is none."""

    def __init__(self, found: Scan, oldest: int) -> None:
        self._found = found
        first = _first_seq(found.segments[0]) if found.segments else oldest + 1
        self._expected = min(first, oldest + 1)
        self._bad: Place | None = None  # since where nothing was readable
        self._good_segment, self._end_of_good = -1, 0  # where the last readable line ends

    def walk(self) -> None:
        found, end = self._found, Place(0, 0)
        sizes = []
        for index, path in enumerate(found.segments):
            data = path.read_bytes()
            sizes.append(len(data))
            end = Place(index, len(data))
            if found.cut is None:
                self._segment(index, data)
        if found.cut is None:
            self._end(end)
        found.last_seq = max(self._expected - 1, found.base.seq)
        if found.lost is not None:
            last = max(found.lost.last, found.last_seq, found.acknowledged or 0)
            found.lost = Lost(found.lost.first, last)
            found.last_seq = last
        if found.cut is not None:
            end = found.cut
            found.cut_bytes = sum(sizes[end.segment :]) - end.offset
        good = Place(self._good_segment, self._end_of_good)
        ends = good == end and found.last_seq == self._expected - 1
        found.continues = ends and found.lost is None

    def _segment(self, index: int, data: bytes) -> None:
        found, base, offset = self._found, self._found.base.seq, 0
        lines = data.split(b"\n")
        tail = lines.pop()
        for line in lines:
            content = unseal(line)
            seq = _seq_of(content) if content is not None else 0
            if content is None or seq < self._expected:
                self._bad = self._bad or Place(index, offset)
            else:
                if self._bad or seq > self._expected:
                    self._gap(seq - 1, self._bad or Place(index, offset))
                    if found.cut is not None:
                        return
                self._bad = None
                self._expected = seq + 1
                found.events += 1
                if seq > base and found.lost is None:
                    self._replay(decode(content))
                self._end_of_good = offset + len(line) + 1
                self._good_segment = index
            offset += len(line) + 1
        if tail:
            self._bad = self._bad or Place(index, offset)

    def _replay(self, event: Event) -> None:
        found = self._found
        try:
            found.state = apply(found.state, event)
        except IllegalTransition as error:
            raise CorruptLog(f"event {event.seq} can't follow those before it: {error}") from None
        found.term = max(found.term, event.term)
        found.replayed += 1

    def _end(self, end: Place) -> None:
        acknowledged = max(self._found.acknowledged or 0, self._found.base.seq)
        if self._bad is not None:
            self._gap(max(acknowledged, self._expected), self._bad)
        elif acknowledged >= self._expected:
            self._gap(acknowledged, end)

    def _gap(self, last: int, place: Place) -> None:
        """From the expected number to `last` nothing is readable: torn, known, or a loss."""
        found, first = self._found, self._expected
        acknowledged, base = found.acknowledged, found.base
        if acknowledged is not None and first > max(acknowledged, base.seq):
            found.cut = place
            return
        if any(known.first <= first and last <= known.last for known in base.lost):
            return
        missing = Lost(first, last) if first <= last else None
        file = found.segments[place.segment].name if found.segments else "the log"
        what = "unreadable" if self._bad is not None else "events are missing"
        found.damage.append(Damage(file, place.offset, what, missing))
        if missing and last > base.seq and found.lost is None:
            found.lost, found.lost_from = Lost(max(first, base.seq + 1), last), place


def _seq_of(content: bytes) -> int:
    match = _SEQ.match(content)
    return int(match[1]) if match else 0


def lines_of(folder: Path, since: int = 1) -> Iterator[tuple[str, int, bytes, bytes | None]]:
    """Every line of events from `since` on: file, offset, the line and its content, if intact."""
    segments = _segments_in(folder)
    following = [*map(_first_seq, segments[1:]), sys.maxsize]
    for path, after in zip(segments, following, strict=False):
        if after <= since:
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # its time to be kept ended meanwhile
            continue
        offset = 0
        for line in data.split(b"\n")[:-1]:  # the rest is being written
            content = unseal(line)
            if content is None or _seq_of(content) >= since:
                yield path.name, offset, line, content
            offset += len(line) + 1


# -- writing --------------------------------------------------------------------------------------


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
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone doesn't reach the platter there
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

        Raises `LogUnavailable`; then none of them is in the log. To be followed by `sync_mark`,
        which nobody needs to wait for: until then a crash of the machine, not of the process,
        may set the mark back by these events, and they are there all the same.
        """
        data = b"".join(lines)
        with self._translated("written"):
            try:
                self._sync_mark()
                fd = self._ready()
                self._disk.write(fd, data)
                self._disk.sync(fd)
                self._disk.overwrite(self._mark_fds[self._slot], _mark(last_seq))
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
        """Keep `state`, which includes the events up to `seq`, and let go what is too old."""
        plain = {
            "seq": seq,
            "at": at,
            "lost": [(lost.first, lost.last) for lost in self._lost],
            "state": state_to_plain(state),
        }
        content = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        with self._translated("written"):
            self._create(self._folder / f"checkpoint-{seq:08d}.json", seal(content.encode()))
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
                f"the log in {self._folder} is in use: a pool of this name is open, here or in "
                "another process",
                folder=str(self._folder),
            ) from None
        self._lock_fd = fd

    def _mend(self, found: Scan, at: float) -> None:
        """Make the files say what `found` says, and be ready to append.

        A crash on the way leaves files that lead to the same state again.
        """
        self._lost = found.base.lost
        self.checkpointed = found.base.seq
        for path in found.damaged_files:
            self._set_aside(path)
        if found.cut is not None:
            self._shorten(found.segments, found.cut, keep=False)
        if found.lost is not None:
            # With this checkpoint the lost numbers are accounted for, whatever comes after.
            self._lost = (*self._lost, found.lost)[-LOST_MAX:]
            self.checkpoint(found.last_seq, found.state, at)
            if found.lost_from is not None and found.segments:
                self._shorten(found.segments, found.lost_from, keep=True)
        if found.continues:
            self._path = found.segments[found.cut.segment if found.cut else -1]
            self._size = self._path.stat().st_size
            # What was not acknowledged but is there now counts: make sure that it stays.
            self._disk.sync(self._ready())
        if any(_read_mark(self._folder / name) != found.last_seq for name in _MARKS):
            for name in _MARKS:
                self._create(self._folder / name, _mark(found.last_seq))
        self._mark_fds = [self._disk.open(self._folder / name, append=False) for name in _MARKS]
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
        self._path = self._folder / f"{self.acknowledged + 1:08d}.jsonl"
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
                self._disk.overwrite(self._mark_fds[self._slot], _mark(self.acknowledged))
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
        checkpoints = _checkpoints_in(self._folder)
        for _, path in checkpoints[:-kept]:
            self._disk.unlink(path)
        if len(checkpoints) >= kept:
            oldest = checkpoints[-kept][0]
            for path, after in pairwise(_segments_in(self._folder)):
                if _first_seq(after) > oldest + 1:
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
