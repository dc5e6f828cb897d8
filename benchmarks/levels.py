"""Every level of fault tolerance under every kind of fault: survived or not, and how long it took.

Each level runs on the browsers it needs: `none`, `low` and `medium` on one Chromium, `high` on
Chromium and Firefox, `critical` on Chromium, Firefox and WebKitGTK. In the middle of an operation a
fault hits one browser that is at it: tab crash, browser kill, driver kill (SIGKILL each), hang
(SIGSTOP of the page's processes, `hang_seconds` is 5) and a wrong answer (the top exponent bit
of one number flipped in the page). `to_answer` counts from the fault to the caller's answer,
`beyond_in_page` what of it is not the model's own run in the page that answered. A wrong answer
that was not noticed is not survived. The baseline is a plain Selenium script that relaunches.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from actors.browser.startup import host_settings
from actors.driver.binaries import find_binaries
from actors.driver.processes import BrowserProcesses
from actors.faults import wrong_answers
from actors.messages import HostConfig
from benchmarks.faults import FAULTS, Fault, Question, make_question, struck
from benchmarks.plain_selenium import PlainSelenium
from benchmarks.report import Report, quantile, run
from pool import BrowserPool
from pool.results import Result
from recovery.control import ModelPhase, Phase
from recovery.errors import BadInput, BrowserError
from recovery.kinds import BrowserType, Level
from recovery.supervision import RestartLimit

_BROWSERS: Mapping[str, Mapping[str, int]] = {
    "none": {"chrome": 1},
    "low": {"chrome": 1},
    "medium": {"chrome": 1},
    "high": {"chrome": 1, "firefox": 1},
    "critical": {"chrome": 1, "firefox": 1, "safari": 1},
}
_HANG_SECONDS = 5.0
_WRONG = Fault("wrong_answer", lambda target: [])
_KINDS = (*(f for f in FAULTS if f.name in ("tab_crash", "browser_kill", "driver_kill")),)
_HANG = next(fault for fault in FAULTS if fault.name == "hang")
_NORMAL_ROUNDS = 30


@dataclass
class _Cell:
    """What came of one fault at one level; times in milliseconds."""

    survived: int = 0
    failed: int = 0
    wrong: int = 0
    to_answer: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.survived + self.failed + self.wrong


async def _settled(pool: BrowserPool, browsers: int) -> None:
    """So many browsers serve the model again."""
    async with asyncio.timeout(60):
        while True:
            records = (await pool.control()).browsers.values()
            serving = [
                record
                for record in records
                if record.phase is Phase.READY and record.models.get("minilm") is ModelPhase.LOADED
            ]
            known = [host for host in pool.hosts() if host.can_take("minilm")]
            whole = len(serving) >= browsers and len(known) >= browsers
            if whole and all(record.repair is None for record in records):
                return
            await pool.changed(0.2)


async def _busy(pool: BrowserPool) -> str:
    """The browser that has the operation which is under way; Chromium if several have."""
    while True:
        at_it = [host.ref.browser_id for host in pool.hosts() if host.queue]
        if at_it:
            return min(at_it, key=lambda name: (not name.startswith("chrome"), name))
        await asyncio.sleep(0.001)


async def _strike(
    pool: BrowserPool, level: str, fault: Fault, question: Question, cell: _Cell
) -> None:
    count = sum(_BROWSERS[level].values())
    await _settled(pool, count)
    launches = (await pool.state()).launches
    targets = {
        name: BrowserProcesses(BrowserType(name.split("-")[0]), report.pids, report.pids["reaper"])
        for name, report in launches.items()
        if name in {host.ref.browser_id for host in pool.hosts() if host.can_take("minilm")}
    }
    pids = {name: list(fault.find(target)) for name, target in targets.items()}
    if fault is _WRONG:
        await _make_one_lie(pool)
    running = asyncio.create_task(pool.run_with_recovery("minilm", "embed", question.inputs))
    target = await _busy(pool)
    await asyncio.sleep(0.1)
    at = time.perf_counter()
    for pid in pids[target]:
        _signal(pid, fault.signal)
    try:
        result = await running
        took = (time.perf_counter() - at) * 1e3
    finally:
        if fault.signal is signal.SIGSTOP:
            for pid in pids[target]:
                _signal(pid, signal.SIGCONT)
    _judge(cell, result, question, took)


async def _make_one_lie(pool: BrowserPool) -> None:
    """One that serves; one whose last lie is only now being compared may be gone in a moment."""
    while True:
        able = sorted(host.ref.browser_id for host in pool.hosts() if host.can_take("minilm"))
        with contextlib.suppress(BrowserError, BadInput):
            await pool.inject(random.choice(able), wrong_answers(1))
            return
        await pool.changed(0.2)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _judge(cell: _Cell, result: Result, question: Question, took: float) -> None:
    if not result.success:
        cell.failed += 1
        return
    try:
        question.check(result.outputs["embedding"])
    except AssertionError:
        cell.wrong += 1
        return
    cell.survived += 1
    cell.to_answer.append(took)
    cell.beyond.append(took - result.metrics["in_page_ms"])


async def _normal(pool: BrowserPool, question: Question) -> list[float]:
    took = []
    for _ in range(_NORMAL_ROUNDS):
        began = time.perf_counter()
        result = await pool.run_with_recovery("minilm", "embed", question.inputs)
        took.append((time.perf_counter() - began) * 1e3)
        question.check(result.outputs["embedding"])
    return took


async def _level(
    report: Report,
    quick: bool,
    level: str,
    question: Question,
    options: dict[str, Any],
    progress: Progress,
) -> None:
    rounds = 4 if quick else 10
    faults: Sequence[Fault] = (*_KINDS, _HANG, _WRONG)
    task = progress.add_task(level, total=rounds * len(faults))
    async with BrowserPool(_BROWSERS[level], level=level, **options) as pool:
        await pool.load("minilm", question.folder)
        normal = await _normal(pool, question)
        middle = statistics.median(normal)
        held = sum((await pool.state()).memory_bytes.values())
        report.add(f"{level}_browsers", sum(_BROWSERS[level].values()), "")
        report.add(f"{level}_memory", held / 2**20, "MiB")
        report.add(f"{level}_no_fault_p50", middle, "ms")
        report.add(f"{level}_no_fault_p95", quantile(normal, 0.95), "ms")
        for fault in faults:
            cell = _Cell()
            for _ in range(rounds):
                await _strike(pool, level, fault, question, cell)
                progress.advance(task)
            _report(report, level, fault, cell, middle)


def _report(report: Report, level: str, fault: Fault, cell: _Cell, normal: float) -> None:
    key = f"{level}_{fault.name}"
    outvoted = level == "critical" and fault is _WRONG
    rate = 100 * cell.survived / cell.count
    report.add(
        f"{key}_survived",
        rate,
        "%",
        goal="all of them" if outvoted else "",
        met=cell.wrong == 0 and rate == 100 if outvoted else None,
    )
    if cell.wrong:
        report.add(f"{key}_wrong_and_unseen", 100 * cell.wrong / cell.count, "%")
    if not cell.to_answer:
        return
    middle, beyond = statistics.median(cell.to_answer), statistics.median(cell.beyond)
    goal, met = "", None
    if level == "critical" and fault is not _WRONG:
        goal, met = "at most twice the fault-free median", middle <= 2 * normal
    report.add(f"{key}_to_answer_p50", middle, "ms", baseline=normal, goal=goal, met=met)
    report.add(f"{key}_to_answer_p95", quantile(cell.to_answer, 0.95), "ms")
    death = level == "high" and fault.notice_goal
    report.add(
        f"{key}_beyond_in_page_p50",
        beyond,
        "ms",
        goal="at most 150 ms" if death else "",
        met=beyond <= 150 if death else None,
    )


async def _plain(report: Report, quick: bool, question: Question, progress: Progress) -> None:
    kind = BrowserType.CHROME
    rounds = 4 if quick else 10
    task = progress.add_task("plain script", total=rounds * len(_KINDS))

    def ask() -> Any:
        return asyncio.to_thread(plain.embed, question.inputs)

    plain = PlainSelenium(host_settings(kind, HostConfig()), find_binaries(kind), question.model)
    await asyncio.to_thread(plain.__enter__)
    try:
        for fault in _KINDS:
            took = []
            for _ in range(rounds):
                await ask()
                target = BrowserProcesses(kind, plain.pids, plain.pids["driver"])
                answer, _, at = await struck(ask(), fault, target)
                took.append((time.perf_counter() - at) * 1e3)
                question.check(np.asarray(answer))
                progress.advance(task)
            report.add(f"plain_{fault.name}_to_answer_p50", statistics.median(took), "ms")
    finally:
        await asyncio.to_thread(plain.__exit__, None, None, None)


async def _measure(report: Report, quick: bool, console: Console) -> None:
    question = await asyncio.to_thread(make_question)
    with (
        tempfile.TemporaryDirectory(prefix="tabpool-bench-") as folder,
        Progress(console=console) as progress,
    ):
        options = {
            "backend": "wasm",
            "state_dir": folder,
            "hang_seconds": _HANG_SECONDS,
            "faults": True,
            "restart_limit": RestartLimit(restarts_max=1000),
        }
        await _plain(report, quick, question, progress)
        for level in Level:
            await _level(report, quick, str(level), question, options, progress)


def measure(report: Report, quick: bool, console: Console) -> None:
    asyncio.run(_measure(report, quick, console))


if __name__ == "__main__":
    sys.exit(run("levels", measure))
