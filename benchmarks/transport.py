"""Round trip from a client to the page and back, against Selenium's own way in the same browser.

Ours is a whole operation of a pool at level `low`: checks, choice of browser, data plane, page,
onnxruntime-web (an Identity graph) and back. The baseline sends the same numbers as JSON through
`execute_async_script` and gets them back without running any model, which favours it.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from actors.driver.session import attach
from benchmarks.report import Report, quantile, run
from pool import BrowserPool

SIZES = {"512 B": 128, "image": 1 * 3 * 224 * 224}  # float32 values
_ECHO = Path(__file__).with_name("models") / "echo.onnx"
_SCRIPT = "arguments[1](Array.from(Float32Array.from(arguments[0])));"
_WARM_UP = 50
_OURS_A_ROUND = 5  # ours is so much shorter
_SETTLE_SECONDS = 0.05


async def _measure(report: Report, quick: bool, console: Console) -> None:
    rounds = {"512 B": 30 if quick else 100, "image": 6 if quick else 20}
    rng = np.random.default_rng(0)
    async with BrowserPool({"chrome": 1}, level="low", backend="wasm") as pool:
        await pool.load("echo", _ECHO)
        launch = (await pool.state()).launches["chrome-0"]
        driver = await asyncio.to_thread(
            attach, launch.driver_url, launch.session_id, Path(launch.profile)
        )
        with Progress(console=console) as progress:
            for name, count in SIZES.items():
                array = rng.standard_normal(count, dtype=np.float32)
                plain = array.tolist()
                for _ in range(_WARM_UP):
                    await pool.run_with_recovery("echo", "inference", {"x": array})
                driver.execute_async_script(_SCRIPT, plain)
                ours, over, theirs = [], [], []
                task = progress.add_task(name, total=rounds[name])
                for _ in range(rounds[name]):
                    for _ in range(_OURS_A_ROUND):
                        began = time.perf_counter()
                        result = await pool.run_with_recovery("echo", "inference", {"x": array})
                        ours.append((time.perf_counter() - began) * 1e3)
                        if not np.array_equal(result.outputs["y"], array):
                            raise AssertionError("the page sent back other numbers")
                        over.append(ours[-1] - result.metrics["in_page_ms"])
                    theirs.append(await asyncio.to_thread(_theirs, driver, plain))
                    # What one side leaves to do (the browser's garbage) must not burden the other.
                    await asyncio.sleep(_SETTLE_SECONDS)
                    progress.advance(task)
                _add(report, name, ours, over, theirs)


def _theirs(driver: Any, numbers: list[float]) -> float:
    began = time.perf_counter()
    back = driver.execute_async_script(_SCRIPT, numbers)
    took = (time.perf_counter() - began) * 1e3
    if len(back) != len(numbers):
        raise AssertionError("Selenium sent back other numbers")
    return took


def _add(
    report: Report, name: str, ours: list[float], over: list[float], theirs: list[float]
) -> None:
    key = name.replace(" ", "_")
    mine, other = statistics.median(ours), statistics.median(theirs)
    faster = other / mine
    image = name == "image"
    report.add(
        f"{key}_round_trip_p50",
        mine,
        "ms",
        baseline=other,
        ratio=faster,
        goal="at least 75 times faster" if image else "",
        met=faster >= 75 if image else None,
    )
    report.add(f"{key}_round_trip_p95", quantile(ours, 0.95), "ms", baseline=quantile(theirs, 0.95))
    overhead = statistics.median(over)
    report.add(
        f"{key}_over_in_page_p50",
        overhead,
        "ms",
        goal="" if image else "at most 3 ms",
        met=None if image else overhead <= 3.0,
    )


def measure(report: Report, quick: bool, console: Console) -> None:
    asyncio.run(_measure(report, quick, console))


if __name__ == "__main__":
    sys.exit(run("transport", measure))
