"""The log's files: their names and format.

    00000001.jsonl, 00000057.jsonl   events, a line each; a file is named by its first one's number
    checkpoint-00000056.json         a state, and the number of the last event in it
    acknowledged-0, acknowledged-1   the last number that was acknowledged, written in turns
    lock                             held by the one process that writes
    *.damaged                        what a recovery set aside

Every line ends in a CRC32 of all that comes before it, and numbers leave no gap, so changed or
missing data is detected and can be named. An event is acknowledged when it and its number are on
disk; what lies beyond that number may be torn, and is cut off. This module must not open a file:
`recovery.log.reading` and `recovery.log.writing` do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from recovery.control import Event
from recovery.errors import SetupError
from recovery.log.codec import EVENT_BYTES_MAX, encode

# Beyond these a file is none that `recovery.log.writing` makes. A segment ends with the write that
# made it longer than `segment_bytes_max`, and a write has up to `batch_max` events.
LINE_BYTES_MAX = EVENT_BYTES_MAX + 1024  # an event's other members, and the checksum
SEGMENT_BYTES_MAX = 512 << 20
CHECKPOINT_BYTES_MAX = 256 << 20

_CRC_CHARS = len(',"crc":"01234567"}')
_SEQ = re.compile(rb'\{"seq":(\d{1,18}),')
_SEGMENT = re.compile(r"\d{8,}\.jsonl")
_CHECKPOINT = re.compile(r"checkpoint-(\d{8,})\.json")
MARKS = ("acknowledged-0", "acknowledged-1")


class LogUnavailable(SetupError):
    """The log can't be read or written at present, for example because the disk is full."""


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


# -- names ----------------------------------------------------------------------------------------


def segment_name(first: int) -> str:
    return f"{first:08d}.jsonl"


def checkpoint_name(seq: int) -> str:
    return f"checkpoint-{seq:08d}.json"


def segments_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _SEGMENT.fullmatch(path.name)]
    return sorted(found, key=first_seq)


def first_seq(segment: Path) -> int:
    return int(segment.stem)


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


# -- lines ----------------------------------------------------------------------------------------


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


def seq_of(content: bytes) -> int:
    match = _SEQ.match(content)
    return int(match[1]) if match else 0


def mark_line(seq: int) -> bytes:
    return seal(b'{"acknowledged":%20d}' % seq)  # of one length, so that it is written in place
