"""Reading a log: a scan of its files, and the state that they replay to.

Blocking, and changes nothing: a log can be read while another process writes it. This module must
not repair damage (`recovery.log.writing` does).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recovery.control import Event, PoolState, apply
from recovery.errors import IllegalTransition
from recovery.log.codec import CorruptLog, decode, state_from_plain
from recovery.log.segments import (
    MARKS,
    Damage,
    Lost,
    checkpoints_in,
    first_seq,
    mark_line,
    segments_in,
    seq_of,
    unseal,
)


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
        data = path.read_bytes()
        content = unseal(data[:-1]) if data.endswith(b"\n") else None
        if content is None:
            damage.append(Damage(path.name, 0, "the checkpoint's checksum does not match"))
            damaged.append(path)
            continue
        try:
            plain = json.loads(content)
            lost = tuple(Lost(*pair) for pair in plain["lost"])
            intact.append(Checkpoint(seq, state_from_plain(plain["state"]), lost))
        except (KeyError, TypeError) as error:
            raise CorruptLog(f"{path.name} is not a checkpoint: {error}") from None
    return intact, damaged


def read_mark(path: Path) -> int | None:
    try:
        data = path.read_bytes()
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
            seq = seq_of(content) if content is not None else 0
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
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # deleted meanwhile, as too old
            continue
        offset = 0
        for line in data.split(b"\n")[:-1]:  # the rest is being written
            content = unseal(line)
            if content is None or seq_of(content) >= since:
                yield path.name, offset, line, content
            offset += len(line) + 1
