"""Durable appends a second, against SQLite, and the time to replay a long log.

Ours is a whole append: the event is encoded, queued, written, synced, and its number marked and
synced too. The baseline is the usual way to make one row durable: SQLite with a WAL and
synchronous=FULL, one row a commit, in the same folder; the row holds the same line.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.report import Report, run
from recovery.control import (
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserWanted,
    Event,
    ModelLoaded,
    ModelWanted,
    PoolOpened,
)
from recovery.failures import Category, Failure, Scope, Severity
from recovery.kinds import Backend, BrowserType, Level
from recovery.log.log import Disk, Log, LogConfig
from recovery.log.segments import event_line
from recovery.plan import STRATEGIES
from recovery.records import BrowserFacts, HostRef, NumericId
from recovery.supervision import RestartLimit

_REPLAYED = 100_000
_BROWSERS = 8
_MODELS = 2
_WRITERS = 64


def story() -> Iterator[Event]:
    """A pool whose browsers die in turn, for ever."""
    facts = BrowserFacts("Chrome", "156.0", threads=8, user_agent="Mozilla/5.0 (X11; Linux x86_64)")
    numeric = NumericId("1.30.0", Backend.WASM, 8)

    def bodies() -> Iterator[Body]:
        limit = RestartLimit(restarts_max=10**9, period_seconds=60.0)
        yield PoolOpened("bench", Level.MEDIUM, STRATEGIES["progressive"], limit, 1)
        for model in range(_MODELS):
            yield ModelWanted(f"model-{model}", "0" * 64)
        for browser in range(_BROWSERS):
            yield BrowserWanted(f"chrome-{browser}", BrowserType.CHROME)
        epoch = 0
        while True:
            for browser in range(_BROWSERS):
                name = f"chrome-{browser}"
                yield BrowserReady(name, epoch, facts)
                for model in range(_MODELS):
                    yield ModelLoaded(name, epoch, f"model-{model}", numeric)
                yield BrowserFailed(
                    name,
                    epoch,
                    Failure(
                        Category.CRASH,
                        Severity.SEVERE,
                        Scope.BROWSER,
                        "the browser ended with exit status -9",
                        HostRef(name, epoch, "node", "127.0.0.1:4000"),
                        evidence={"what": "browser_exited", "status": -9},
                    ),
                )
            epoch += 1

    for seq, body in enumerate(bodies(), 1):
        yield Event(seq, 1, 1_700_000_000 + seq * 7.5, body)


async def _ours(log: Log, story: Iterator[Event], writers: int, count: int) -> float:
    """Durable appends a second of `writers` at once, `count` in all."""
    events = iter(list(islice(story, count)))

    async def write() -> None:
        for event in events:
            await log.append(event)

    began = time.perf_counter()
    await asyncio.gather(*(write() for _ in range(writers)))
    return count / (time.perf_counter() - began)


def _theirs(database: sqlite3.Connection, events: Iterator[Event], count: int) -> float:
    """One-row commits a second."""
    rows = [(event.seq, event_line(event)) for event in islice(events, count)]
    began = time.perf_counter()
    for row in rows:
        database.execute("insert into events values (?, ?)", row)
    return count / (time.perf_counter() - began)


def _fsyncs(folder: Path, count: int) -> float:
    """Appends of one line, synced one by one, a second: what the disk can do."""
    line = event_line(next(story()))
    disk = Disk()
    with (folder / "bare").open("ab", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(count):
            file.write(line)
            disk.sync(file.fileno())
        return count / (time.perf_counter() - began)


async def _appends(report: Report, folder: Path, quick: bool, progress: Progress) -> None:
    rounds = 5 if quick else 20
    database = sqlite3.connect(folder / "baseline.sqlite", isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=full")
    database.execute("create table events (seq integer primary key, line blob)")
    log = Log(folder / "appends")
    await log.open()
    mine, their_events = story(), story()
    one: list[float] = []
    many: list[float] = []
    theirs: list[float] = []
    bare: list[float] = []
    await _ours(log, mine, _WRITERS, 1000)
    _theirs(database, their_events, 200)
    task = progress.add_task("appends", total=rounds)
    for _ in range(rounds):
        one.append(await _ours(log, mine, 1, 200))
        theirs.append(_theirs(database, their_events, 200))
        many.append(await _ours(log, mine, _WRITERS, _WRITERS * 50))
        bare.append(_fsyncs(folder, 200))
        progress.advance(task)
    await log.close()
    database.close()
    single, group = statistics.median(one), statistics.median(many)
    baseline = statistics.median(theirs)
    faster = statistics.median(m / t for m, t in zip(many, theirs, strict=True))
    report.add(
        f"appends_{_WRITERS}_writers",
        group,
        "/s",
        baseline=baseline,
        ratio=faster,
        goal="at least 10 times SQLite's commits",
        met=faster >= 10,
    )
    report.add(
        "appends_1_writer",
        single,
        "/s",
        baseline=baseline,
        ratio=statistics.median(m / t for m, t in zip(one, theirs, strict=True)),
    )
    report.add("bare_write_and_fdatasync", statistics.median(bare), "/s")


async def _replay(report: Report, folder: Path, quick: bool, progress: Progress) -> None:
    rounds = 3 if quick else 7
    task = progress.add_task("replay", total=rounds)
    config = LogConfig(queue_max=_REPLAYED, batch_max=_REPLAYED)
    log = Log(folder / "replay", config)
    await log.open()
    events = story()
    await asyncio.gather(*(log.append(event) for event in islice(events, _REPLAYED)))
    await log.close()
    size = sum(path.stat().st_size for path in (folder / "replay").glob("*.jsonl"))
    took = []
    for _ in range(rounds):
        gc.collect()
        log = Log(folder / "replay", config)
        began = time.perf_counter()
        recovery = await log.open()
        took.append(time.perf_counter() - began)
        await log.close()
        if (recovery.replayed, recovery.lost) != (_REPLAYED, ()):
            raise AssertionError(f"not all was replayed: {recovery}")
        progress.advance(task)
    middle = statistics.median(took)
    report.add("replay_100000_events", middle, "s", goal="under 2 s", met=middle < 2)
    report.add("replay_100000_events_slowest", max(took), "s")
    report.add("bytes_an_event", size / _REPLAYED, "B")


async def _measure(report: Report, quick: bool, console: Console) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="tabpool-bench-") as name,
        Progress(console=console) as progress,
    ):
        await _appends(report, Path(name), quick, progress)
        await _replay(report, Path(name), quick, progress)


def measure(report: Report, quick: bool, console: Console) -> None:
    asyncio.run(_measure(report, quick, console))


if __name__ == "__main__":
    sys.exit(run("log", measure))
