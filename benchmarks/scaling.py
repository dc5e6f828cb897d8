"""From one browser to three under load and back, and what a browser costs in memory.

Eight callers ask without a pause until three browsers serve; then one caller asks twice a second
until one browser is left. Every answer is compared with native onnxruntime's, and none may be
missing. Memory is the resident set of the whole process tree, in which what processes share counts
for each of them.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.faults import Question, make_question
from benchmarks.report import Report, run
from pool import BrowserPool
from pool.models.bundled import ocr_detector_path, silero_vad_path
from recovery.control import ModelPhase, Phase

_CALLERS = 8
_MOST = 3
_PATIENCE_SECONDS = 180.0
_ENGINES = ("chrome", "firefox", "safari")
_SETTLE_SECONDS = 5.0  # a browser gives back what it needed to start


class _Load:
    """Callers of one pool; what they asked and got."""

    def __init__(self, pool: BrowserPool, question: Question) -> None:
        self._pool = pool
        self._question = question
        self.asked = 0
        self.answered = 0
        self.took: list[float] = []

    async def ask(self) -> None:
        self.asked += 1
        began = time.perf_counter()
        result = await self._pool.run_with_recovery("minilm", "embed", self._question.inputs)
        self._question.check(result.outputs["embedding"])
        self.answered += 1
        self.took.append((time.perf_counter() - began) * 1e3)

    async def keep_asking(self, pause: float, over: asyncio.Event) -> None:
        while not over.is_set():
            await self.ask()
            await asyncio.sleep(pause)


async def _until(pool: BrowserPool, count: int) -> float:
    """Seconds until so many browsers serve the model, and no more are running."""
    began = time.perf_counter()
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            records = (await pool.control()).browsers.values()
            running = [r for r in records if r.phase is not Phase.STOPPED]
            serving = [
                r
                for r in running
                if r.phase is Phase.READY and r.models.get("minilm") is ModelPhase.LOADED
            ]
            if len(serving) == len(running) == count:
                return time.perf_counter() - began
            await pool.changed(0.2)


async def _scale(report: Report, options: dict[str, Any], progress: Progress) -> None:
    question = await asyncio.to_thread(make_question)
    task = progress.add_task("scaling", total=3)
    async with BrowserPool(
        {"chrome": 1}, adaptive_scaling={"chrome": (1, _MOST)}, **options
    ) as pool:
        await pool.load("minilm", question.folder)
        load, over = _Load(pool, question), asyncio.Event()
        callers = [asyncio.create_task(load.keep_asking(0.0, over)) for _ in range(_CALLERS)]
        grown = await _until(pool, _MOST)
        progress.advance(task)
        before = load.answered
        await asyncio.sleep(_SETTLE_SECONDS)
        rate = (load.answered - before) / _SETTLE_SECONDS
        progress.advance(task)
        over.set()
        await asyncio.gather(*callers)
        over.clear()
        caller = asyncio.create_task(load.keep_asking(0.5, over))
        shrunk = await _until(pool, 1)
        over.set()
        await caller
        progress.advance(task)
    report.add(f"from_1_to_{_MOST}_browsers", grown, "s")
    report.add(f"from_{_MOST}_to_1_browser", shrunk, "s")
    report.add(f"operations_a_second_with_{_MOST}", rate, "/s")
    report.add("operation_p50", statistics.median(load.took), "ms")
    lost = load.asked - load.answered
    report.add("operations_asked", load.asked, "")
    report.add("operations_lost", lost, "", goal="none", met=lost == 0)


async def _memory(
    report: Report, options: dict[str, Any], models: dict[str, Path], progress: Progress
) -> None:
    task = progress.add_task("memory", total=len(_ENGINES) * (len(models) + 1))
    for engine in _ENGINES:
        async with BrowserPool({engine: 1}, **options) as pool:

            async def held(pool: BrowserPool = pool) -> float:
                await asyncio.sleep(_SETTLE_SECONDS)
                progress.advance(task)
                return sum((await pool.state()).memory_bytes.values()) / 2**20

            empty = await held()
            report.add(f"{engine}_empty", empty, "MiB")
            for name, path in models.items():
                await pool.load(name, path)
                report.add(f"{engine}_{name}_adds", await held() - empty, "MiB")
                await pool.unload(name)


async def _measure(report: Report, quick: bool, console: Console) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="tabpool-bench-") as folder,
        Progress(console=console) as progress,
    ):
        options = {"backend": "wasm", "state_dir": folder}
        await _scale(report, options, progress)
        question = make_question()
        models = {"minilm": question.folder}
        if not quick:
            models |= {"vad": Path(silero_vad_path()), "ocr": Path(ocr_detector_path())}
        await _memory(report, options, models, progress)


def measure(report: Report, quick: bool, console: Console) -> None:
    asyncio.run(_measure(report, quick, console))


if __name__ == "__main__":
    sys.exit(run("scaling", measure))
