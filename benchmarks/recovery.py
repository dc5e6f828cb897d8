"""From a fault that is made on purpose, in the middle of an operation, to the right answer.

Tab crash, browser kill and driver kill (SIGKILL each) are measured beside a plain Selenium script
that notices, relaunches, reloads and reruns. Both run the same model and inputs on the same
browser with the same launch arguments, and in each round the same fault hits a pool at `low`, the
script and a pool at `medium`, in turn. The time counts from the fault to an answer that equals
native onnxruntime's.

What a figure `LEVEL_BROWSER_FAULT_to_answer` counts besides: at `low` an operation survives no
death, and fails at once; the pool fills the slot again all the same, so the caller asks again and
gets the answer as soon as there is a browser (`asked_again`). A hang (SIGSTOP of the page's
processes) counts from its detection, `hang_seconds` after the fault. `network_kill` ends
Chromium's network process, which drops every socket of a page that lives on. `noticed` is from a
fault to the moment at which the worker (of a dead worker: the client) saw it, at both levels.
`private_network_adds_to_...` compares browsers with a network of their own and without, in turn.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from actors.browser.host import BrowserHost
from actors.browser.startup import host_settings
from actors.driver.arguments import PrivateNetwork
from actors.driver.binaries import find_binaries
from actors.driver.processes import BrowserProcesses
from actors.messages import HostConfig, LaunchOrder
from benchmarks.faults import ENGINES, FAULTS, Fault, Question, make_question, struck
from benchmarks.plain_selenium import PlainSelenium
from benchmarks.report import Report, quantile, run
from pool import BrowserPool
from recovery.kinds import BrowserType
from recovery.records import HostRef
from recovery.supervision import RestartLimit

_T = TypeVar("_T")
_Array = np.ndarray[Any, Any]
_HANG_SECONDS = 5.0  # of the pools here: far over what an operation takes on a busy machine
_LEVELS = ("low", "medium")
_ECHO = Path(__file__).with_name("models") / "echo.onnx"
_WARM_UP = 50


_COLD = (BrowserType.CHROME, "browser_kill", "medium")  # what the goal of a cold restart is about


@dataclass
class Cell:
    """What was measured of one fault on one browser and side, in milliseconds."""

    took: list[float] = field(default_factory=list)
    noticed: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)


async def _ours(
    pool: BrowserPool, level: str, kind: BrowserType, fault: Fault, question: Question, cell: Cell
) -> None:
    def ask() -> Any:
        return pool.run_with_recovery("minilm", "embed", question.inputs)

    (await ask()).outputs  # noqa: B018 - raises if it failed: settled, as the other side is
    launch = (await pool.state()).launches[f"{kind}-0"]
    target = BrowserProcesses(kind, launch.pids, launch.pids["reaper"])
    result, wall, at = await struck(ask(), fault, target)
    failure = result.original_error
    if failure is None:
        raise AssertionError(f"{fault.name} came too late to matter")
    if not result.success:
        if level != "low" or "level low" not in result.error:
            raise AssertionError(f"{fault.name} at {level}: {result.error}")
        result = await ask()
    took = (time.perf_counter() - at) * 1e3
    question.check(result.outputs["embedding"])
    noticed = (failure.at - wall) * 1e3
    cell.took.append(took - noticed if fault.from_notice else took)
    cell.noticed.append(noticed)
    relaunch = (await pool.state()).launches[f"{kind}-0"]
    cell.parts.append(
        {
            "notice": noticed,
            **{f"launch_{name}": seconds * 1e3 for name, seconds in relaunch.seconds.items()},
            "rerun_in_page": result.metrics["in_page_ms"],
        }
    )


async def _theirs(
    plain: PlainSelenium, kind: BrowserType, fault: Fault, question: Question, cell: Cell
) -> None:
    def ask() -> Awaitable[_Array]:
        return asyncio.to_thread(plain.embed, question.inputs)

    await ask()
    before = plain.relaunches
    target = BrowserProcesses(kind, plain.pids, plain.pids["driver"])
    answer, _, at = await struck(ask(), fault, target)
    cell.took.append((time.perf_counter() - at) * 1e3)
    question.check(answer)
    if plain.relaunches != before + 1:
        raise AssertionError(f"{fault.name}: the script relaunched {plain.relaunches - before}x")


def _rounds(kind: BrowserType, fault: Fault, quick: bool) -> int:
    return 2 if quick else 7 if (kind, fault.name) == _COLD[:2] else 3


async def _faults(
    report: Report, quick: bool, kind: BrowserType, options: dict[str, Any], progress: Progress
) -> None:
    question = make_question()
    faults = [fault for fault in FAULTS if kind in fault.engines]
    total = sum(_rounds(kind, fault, quick) for fault in faults)
    task = progress.add_task(str(kind), total=total)
    # So many restarts of one browser in so short a time are this benchmark's purpose.
    options = {**options, "restart_limit": RestartLimit(restarts_max=1000)}
    async with AsyncExitStack() as stack:
        pools = {}
        for level in _LEVELS:
            pool = BrowserPool({str(kind): 1}, level=level, hang_seconds=_HANG_SECONDS, **options)
            pools[level] = await stack.enter_async_context(pool)
            await pool.load("minilm", question.folder)
        settings = host_settings(kind, HostConfig())
        plain = PlainSelenium(settings, find_binaries(kind), question.model)
        await asyncio.to_thread(stack.enter_context, plain)
        for fault in faults:
            cells = {side: Cell() for side in ("low", "plain", "medium")}
            for _ in range(_rounds(kind, fault, quick)):
                for side, cell in cells.items():
                    if side != "plain":
                        await _ours(pools[side], side, kind, fault, question, cell)
                    elif fault.plain:
                        await _theirs(plain, kind, fault, question, cell)
                progress.advance(task)
            _report_fault(report, kind, fault, cells)


def _report_fault(
    report: Report, kind: BrowserType, fault: Fault, cells: Mapping[str, Cell]
) -> None:
    theirs = cells["plain"].took
    for level in _LEVELS:
        ours = cells[level].took
        again = "_asked_again" if level == "low" and fault.name != "network_kill" else ""
        since = "_detected" if fault.from_notice else ""
        key = f"{level}_{kind}_{fault.name}{since}{again}_to_answer"
        middle = statistics.median(ours)
        cold = (kind, fault.name, level) == _COLD
        ratio = middle / statistics.median(theirs) if theirs else None
        report.add(
            f"{key}_p50",
            middle,
            "ms",
            baseline=statistics.median(theirs) if theirs else None,
            ratio=ratio,
            goal="at most 0.8 of the plain script" if cold else "",
            met=ratio is not None and ratio <= 0.8 if cold else None,
        )
        worst = quantile(theirs, 0.95) if theirs else None
        report.add(f"{key}_p95", quantile(ours, 0.95), "ms", baseline=worst)
        if cold:
            parts = cells[level].parts
            for name in parts[0]:
                report.add(f"of_it_{name}_p50", statistics.median(p[name] for p in parts), "ms")
    noticed = statistics.median([*cells["low"].noticed, *cells["medium"].noticed])
    report.add(
        f"{kind}_{fault.name}_noticed_p50",
        noticed,
        "ms",
        goal="at most 20 ms" if fault.notice_goal else "",
        met=noticed <= 20 if fault.notice_goal else None,
    )


async def _normal_path(
    report: Report, quick: bool, options: dict[str, Any], progress: Progress
) -> None:
    """What a level, and the recording of samples, add to a small operation that nothing hits."""
    sides: dict[str, dict[str, Any]] = {
        "low": {"level": "low"},
        "medium": {"level": "medium"},
        "unrecorded": {"level": "medium", "history": False},
        "twin": {"level": "medium"},  # as "medium": what two equal pools differ by is noise
        "shared": {"level": "low", "private_network": "off"},
    }
    rounds = 200 if quick else 1000
    x = np.random.default_rng(0).standard_normal(128, dtype=np.float32)
    took: dict[str, list[float]] = {side: [] for side in sides}
    order, rng = list(sides), random.Random(0)
    task = progress.add_task("nothing happens", total=rounds)
    async with AsyncExitStack() as stack:
        pools = {}
        for side, own in sides.items():
            pool = BrowserPool({"chrome": 1}, **options, **own)
            pools[side] = await stack.enter_async_context(pool)
            await pool.load("echo", _ECHO)
            for _ in range(_WARM_UP):
                await pool.run_with_recovery("echo", "inference", {"x": x})
        for _ in range(rounds):
            rng.shuffle(order)
            for side in order:
                began = time.perf_counter()
                result = await pools[side].run_with_recovery("echo", "inference", {"x": x})
                took[side].append((time.perf_counter() - began) * 1e3)
                if not np.array_equal(result.outputs["y"], x):
                    raise AssertionError("the page sent back other numbers")
            progress.advance(task)
    low, medium, unrecorded, twin, shared = (statistics.median(took[side]) for side in sides)
    report.add(
        "medium_adds_to_an_operation_p50",
        medium - low,
        "ms",
        baseline=low,
        goal="at most 1 ms over low",
        met=medium - low <= 1,
    )
    cost = ((medium + twin) / 2 / unrecorded - 1) * 100
    report.add(
        "recording_adds_to_an_operation_p50",
        cost,
        "%",
        baseline=unrecorded,
        goal="less than 1 %",
        met=cost < 1,
    )
    report.add("noise_of_that", abs(medium / twin - 1) * 100, "%")
    report.add("private_network_adds_to_an_operation_p50", low - shared, "ms", baseline=shared)


async def _launches(report: Report, quick: bool, progress: Progress) -> None:
    """What a private network adds to a launch: the same browser with and without, in turn."""
    rounds = 3 if quick else 11
    choices = (PrivateNetwork.REQUIRED, PrivateNetwork.OFF)
    task = progress.add_task("launches", total=rounds * len(ENGINES))
    for kind in ENGINES:
        took: dict[PrivateNetwork, list[float]] = {choice: [] for choice in choices}
        for _ in range(rounds):
            for choice in choices:
                took[choice].append(await _launch_ms(kind, choice))
            progress.advance(task)
        private, shared = (statistics.median(took[choice]) for choice in choices)
        report.add(
            f"private_network_adds_to_a_launch_of_{kind}_p50",
            private - shared,
            "ms",
            baseline=shared,
            ratio=private / shared,
            goal="at most 50 ms",
            met=private - shared <= 50,
        )


async def _launch_ms(kind: BrowserType, choice: PrivateNetwork) -> float:
    config = HostConfig(lease_seconds=600.0, private_network=choice)
    host = BrowserHost(f"{kind}-0", kind, config, lambda: None)
    try:
        began = time.perf_counter()
        await host.launch(LaunchOrder(HostRef(f"{kind}-0", 0), term=1))
        return (time.perf_counter() - began) * 1e3
    finally:
        await host.stop()


async def _measure(report: Report, quick: bool, console: Console) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="tabpool-bench-") as folder,
        Progress(console=console) as progress,
    ):
        options = {"backend": "wasm", "state_dir": folder}
        for kind in ENGINES:
            await _faults(report, quick, kind, options, progress)
        await _launches(report, quick, progress)
        await _normal_path(report, quick, options, progress)


def measure(report: Report, quick: bool, console: Console) -> None:
    asyncio.run(_measure(report, quick, console))


if __name__ == "__main__":
    sys.exit(run("recovery", measure))
