"""Rungs, strategies and the supervisor's own death, on real browsers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.faults import kill_network, kill_process
from pool import BrowserPool, ProgressiveRecoveryManager, recover_browser
from recovery.control import Phase
from recovery.failures import Category, Failure, Scope, Severity
from recovery.kinds import BrowserType, Readiness, RecoveryLevel
from recovery.log import log
from recovery.plan import register_strategy
from tests.browser.conftest import (
    ENGINES,
    FRAME,
    eventually,
    pool_of,
    repaired,
    repairs_of,
    settled,
)

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.chaos]
_SUPERVISOR_KILLS = 20


async def ask(pool: BrowserPool) -> np.ndarray[Any, Any]:
    result = await pool.run_with_recovery("vad", "inference", FRAME)
    assert result.success, result.error
    assert not result.simulated
    answer: np.ndarray[Any, Any] = result.outputs["output"]
    return answer


def seen(category: Category, scope: Scope = Scope.BROWSER) -> Failure:
    return Failure(category, Severity.SEVERE, scope, "reported by a test", at=time.time())


@pytest.mark.parametrize("kind", ENGINES)
async def test_every_rung_works(kind: BrowserType, tmp_path: Path) -> None:
    first = f"{kind}-0"
    async with pool_of({str(kind): 1}, tmp_path) as pool:
        before = await ask(pool)
        manager = ProgressiveRecoveryManager(pool)
        touched = seen(Category.CONNECTION_FAILURE, Scope.PAGE)

        repair = await manager.execute_progressive_recovery(first, touched)
        assert repair.outcome == "reconnected"
        assert (await pool.control()).browsers[first].epoch == 0

        for rung, epoch in ((RecoveryLevel.MODERATE, 1), (RecoveryLevel.AGGRESSIVE, 2)):
            await settled(pool)
            repair = await manager.execute_progressive_recovery(first, seen(Category.CRASH), rung)
            assert (repair.outcome, repair.steps[-1].worked) == ("restarted", rung)
            assert (await pool.control()).browsers[first].epoch == epoch
            np.testing.assert_allclose(await ask(pool), before, atol=1e-5)

        await settled(pool)
        repair = await manager.execute_progressive_recovery(
            first, seen(Category.WRONG_ANSWER), RecoveryLevel.FALLBACK
        )
        assert repair.steps[-1].worked is RecoveryLevel.FALLBACK
        records = (await pool.control()).browsers
        substitute = records[records[first].replaced_by]
        assert substitute.kind is not kind
        np.testing.assert_allclose(await ask(pool), before, atol=1e-5)
        stats = await manager.get_strategy_stats()
        assert stats[f"crash/{kind}/audio"]["aggressive"] == {"attempts": 1, "successes": 1}


_ADJUSTED = {
    BrowserType.CHROME: "--js-flags=",
    BrowserType.FIREFOX: None,  # preferences, not arguments: looked up in the profile
    BrowserType.SAFARI: None,  # environment
}


@pytest.mark.parametrize("kind", ENGINES)
async def test_what_an_aggressive_restart_changes_is_found_on_the_running_browser(
    kind: BrowserType, tmp_path: Path
) -> None:
    from recovery.adjustments import adjust
    from recovery.kinds import ModelType

    async with pool_of({str(kind): 1}, tmp_path) as pool:
        manager = ProgressiveRecoveryManager(pool)
        plain = (await pool.state()).launches[f"{kind}-0"]
        await manager.execute_progressive_recovery(
            f"{kind}-0", seen(Category.CRASH), RecoveryLevel.AGGRESSIVE
        )
        launch = (await pool.state()).launches[f"{kind}-0"]
        assert launch.pids["browser"] != plain.pids["browser"]
        wanted = adjust(kind, ModelType.AUDIO, Category.CRASH)
        assert wanted.arguments or wanted.preferences or wanted.environment
        process = psutil.Process(launch.pids["browser"])
        driver = psutil.Process(launch.pids["driver"])  # Chromium sets its own niceness
        assert driver.nice() == psutil.Process().nice(), "Ray's usual 15 starves browsers"
        line, environment = process.cmdline(), process.environ()
        for argument in wanted.arguments:
            name, _, value = argument.partition("=")
            given = [a for a in line if a.partition("=")[0] == name]
            assert given, f"{argument} is not on {line}"
            if value:
                assert set(value.split(",")) <= set(given[0].partition("=")[2].split(",")), given
        for variable, text in wanted.environment.items():
            assert environment[variable] == text
        if wanted.preferences:
            user = (Path(launch.profile) / "user.js").read_text()
            for preference, setting in wanted.preferences.items():
                assert f'"{preference}", {json.dumps(setting)}' in user


@pytest.mark.parametrize(
    ("strategy", "outcome"),
    [
        ("progressive", "restarted"),
        ("restart", "restarted"),
        ("failover", "replaced by"),
        ("parallel", "re"),  # restarted, or replaced by the other: whichever is first
        ("coordinated", "restarted"),
        ("reconnect", "given up"),
        ("straight-to-adjusted", "restarted"),
    ],
)
async def test_every_strategy_recovers_each_engine_as_it_says_when_its_browser_is_killed(
    strategy: str, outcome: str, tmp_path: Path
) -> None:
    register_strategy("straight-to-adjusted", [RecoveryLevel.AGGRESSIVE])
    each = {str(kind): 1 for kind in ENGINES}
    async with pool_of(each, tmp_path, strategy=strategy) as pool:
        before = await ask(pool)
        for kind in ENGINES:
            earlier = await repairs_of(pool)
            kill_process((await pool.state()).launches[f"{kind}-0"], "browser")
            repair = await repaired(pool, f"{kind}-0", earlier)
            assert repair.outcome.startswith(outcome)
            await settled(pool)
            if any(host.readiness is Readiness.READY for host in pool.hosts()):
                np.testing.assert_allclose(await ask(pool), before, atol=1e-5)
        serving = len([r for r in (await pool.control()).browsers.values() if r.numeric])
        assert serving == (0 if strategy == "reconnect" else len(ENGINES))


async def test_a_lost_connection_is_mended_without_a_restart(tmp_path: Path) -> None:
    async with pool_of({"chrome": 1}, tmp_path, level="low", reconnect_seconds=10.0) as pool:
        before = await ask(pool)
        kill_network((await pool.state()).launches["chrome-0"])
        np.testing.assert_allclose(await ask(pool), before, atol=1e-5)
        repair = await repaired(pool, "chrome-0")
        assert repair.outcome == "reconnected"
        assert (await pool.control()).browsers["chrome-0"].epoch == 0


async def test_the_supervisor_is_killed_again_and_again_and_every_operation_is_answered(
    tmp_path: Path,
) -> None:
    async with pool_of({"chrome": 1, "firefox": 1}, tmp_path, name="undying") as pool:
        before = await ask(pool)
        stop = asyncio.Event()
        answers = 0

        async def keep_asking() -> None:
            nonlocal answers
            while not stop.is_set():
                np.testing.assert_allclose(await ask(pool), before, atol=1e-5)
                answers += 1
                await asyncio.sleep(0.02)

        asking = [asyncio.create_task(keep_asking()) for _ in range(2)]
        for round_ in range(_SUPERVISOR_KILLS):
            term = (await pool.control()).term
            assert term == round_ + 1
            if round_ % 4 == 1:  # in the middle of a repair
                kill_process((await pool.state()).launches["chrome-0"], "browser")
            os.kill(supervisor_pid("undying"), signal.SIGKILL)

            async def next_term(term: int = term) -> bool:
                return (await pool.control()).term == term + 1

            await eventually(next_term, 60.0)
        await settled(pool)
        stop.set()
        await asyncio.gather(*asking)
        assert answers > _SUPERVISOR_KILLS
        state = await pool.control()
        assert [r.phase for r in state.browsers.values()] == [Phase.READY] * 2
        await asyncio.to_thread(the_log_tells, tmp_path)


def the_log_tells(state_dir: Path) -> None:
    (folder,) = state_dir.glob("undying@*")
    assert log.verify(folder / "log").ok
    program = [sys.executable, "-m", "pool.commands.main"]
    command = [*program, "log", "show", "--state-dir", str(state_dir)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count("term_began") == _SUPERVISOR_KILLS


def supervisor_pid(pool: str) -> int:
    """The worker process of a pool's supervisor, by its title, in the Ray of this process."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and f"supervisor of {pool}" in title:
                return process.pid
            if title.startswith("ray::PoolSupervisor"):
                return process.pid
    raise AssertionError("no supervisor runs")


async def test_samples_statistics_and_telemetry_are_of_what_happened(tmp_path: Path) -> None:
    async with pool_of({"chrome": 1}, tmp_path) as pool:
        for _ in range(5):
            await ask(pool)
        kill_process((await pool.state()).launches["chrome-0"], "browser")
        await repaired(pool, "chrome-0")
        await ask(pool)
        await settled(pool)
        repair = await recover_browser(pool, "chrome-0", "odd", {"what": "wrong_answer"})
        assert repair.failure.category is Category.WRONG_ANSWER
        await asyncio.sleep(1.5)  # samples are handed on behind
        statistics = await pool.get_recovery_statistics()
        assert statistics["operations"]["samples"] == 6
        assert statistics["operations"]["successes"] == 6
        assert statistics["by_rung"][2]["successes"] == 1
        assert statistics["by_category"]["crash"]["samples"] == 1
        telemetry = await pool.export_telemetry()
        assert json.loads(json.dumps(telemetry))["repairs"][0]["category"] == "crash"
        assert telemetry["statistics"]["operations"]["samples"] == 6
