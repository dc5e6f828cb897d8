"""Every fault, really happening to real browsers: seen by others, noticed as what it is, survived.

Node deaths are in `test_nodes`; all kinds on all engines at all intensities are a matter of
`tabpool chaos --matrix --full`, which takes an hour.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pool.bundles import read_bundle
from pool.chaos.breakable import chaos_pool
from pool.chaos.plan import Plan
from pool.chaos.records import ChaosRun, read_run
from pool.chaos.report import verdict
from pool.chaos.runner import ChaosRunner
from pool.chaos.workload import Workload, source_of
from pool.commands.main import app
from recovery.errors import FaultRefused
from recovery.faults import Due, Fault, FaultKind, Intensity, Schedule
from recovery.kinds import BrowserType
from tests.browser.conftest import FRAME, pool_of, require
from tests.models import add_model

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.chaos]
ENGINES = ("chrome", "firefox", "safari")
TESTED_ELSEWHERE = (FaultKind.WRONG_ANSWER, FaultKind.NODE_DEATH, FaultKind.DEVICE_LOSS)


async def broken(
    tmp_path: Path, counts: dict[str, int], model: str, faults: list[Fault], **options: Any
) -> ChaosRun:
    """A run in which each of `faults` happens, one after the other."""
    for kind in counts:
        require(BrowserType(kind))
    every = 10
    due = tuple(Due(float(every * (n + 1)), fault) for n, fault in enumerate(faults))
    plan = Plan(Schedule(0, due), every * (len(faults) + 1), gated=False)
    settings = {"state_dir": str(tmp_path), "launch_seconds": 60.0, "dashboard": False}
    async with chaos_pool(counts, **settings, **options) as pool:
        workload = Workload([source_of(model)])
        await workload.load(pool)
        runner = ChaosRunner(pool, workload, plan)
        run = await runner.run()
    return run.with_leaked(await runner.leaked())


def all_kept(run: ChaosRun) -> None:
    odd = [fault for fault in run.faults if fault.outcome != "happened" or fault.right is False]
    assert not odd, "\n".join(map(str, odd))
    assert [words for words, holds in verdict(run) if not holds] == []


async def test_soak_over_three_engines_at_high_loses_nothing(tmp_path: Path) -> None:
    """Every kind once, each engine and intensity in turn."""
    faults = []
    for number, kind in enumerate(kind for kind in FaultKind if kind not in TESTED_ELSEWHERE):
        how = tuple(Intensity)[number // 3 % 3]
        engine = "chrome" if kind is FaultKind.GPU_PROCESS_CRASH else ENGINES[number % 3]
        faults.append(Fault(kind, how, f"{engine}-0"))
    counts = dict.fromkeys(ENGINES, 1)
    all_kept(await broken(tmp_path, counts, "audio", faults, level="high", backend="wasm"))


async def test_lies_at_critical_are_outvoted_and_told(tmp_path: Path) -> None:
    faults = [
        Fault(FaultKind.WRONG_ANSWER, how, f"{engine}-0")
        for how, engine in zip(Intensity, ENGINES, strict=True)
    ]
    counts = dict.fromkeys(ENGINES, 1)
    all_kept(await broken(tmp_path, counts, "audio", faults, level="critical", backend="wasm"))


async def test_lost_gpu_devices_and_processes_are_told_from_other_deaths(tmp_path: Path) -> None:
    faults = [
        Fault(FaultKind.DEVICE_LOSS, Intensity.MODERATE, "chrome-0"),
        Fault(FaultKind.GPU_PROCESS_CRASH, Intensity.SEVERE, "chrome-1"),
    ]
    model = str(add_model(tmp_path / "add.onnx"))
    run = await broken(tmp_path, {"chrome": 2}, model, faults, level="high", backend="webgpu")
    all_kept(run)
    assert [fault.noticed[0] for fault in run.faults] == ["internal_error", "gpu_error"]


async def test_pool_is_not_broken_unless_it_was_made_for_that(tmp_path: Path) -> None:
    async with pool_of({"chrome": 1}, tmp_path) as pool:
        for kind in FaultKind:
            with pytest.raises(FaultRefused):
                await pool.inject_fault(Fault(kind, Intensity.SEVERE, "chrome-0"))
        assert (await pool.run_with_recovery("vad", "inference", FRAME)).recovery == ()
        assert (await pool.control()).repairs == ()


def test_bundle_of_a_failure_tells_what_was_known_and_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "failure.zip"

    async def fail() -> None:
        async with pool_of({"chrome": 1}, tmp_path, level="medium", faults=True) as pool:
            too_large = Fault(FaultKind.MESSAGE_OVER_LIMIT, Intensity.MILD, "chrome-0")
            await pool.inject_fault(too_large)
            result = await pool.run_with_recovery("vad", "inference", FRAME, level="none")
            assert not result.success
            await pool.bundle(result, FRAME, path, with_data=True)

    asyncio.run(fail())
    bundle = read_bundle(path)
    assert bundle.facts["result"]["original_error"].startswith("api_error")
    assert bundle.facts["operation"]["inputs"]["input"]["shape"] == [1, 512]
    events = [json.loads(line) for line in bundle.files["events.jsonl"].splitlines()]
    assert "model_loaded" in {event["type"] for event in events}
    assert "telemetry.json" in bundle.files
    assert bundle.files["browsers/chrome-0.png"].startswith(b"\x89PNG")
    frames = json.loads(bundle.files["browsers/chrome-0.json"])["frames"]
    own = [frame for frame in frames if bundle.facts["operation"]["op_id"] in frame[3]]
    assert [frame[1:3] for frame in own] == [["to", "run"], ["from", "error"]]
    done = CliRunner().invoke(app, ["replay", str(path)], input="y\n")
    assert done.exit_code == 0, done.output
    assert "answered" in done.output


def test_command_breaks_browsers_and_reports(tmp_path: Path) -> None:
    require(BrowserType.CHROME)
    asked = ["--browsers", "chrome=2", "--model", "audio", "--ops", "30", "--seed", "1"]
    faults = ["--faults", "tab_crash,socket_drop", "--ungated", "--report", str(tmp_path)]
    done = CliRunner().invoke(app, ["chaos", *asked, *faults])
    assert done.exit_code == 0, done.output
    run = read_run(tmp_path / "run.json")
    assert len(run.operations) == 30
    assert [fault.outcome for fault in run.faults] == ["happened"] * 3
    report = (tmp_path / "report.md").read_text()
    assert "![Detection time](noticed.png)" in report
    cells = tmp_path / "matrix"
    matrix = ["--matrix", "--browsers", "chrome", "--models", "audio", "--faults", "driver_death"]
    done = CliRunner().invoke(app, ["chaos", *matrix, "--ops", "8", "--report", str(cells)])
    assert done.exit_code == 0, done.output
    (cell,) = json.loads((cells / "matrix.json").read_text())["cells"]
    assert (cell["outcome"], cell["noticed"]) == ("passed", "crash")
