"""What each level of fault tolerance promises, on real browsers: that it holds, or says so."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.faults import crash_tab, kill_process, wrong_answers
from actors.messages import LaunchReport
from actors.processes import page_processes
from pool import BrowserPool
from pool.demo_models import silero_vad_path
from recovery.errors import LevelUnavailable
from recovery.failures import Category
from recovery.kinds import Backend, BrowserType, Level
from recovery.pool_state import ModelPhase, Phase
from recovery.supervision import RestartLimit
from sharding.native import NativeSession
from tests.browser.conftest import eventually, require

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.chaos]
MIXED = {"chrome": 1, "firefox": 1, "safari": 1}
LIMIT = RestartLimit(restarts_max=100)
FRAME = {
    "input": np.random.default_rng(5).standard_normal((1, 512), dtype=np.float32),
    "state": np.zeros((2, 1, 128), np.float32),
    "sr": np.array(16000, np.int64),
}
ATOL = 1e-5  # WASM against native kernels, float32: measured 1e-7


@pytest.fixture(scope="module")
def right() -> np.ndarray[Any, Any]:
    native = NativeSession(silero_vad_path())
    native.open()
    return native.run(FRAME)["output"]


@asynccontextmanager
async def pool_of(
    browsers: dict[str, int], tmp_path: Path, **options: Any
) -> AsyncIterator[BrowserPool]:
    for kind in browsers:
        require(BrowserType(kind))
    settings = {"backend": "wasm", "restart_limit": LIMIT, "state_dir": str(tmp_path), **options}
    async with BrowserPool(browsers, **settings) as pool:
        await pool.load("vad", silero_vad_path(), example=FRAME)
        yield pool


async def settled(pool: BrowserPool, count: int) -> None:
    """So many browsers serve the model, and nothing is being repaired."""

    async def holds() -> bool:
        records = (await pool.control()).browsers.values()
        serving = [
            r
            for r in records
            if r.phase is Phase.READY and r.models.get("vad") is ModelPhase.LOADED
        ]
        return len(serving) >= count and all(r.repair is None for r in records)

    await eventually(holds, 60.0)


def pages_of(launch: LaunchReport, kind: BrowserType) -> list[int]:
    tree = psutil.Process(launch.pids["warden"]).children
    return page_processes(lambda: tree(recursive=True), kind)


async def test_wrong_answers_of_any_browser_are_outvoted_and_it_is_replaced(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of(MIXED, tmp_path, level="critical", faults=True) as pool:
        for number, (liar, bit) in enumerate([("chrome-0", 30), ("firefox-0", 0)]):
            await pool.inject(liar, wrong_answers(1000, bit=bit))
            for op in range(5):
                result = await pool.run_with_recovery("vad", "inference", FRAME)
                np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)
                assert result.browser_id != liar
                assert result.metrics["votes"] >= 2, op

            async def replaced(count: int = number + 1) -> bool:
                return len((await pool.control()).repairs) >= count

            await eventually(replaced, 60.0)
            await settled(pool, 3)
            repair = (await pool.control()).repairs[-1]
            assert repair.browser_id == liar
            assert repair.failure.category is Category.WRONG_ANSWER
            assert repair.ready is not None
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        assert result.level_effective is Level.CRITICAL
        assert pool._counts["failed"] == 0


async def test_critical_survives_death_and_hang_without_a_wait(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of(MIXED, tmp_path, level="critical") as pool:
        launches = (await pool.state()).launches
        stopped = pages_of(launches["chrome-0"], BrowserType.CHROME)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            result = await pool.run_with_recovery("vad", "inference", FRAME)
            assert time.monotonic() - began < 3.0  # and not the hang limit of 30 s
            np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        kill_process(launches["firefox-0"], "browser")
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)
        await settled(pool, 3)


@pytest.mark.parametrize("fault", ["tab", "browser", "driver", "worker"])
async def test_high_moves_on_at_once_when_a_browser_dies(
    fault: str, tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of({"chrome": 1, "firefox": 1}, tmp_path, level="high") as pool:
        launches = (await pool.state()).launches
        asked = [
            asyncio.create_task(pool.run_with_recovery("vad", "inference", FRAME)) for _ in range(8)
        ]
        await asyncio.sleep(0)
        if fault == "tab":
            crash_tab(launches["chrome-0"], BrowserType.CHROME)
        else:
            kill_process(launches["chrome-0"], fault)
        for result in await asyncio.gather(*asked):
            np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)
            assert result.metrics["duration_ms"] < 1500  # a restart alone takes longer
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        assert result.browser_id == "firefox-0"
        assert result.level_effective is Level.MEDIUM  # there is nothing left to lose
        await settled(pool, 2)
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        assert result.level_effective is Level.HIGH


async def test_hang_at_high_costs_the_hedging_delay_and_no_more(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of({"chrome": 2}, tmp_path, level="high", hedge_seconds=0.3) as pool:
        launches = (await pool.state()).launches
        stopped = pages_of(launches["chrome-0"], BrowserType.CHROME)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            results = [await pool.run_with_recovery("vad", "inference", FRAME) for _ in range(8)]
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert {result.browser_id for result in results} == {"chrome-1"}
        hedged = [r for r in results if any(step.what == "hedged" for step in r.recovery)]
        assert hedged  # two are drawn, the one with less to do is asked: the hung one at first
        assert all(result.metrics["duration_ms"] < 1300 for result in results)
        for result in results:
            np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)


async def test_high_and_medium_do_not_see_a_wrong_answer_but_a_probe_does(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of({"chrome": 1}, tmp_path, faults=True, probe_seconds=0.5) as pool:
        await pool.inject("chrome-0", wrong_answers(1000))
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        assert result.success
        assert not np.allclose(result.outputs["output"], right, atol=ATOL)  # docs/levels.md

        async def noticed() -> bool:
            return bool((await pool.control()).repairs)

        await eventually(noticed, 60.0)
        repair = (await pool.control()).repairs[0]
        assert repair.failure.category is Category.WRONG_ANSWER
        assert "known answer" in repair.failure.message
        await settled(pool, 1)
        result = await pool.run_with_recovery("vad", "inference", FRAME)
        np.testing.assert_allclose(result.outputs["output"], right, atol=ATOL)


async def test_native_answer_is_given_only_if_allowed_and_says_what_it_is(
    tmp_path: Path, right: np.ndarray[Any, Any]
) -> None:
    async with pool_of({"chrome": 1}, tmp_path, level="low", simulation=True) as pool:

        async def ask_while_it_dies(**options: Any) -> Any:
            await settled(pool, 1)
            launch = (await pool.state()).launches["chrome-0"]
            for pid in pages_of(launch, BrowserType.CHROME):
                os.kill(pid, signal.SIGSTOP)  # so that it can't answer before
            asked = asyncio.create_task(
                pool.run_with_recovery("vad", "inference", FRAME, **options)
            )
            await asyncio.sleep(0.05)
            crash_tab(launch, BrowserType.CHROME)
            return await asked

        result = await ask_while_it_dies()
        assert result.success
        assert result.simulated
        assert (result.backend, result.browser_type) == (Backend.NATIVE, None)
        np.testing.assert_array_equal(result.outputs["output"], right)
        view = await pool.state()
        assert view.operations["simulated"] == 1
        assert view.operations["answered"] == 0

        result = await ask_while_it_dies(simulation=False)
        assert not result.success
        assert not result.simulated


async def test_level_that_browsers_can_not_hold_is_refused_before_any_is_started() -> None:
    began = time.monotonic()
    with pytest.raises(LevelUnavailable, match="at least 3 browsers"):
        BrowserPool({"chrome": 2}, level="critical")
    assert time.monotonic() - began < 1.0
