"""Logs in a folder for the tests of `recovery.log`, and disks that fail as they are told.

This module must not look at what a test is to find out.
"""

from __future__ import annotations

import errno
import os
import shutil
from functools import reduce
from pathlib import Path

from recovery.control import (
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserWanted,
    Event,
    ModelLoaded,
    ModelUnwanted,
    ModelWanted,
    PoolOpened,
    PoolState,
    apply,
)
from recovery.kinds import BrowserType, Level
from recovery.log.log import (
    Disk,
    LogConfig,
)
from recovery.log.segments import event_line
from recovery.log.writing import Store
from recovery.plan import STRATEGIES
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, NUMERIC, failure

SMALL = LogConfig(segment_bytes_max=400, checkpoints_kept=2)
BODIES: tuple[Body, ...] = (
    PoolOpened("p", Level.MEDIUM, STRATEGIES["progressive"], RestartLimit(), 1),
    BrowserWanted("b", BrowserType.CHROME),
    BrowserReady("b", 0, FACTS),
    ModelWanted("m", "digest"),
    ModelLoaded("b", 0, "m", NUMERIC),
    BrowserFailed("b", 0, failure(message="it broke: \u00e4\u2028")),
    BrowserReady("b", 1, FACTS),
)


def events(count: int, first: int = 1) -> list[Event]:
    """`BODIES`, and then a model wanted and unwanted for as long as it takes."""
    last = first + count - 1
    bodies = [*BODIES[:last]]
    while len(bodies) < last:
        n = len(bodies)
        bodies.append(ModelWanted(f"m{n}", "digest") if n % 2 else ModelUnwanted(f"m{n - 1}"))
    whole = [Event(seq, 1, seq / 8, body) for seq, body in enumerate(bodies, 1)]
    return whole[first - 1 :]


def state_of(count: int) -> PoolState:
    return reduce(apply, events(count), PoolState())


class NoSync(Disk):
    """A disk that syncs nothing: what a crash of the process alone would leave."""

    def __init__(self) -> None:
        self.syncs = 0

    def sync(self, fd: int) -> None:
        self.syncs += 1

    def sync_folder(self, folder: Path) -> None:
        self.syncs += 1


class FullDisk(NoSync):
    """Full whenever `full` says so: half of what is written arrives."""

    full = False
    full_at_sync = False
    stuck = False  # not even shorter can a file become

    def write(self, fd: int, data: bytes) -> None:
        if self.full:
            super().write(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        super().sync(fd)
        if self.full_at_sync:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, fd: int, size: int) -> None:
        if self.stuck:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(fd, size)


class GatedDisk(NoSync):
    """Its next write waits until the gate opens."""

    def __init__(self, gate) -> None:
        super().__init__()
        self.gate = gate

    def write(self, fd: int, data: bytes) -> None:
        self.gate.wait()
        super().write(fd, data)


class PowerCut(BaseException):
    pass


class DyingDisk(NoSync):
    """Does `steps` things and then no more; the last write arrives by half."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def _step(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def open(self, path: Path, *, append: bool) -> int:
        self._step()
        return super().open(path, append=append)

    def write(self, fd: int, data: bytes) -> None:
        if self.left == 0:
            super().write(fd, data[: len(data) // 2])
        self._step()
        super().write(fd, data)

    def overwrite(self, fd: int, data: bytes) -> None:
        if self.left == 0:
            super().overwrite(fd, data[: len(data) // 2])
        self._step()
        super().overwrite(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self._step()
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self._step()

    def sync_folder(self, folder: Path) -> None:
        self._step()

    def replace(self, old: Path, new: Path) -> None:
        self._step()
        super().replace(old, new)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)


def write(folder: Path, count: int, *, checkpoints: tuple[int, ...] = (), config=SMALL) -> None:
    """A log of `count` events, each in a write of its own."""
    store = Store(folder, config, NoSync())
    try:
        store.open(0.0)
        for event in events(count):
            store.append([event_line(event)], event.seq)
            if event.seq in checkpoints:
                store.checkpoint(event.seq, state_of(event.seq), 0.0)
    finally:
        store.close()


def recover(folder: Path, config=SMALL):
    store = Store(folder, config, NoSync())
    try:
        return store.open(0.0)
    finally:
        store.close()


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jsonl"))


def copied(folder: Path) -> Path:
    again = folder.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    for path in folder.iterdir():
        (again / path.name).write_bytes(path.read_bytes())
    return again
