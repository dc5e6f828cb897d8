"""What each level of fault tolerance promises, on real browsers: that it holds, or says so."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.driver.processes import page_processes
from actors.faults import crash_tab, kill_process, wrong_answers
from actors.messages import LaunchReport
from pool import BrowserPool, Result
from pool.models.bundled import silero_vad_path
from recovery.breaker import BreakerConfig
from recovery.errors import LevelUnavailable
from recovery.failures import Category
from recovery.kinds import Backend, BrowserType, Level, Readiness
from sharding.models.native import NativeSession
from tests.browser.conftest import FRAME, eventually, pool_of, repaired, repairs_of, settled

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.chaos]
MIXED = {"chrome": 1, "firefox": 1, "safari": 1}
ATOL = 1e-5  # WASM against native kernels, float32: measured 1e-7


@pytest.fixture(scope="module")
def right() -> np.ndarray[Any, Any]:
    native = NativeSession(silero_vad_path())
    native.open()
    return native.run(FRAME)["output"]


async def known(pool: BrowserPool, count: int) -> None:
    """The client itself knows of so many that can be asked: it hears a little later."""
    while sum(host.can_take("vad") for host in pool.hosts()) != count:
        await pool.changed(0.05)


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """These processes stand still meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def pages_of(launch: LaunchReport, kind: BrowserType) -> list[int]:
    tree = psutil.Process(launch.pids["reaper"]).children
    return page_processes(lambda: tree(recursive=True), kind)


async def test_critical_outvotes_wrong_answers_and_survives_deaths_and_hangs(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of(MIXED, tmp_path, FRAME, level="critical", faults=True) as pool:

        async def ask() -> Result:
            began = time.monotonic()
            result = await pool.run_with_recovery("vad", "inference", FRAME)
            assert time.monotonic() - began < 3.0  # nobody waits for a restart, or the hang limit
            np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)
            assert result.metrics["votes"] >= 2
            return result

        launches = (await pool.state()).launches
        with stopped(pages_of(launches["chrome-0"], BrowserType.CHROME)):
            await ask()
        kill_process(launches["firefox-0"], "browser")
        await ask()
        await repaired(pool, "firefox-0")  # before that nobody may have noticed
        await settled(pool, 3, 60.0)
        await known(pool, 3)
        for faulty, bit in (("chrome-0", 30), ("firefox-0", 0)):
            before = await repairs_of(pool)
            await pool.inject(faulty, wrong_answers(1000, bit=bit))
            for _ in range(5):
                assert (await ask()).browser_id != faulty
            repair = await repaired(pool, faulty, before)
            await settled(pool, 3, 60.0)
            await known(pool, 3)
            assert repair.failure.category is Category.WRONG_ANSWER
            assert repair.ready is not None
        await known(pool, 3)
        assert (await ask()).level_effective is Level.CRITICAL


async def test_high_moves_on_at_once_when_a_browser_dies_or_hangs(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    # So many deaths in a row would open its circuit, and have another kind take its place.
    options = {"level": "high", "breaker": BreakerConfig(failure_threshold=100)}
    async with pool_of({"chrome": 1, "firefox": 1}, tmp_path, FRAME, **options) as pool:

        async def ask() -> Result:
            result = await pool.run_with_recovery("vad", "inference", FRAME)
            np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)
            assert result.metrics["duration_ms"] < 1500  # a restart alone takes longer
            return result

        async def epoch() -> int:
            return (await pool.control()).browsers["chrome-0"].epoch

        for fault in ("tab", "browser", "driver", "worker"):
            earlier = await repairs_of(pool)
            launch, before = (await pool.state()).launches["chrome-0"], await epoch()
            asked = [asyncio.create_task(ask()) for _ in range(8)]
            await asyncio.sleep(0)
            if fault == "tab":
                crash_tab(launch, BrowserType.CHROME)
            else:
                kill_process(launch, fault)
            await asyncio.gather(*asked)
            await known(pool, 1)  # all may have been answered before the death was noticed
            result = await ask()
            assert result.browser_id == "firefox-0"
            assert result.level_effective is Level.MEDIUM  # there is nothing left to lose
            await repaired(pool, "chrome-0", earlier)

            async def restarted(before: int = before) -> bool:
                return await epoch() > before

            await eventually(restarted, 60.0)
            await settled(pool, 2, 60.0)
            await known(pool, 2)
            assert (await ask()).level_effective is Level.HIGH
        for _ in range(25):  # what is late is known from here on
            await ask()
        launch = (await pool.state()).launches["chrome-0"]
        with stopped(pages_of(launch, BrowserType.CHROME)):
            results = [await ask()]
            while not any(step.what == "hedged" for step in results[-1].recovery):
                results.append(await ask())  # of two that have nothing to do, any is asked first
            results += [await ask() for _ in range(4)]
        assert {result.browser_id for result in results} == {"firefox-0"}
        assert all(result.metrics["duration_ms"] < 500 for result in results)


async def test_medium_does_not_see_a_wrong_answer_a_probe_does_and_simulation_says_so(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    options = {"faults": True, "probe_seconds": 2.0, "simulation": True}
    async with pool_of({"chrome": 1}, tmp_path, FRAME, **options) as pool:
        # It has just been used, so that no probe can come before the next operation.
        await pool.run_with_recovery("vad", "inference", FRAME)
        await pool.inject("chrome-0", wrong_answers(1000))
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        assert result.success
        assert not np.allclose(result.outputs["output"], right, atol=ATOL)  # docs/levels.md
        repair = await repaired(pool, "chrome-0")
        assert repair.failure.category is Category.WRONG_ANSWER
        assert "known-answer probe" in repair.failure.message

        struck: list[tuple[str, Counter[str]]] = []

        async def ask_while_it_dies(**more: Any) -> Result:
            await settled(pool, 1, 60.0)
            (host,) = [h for h in pool.hosts() if h.readiness is Readiness.READY]
            struck.append((host.ref.browser_id, await repairs_of(pool)))
            kind = host.browser or BrowserType.CHROME
            launch = (await pool.state()).launches[host.ref.browser_id]
            with stopped(pages_of(launch, kind)):  # so that it can't answer before
                operation = pool.run_with_recovery("vad", "inference", FRAME, level="low", **more)
                asked = asyncio.create_task(operation)
                await asyncio.sleep(0.05)
                crash_tab(launch, kind)
                return await asked

        result = await ask_while_it_dies()
        assert result.success
        assert result.simulated
        assert (result.backend, result.browser_type) == (Backend.NATIVE, None)
        np.testing.assert_array_equal(result.outputs["output"], right)
        assert (await pool.state()).operations["simulated"] == 1
        await repaired(pool, *struck[0])

        result = await ask_while_it_dies(simulation=False)
        assert not result.success
        assert not result.simulated


async def test_level_that_browsers_can_not_hold_is_refused_before_any_is_started() -> None:
    began = time.monotonic()
    with pytest.raises(LevelUnavailable, match="at least 3 browsers"):
        BrowserPool({"chrome": 2}, level="critical")
    assert time.monotonic() - began < 1.0
