"""Reading a log: a scan of its files, and the state that they replay to.

Blocking, and changes nothing: a log can be read while another process writes it. It may also be
somebody else's, so no more of it is in memory than a line, or a checkpoint, may have. This module
must not repair damage (`recovery.log.writing` does).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recovery.bounded_files import JsonBounds, json_object_from, open_regular
from recovery.control import Event, PoolState, apply
from recovery.errors import IllegalTransition
from recovery.log.codec import CorruptLog, decode, state_from_plain
from recovery.log.segments import (
    CHECKPOINT_BYTES_MAX,
    LINE_BYTES_MAX,
    MARKS,
    SEGMENT_BYTES_MAX,
    Damage,
    Lost,
    checkpoints_in,
    first_seq,
    mark_line,
    segments_in,
    seq_of,
    unseal,
)

_CHECKPOINT = JsonBounds(
    "a checkpoint", CHECKPOINT_BYTES_MAX, items_max=2_000_000, error=CorruptLog
)
_MARK_BYTES_MAX = 256


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
    """The result of a scan of a log's files."""

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

    Raises `CorruptLog` for intact data that can't be understood, and `OSError`.
    """
    marks = [read_mark(folder / name) for name in MARKS]  # first, as the rest may be growing
    segments = segments_in(folder)
    damage: list[Damage] = []
    checkpoints, damaged_files = _read_checkpoints(folder, damage)
    if segments or checkpoints or damaged_files:
        for name, mark in zip(MARKS, marks, strict=True):
            if mark is None:
                what = "the mark of the last acknowledged event is unreadable"
                damage.append(Damage(name, 0, what))
    else:
        marks.append(0)  # A log that is just being created may have no marks yet.
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


def _read_checkpoints(folder: Path, damage: list[Damage]) -> tuple[list[Checkpoint], list[Path]]:
    intact, damaged = [], []
    for seq, path in checkpoints_in(folder):
        data = _beginning(path, CHECKPOINT_BYTES_MAX)
        content = unseal(data[:-1]) if data.endswith(b"\n") else None
        if content is None:
            damage.append(Damage(path.name, 0, "the checkpoint's checksum does not match"))
            damaged.append(path)
            continue
        plain = json_object_from(content, _CHECKPOINT, path.name)
        try:
            lost = tuple(_lost(pair) for pair in plain["lost"])
            intact.append(Checkpoint(seq, state_from_plain(plain["state"]), lost))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptLog(f"{path.name} is not a checkpoint: {error!r}") from None
    return intact, damaged


def _lost(pair: Any) -> Lost:
    first, last = pair
    if type(first) is not int or type(last) is not int:
        raise ValueError(f"events {first!r} to {last!r}")
    return Lost(first, last)


def _beginning(path: Path, bytes_max: int) -> bytes:
    """The first `bytes_max` bytes of a file, and another one if there are more."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        return stream.read(min(size, bytes_max) + 1)


class Line(NamedTuple):
    """A line of a segment without its newline, clipped at `LINE_BYTES_MAX`; `length` is its own, in
    the file and with the newline. `content`: what was sealed, None if it can't be read."""

    data: bytes
    length: int
    ended: bool
    content: bytes | None


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a segment. Raises `OSError`, and `CorruptLog` for a file that is no segment."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > SEGMENT_BYTES_MAX:
            raise CorruptLog(
                f"{path.name} has {size:,} bytes; a segment has at most {SEGMENT_BYTES_MAX:,}"
            )
        while line := stream.readline(LINE_BYTES_MAX + 1):
            length = len(line)
            rest = line
            while not rest.endswith(b"\n") and (rest := stream.readline(LINE_BYTES_MAX)):
                length += len(rest)
            whole = length == len(line)
            ended = (line if whole else rest).endswith(b"\n")
            line = line.removesuffix(b"\n")
            yield Line(line, length, ended, unseal(line) if whole and ended else None)


def read_mark(path: Path) -> int | None:
    try:
        data = _beginning(path, _MARK_BYTES_MAX)
    except FileNotFoundError:
        return None
    digits = data[16:36].strip()
    return int(digits) if digits.isdigit() and data == mark_line(int(digits)) else None


class _Walk:
    """One pass over all segments: finds gaps, and replays as far as there is none."""

    def __init__(self, found: Scan, oldest: int) -> None:
        self._found = found
        first = first_seq(found.segments[0]) if found.segments else oldest + 1
        self._expected = min(first, oldest + 1)
        self._bad: Place | None = None  # the start of the present unreadable part
        self._good_segment, self._end_of_good = -1, 0  # where the last readable line ends

    def walk(self) -> None:
        found, end = self._found, Place(0, 0)
        sizes = []
        for index, path in enumerate(found.segments):
            sizes.append(self._segment(index, path))
            end = Place(index, sizes[-1])
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

    def _segment(self, index: int, path: Path) -> int:
        """Take in a segment, unless what follows is to be cut off. Returns its bytes."""
        found, base, offset = self._found, self._found.base.seq, 0
        for line in read_lines(path):
            if found.cut is None:
                self._line(index, offset, line, base)
            offset += line.length
        return offset

    def _line(self, index: int, offset: int, line: Line, base: int) -> None:
        found, content = self._found, line.content
        seq = seq_of(content) if content is not None else 0
        if content is None or seq < self._expected:
            self._bad = self._bad or Place(index, offset)
            return
        if self._bad or seq > self._expected:
            self._gap(seq - 1, self._bad or Place(index, offset))
            if found.cut is not None:
                return
        self._bad = None
        self._expected = seq + 1
        found.events += 1
        if seq > base and found.lost is None:
            self._replay(decode(content))
        self._end_of_good = offset + line.length
        self._good_segment = index

    def _replay(self, event: Event) -> None:
        found = self._found
        try:
            found.state = apply(found.state, event)
        except IllegalTransition as error:
            raise CorruptLog(f"event {event.seq} is not allowed at its place: {error}") from None
        found.term = max(found.term, event.term)
        found.replayed += 1

    def _end(self, end: Place) -> None:
        acknowledged = max(self._found.acknowledged or 0, self._found.base.seq)
        if self._bad is not None:
            self._gap(max(acknowledged, self._expected), self._bad)
        elif acknowledged >= self._expected:
            self._gap(acknowledged, end)

    def _gap(self, last: int, place: Place) -> None:
        """Record that the expected number to `last` are unreadable: torn, known, or lost."""
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


def lines_of(folder: Path, since: int = 1) -> Iterator[tuple[str, int, bytes, bytes | None]]:
    """Every line of events from `since` on: file, offset, the line and its content, if intact."""
    segments = segments_in(folder)
    following = [*map(first_seq, segments[1:]), sys.maxsize]
    for path, after in zip(segments, following, strict=False):
        if after <= since:
            continue
        offset = 0
        try:
            for line in read_lines(path):
                if not line.ended:  # it is being written
                    break
                if line.content is None or seq_of(line.content) >= since:
                    yield path.name, offset, line.data, line.content
                offset += line.length
        except FileNotFoundError:  # deleted meanwhile, as too old
            continue
