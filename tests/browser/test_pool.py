"""Pools of real browsers under Ray: kills, leases, scaling, joining."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.faults import crash_tab, kill_process
from actors.messages import LaunchReport
from pool import BrowserPool, Result
from pool.models.bundled import minilm_folder, silero_vad_path
from pool.models.registry import read_model
from pool.operations.embed import EMBED
from recovery.control import Phase
from recovery.errors import BadInput, NotAModel, PoolBusy, PoolClosed, UnknownModel
from recovery.kinds import BrowserType
from sharding.models.native import NativeSession
from tests import models
from tests.browser.conftest import ENGINES, GONE_SECONDS, our_processes, require, wait_gone

pytestmark = pytest.mark.usefixtures("ray_cluster")
_LEASE = 5.0


def long_inputs(batch: int = 8) -> dict[str, np.ndarray[Any, Any]]:
    """Work for some 0.5 to 2 s on one core, so that a kill falls inside."""
    shape = (batch, 128)
    return {
        "input_ids": np.random.default_rng(3).integers(1000, 20000, shape, dtype=np.int64),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }


@pytest.fixture(scope="module")
def expected() -> Iterator[np.ndarray[Any, Any]]:
    entry = read_model("minilm", minilm_folder())
    native = NativeSession(entry.spec.files[0].path)
    native.open()
    inputs = long_inputs()
    yield EMBED.finish(entry, inputs, native.run(inputs))["embedding"]
    native.close()


@asynccontextmanager
async def pool_of(browsers: dict[str, int], **options: Any) -> AsyncIterator[BrowserPool]:
    for kind in browsers:
        require(BrowserType(kind))
    async with BrowserPool(browsers, backend="wasm", **options) as pool:
        yield pool


async def busy(pool: BrowserPool, browser_id: str) -> None:
    """Return when the browser has an operation under way in its page."""
    async with asyncio.timeout(30):
        while not any(h.ref.browser_id == browser_id and h.queue for h in pool.hosts()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)


def freeze_page(report: LaunchReport) -> None:
    """A machine that sleeps, a debugger that holds: nothing moves in Chromium's page."""
    for process in psutil.Process(report.pids["reaper"]).children(recursive=True):
        if "--type=renderer" in " ".join(process.cmdline()):
            process.suspend()


async def launch_of(pool: BrowserPool, browser_id: str) -> LaunchReport:
    return (await pool.state()).launches[browser_id]


def gone(report: LaunchReport) -> list[str]:
    left = [f"{n} {pid}" for n, pid in report.pids.items() if n != "worker" and running(pid)]
    return left + ([report.profile] if Path(report.profile).exists() else [])


def running(pid: int) -> bool:
    try:
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def right(result: Result, expected: np.ndarray[Any, Any]) -> None:
    assert result.success, result.error
    assert not result.simulated
    np.testing.assert_allclose(result.outputs["embedding"], expected, atol=1e-4)


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ENGINES)
async def test_the_only_browser_is_killed_in_every_way_and_each_answer_is_right(
    kind: BrowserType, expected: np.ndarray[Any, Any]
) -> None:
    browser_id = f"{kind}-0"
    async with pool_of({str(kind): 1}) as pool:
        await pool.load("minilm", minilm_folder())
        for number, target in enumerate(("browser", "driver", "tab", "worker")):
            report = await launch_of(pool, browser_id)
            asked = asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs()))
            await busy(pool, browser_id)
            if target == "tab":
                crash_tab(report, kind)
            else:
                kill_process(report, target)
            result = await asked
            right(result, expected)
            assert result.recovered, target
            assert result.original_error is not None
            assert result.original_error.category == "crash"
            assert result.recovery[0].what == "failed"
            assert result.recovery[-1].what == "resubmitted"
            assert result.epoch == number + 1
            # The dead incarnation leaves nothing, while the pool goes on.
            wait_gone(lambda report=report: gone(report))
        view = await pool.state()
        assert len(view.control.repairs) == 4
        assert all(repair.ready for repair in view.control.repairs)
        last = view.launches[browser_id]
    # And the pool itself leaves neither worker nor port.
    wait_gone(lambda: running(last.pids["worker"]) or listening(last.port))


@pytest.mark.chaos
async def test_many_operations_survive_kills_none_lost_none_answered_twice() -> None:
    async with pool_of({"chrome": 2}) as pool:
        await pool.load("minilm", minilm_folder())
        report = await launch_of(pool, "chrome-0")
        freeze_page(report)  # what it is given from here on is under way when it dies
        tasks = [
            asyncio.create_task(
                pool.run_with_recovery("minilm", "embed", long_inputs(2), op_id=f"op-{n}")
            )
            for n in range(16)
        ]
        await busy(pool, "chrome-0")
        kill_process(report, "browser")
        results = await asyncio.gather(*tasks)
        assert [r.op_id for r in results] == [f"op-{n}" for n in range(16)]
        assert all(r.success for r in results)
        assert any(r.recovered for r in results)
        first = results[0].outputs["embedding"]
        for result in results:
            np.testing.assert_allclose(result.outputs["embedding"], first, atol=1e-6)
        assert (await pool.state()).operations["answered"] == 16


@pytest.mark.chaos
@pytest.mark.parametrize("level", ["none", "low"])
async def test_a_level_that_promises_no_restart_says_so(level: str) -> None:
    async with pool_of({"chrome": 1}, level=level) as pool:
        await pool.load("minilm", minilm_folder())
        report = await launch_of(pool, "chrome-0")
        asked = asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs()))
        await busy(pool, "chrome-0")
        kill_process(report, "browser")
        result = await asked
        assert not result.success
        assert result.original_error is not None
        assert result.original_error.category == "crash"
        assert f"level {level}" in result.error


@pytest.mark.chaos
async def test_an_operation_that_hangs_one_browser_is_answered_by_another() -> None:
    async with pool_of({"chrome": 2}, hang_seconds=12.0) as pool:
        await pool.load("minilm", minilm_folder())
        report = await launch_of(pool, "chrome-0")
        asked = [
            asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs(2)))
            for _ in range(12)
        ]
        await busy(pool, "chrome-0")
        freeze_page(report)
        results = await asyncio.gather(*asked)
        assert all(result.success for result in results), [r.error for r in results]
        hung = [result for result in results if result.recovered]
        assert hung
        for result in hung:
            assert result.original_error is not None
            assert result.original_error.category == "timeout"
            assert result.browser_id == "chrome-1"


async def test_closing_a_pool_ends_what_is_under_way_at_once() -> None:
    async with pool_of({"chrome": 1}) as pool:
        await pool.load("minilm", minilm_folder())
        asked = asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs()))
        await busy(pool, "chrome-0")
        await pool.close()
        async with asyncio.timeout(5):
            result = await asked
        assert not result.success
        with pytest.raises(PoolClosed):
            await pool.run_with_recovery("minilm", "embed", {"text": "too late"})


async def test_bad_input_is_refused_and_disturbs_nothing(tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("no onnx")
    async with pool_of({"chrome": 1}, message_bytes_max=1 << 20) as pool:
        await pool.load("vad", silero_vad_path())
        before = (await pool.state()).hosts[0].served
        frame = {"input": np.zeros((1, 512), np.float32), "state": np.zeros((2, 1, 128), "f4")}
        cases: list[tuple[type[Exception], Any]] = [
            (UnknownModel, pool.run_with_recovery("nobody", "inference", {})),
            (BadInput, pool.run_with_recovery("vad", "inference", frame)),
            (BadInput, pool.run_with_recovery("vad", "inference", {**frame, "sr": 1.5})),
            (BadInput, pool.run_with_recovery("vad", "inference", {"text": "hello"})),
            (BadInput, pool.run_with_recovery("vad", "embed", frame)),
            (NotAModel, pool.load("text", text)),
            (BadInput, pool.load("../name", silero_vad_path())),
            (BadInput, pool.load("vad", silero_vad_path(), backend="cuda")),
            (BadInput, pool.scale({"chrome": 0})),
            (BadInput, pool.scale({"netscape": 1})),
            (BadInput, pool.drain("chrome-9")),
        ]
        for error, call in cases:
            with pytest.raises(error):
                await call
        assert (await pool.state()).hosts[0].served == before
        good = {**frame, "sr": np.array(16000, np.int64)}
        assert (await pool.run_with_recovery("vad", "inference", good)).success


async def test_models_of_any_signature_are_answered_as_natively(tmp_path: Path) -> None:
    async with pool_of({"chrome": 1}) as pool:
        clip = await pool.load("clip", models.matching_model(tmp_path / "clip.onnx", "batch"))
        assert clip.warnings == ()
        texts, images = np.arange(12).reshape(3, 4), np.ones((1, 4), np.float32)
        asked = {"input_ids": texts, "pixel_values": images}
        result = await pool.run_with_recovery("clip", "inference", asked)
        assert result.outputs["per_image"].tolist() == [[6, 22, 38]]

        await pool.load("detector", models.detector_model(tmp_path / "detector.onnx"))
        result = await pool.run_with_recovery("detector", "inference", {"x": np.ones(2, "f4")})
        assert list(result.outputs) == ["scores", "labels", "boxes"]

        with pytest.raises(NotAModel, match="at most 1,024 outputs"):
            await pool.load("chatty", models.chatty_model(tmp_path / "chatty.onnx", 1025))

        # Five numbers that ask for 8 GB: the fewest of those made up are taken instead.
        sized = await pool.load("sized", models.sized_model(tmp_path / "sized.onnx"))
        assert sized.warnings == ()
        result = await pool.run_with_recovery("sized", "inference", {"size": np.full(5, 2)})
        assert float(result.outputs["total"]) == 32

        # Nothing that can be made up suits it: it is loaded all the same, and says what that costs.
        vad = await pool.load("vad", silero_vad_path())
        assert len(vad.warnings) == 1
        assert "vad has no known answer" in vad.warnings[0]
        assert "example=" in vad.warnings[0]


async def test_a_full_pool_says_so_or_waits_as_configured() -> None:
    options: dict[str, Any] = {"queue_max": 1, "when_full": "error"}
    async with pool_of({"chrome": 1}, **options) as pool:
        await pool.load("minilm", minilm_folder())
        first = asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs()))
        await busy(pool, "chrome-0")
        with pytest.raises(PoolBusy):
            await pool.run_with_recovery("minilm", "embed", {"text": "one more"})
        assert (await first).success
        assert (await pool.run_with_recovery("minilm", "embed", {"text": "now"})).success


async def test_scale_and_drain_lose_nothing() -> None:
    async with pool_of({"chrome": 1}) as pool:
        await pool.load("minilm", minilm_folder())
        running = [
            asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs(2)))
            for _ in range(6)
        ]
        await pool.scale({"chrome": 2})
        assert all(result.success for result in await asyncio.gather(*running))
        record = (await pool.state()).control.browsers["chrome-1"]
        assert record.phase is Phase.READY
        assert "minilm" in record.numeric, "a new browser has the pool's models"
        running = [
            asyncio.create_task(pool.run_with_recovery("minilm", "embed", long_inputs(2)))
            for _ in range(6)
        ]
        await busy(pool, "chrome-0")
        await pool.drain("chrome-0")
        results = await asyncio.gather(*running)
        assert all(result.success for result in results)
        assert (await pool.state()).control.browsers["chrome-0"].phase is Phase.STOPPED


async def test_a_second_client_attaches_and_leaves_the_pool_running() -> None:
    async with pool_of({"chrome": 1}, name="shared") as pool:
        await pool.load("vad", silero_vad_path())
        inputs = {
            "input": np.zeros((1, 512), np.float32),
            "state": np.zeros((2, 1, 128), np.float32),
            "sr": np.array(16000, np.int64),
        }
        mine = await pool.run_with_recovery("vad", "inference", inputs)
        async with BrowserPool.attach("shared") as other:
            assert other.models() == ("vad",)
            theirs = await other.run_with_recovery("vad", "inference", inputs)
        np.testing.assert_array_equal(mine.outputs["output"], theirs.outputs["output"])
        assert (await pool.run_with_recovery("vad", "inference", inputs)).success
    with pytest.raises(PoolClosed):
        await BrowserPool.attach("shared").open()


def test_blocking_pool_does_the_same_without_await() -> None:
    require(BrowserType.CHROME)
    with BrowserPool({"chrome": 1}, backend="wasm").blocking() as pool:
        pool.load("minilm", minilm_folder())
        futures = [pool.submit("minilm", "embed", {"text": f"number {n}"}) for n in range(4)]
        assert all(future.result().success for future in futures)
        assert pool.state().control.browsers["chrome-0"].phase is Phase.READY


_CREATOR = """
import asyncio, sys
from pool import BrowserPool

async def main():
    pool = BrowserPool({"chrome": 1}, name="orphan", backend="wasm", lease=%(lease)s, **%(options)r)
    await pool.open()
    print("open", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.chaos
@pytest.mark.parametrize("joined", [True, False], ids=["joined-cluster", "own-ray"])
def test_a_pool_whose_creator_is_killed_ends_within_its_lease(
    joined: bool, ray_cluster: str
) -> None:
    require(BrowserType.CHROME)
    before = our_processes()
    options = {"address": ray_cluster} if joined else {"dashboard": False}
    script = textwrap.dedent(_CREATOR % {"lease": _LEASE, "options": options})
    creator = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert creator.stdout is not None
        assert creator.stdout.readline() == b"open\n"
        assert any(pid not in before for pid in our_processes())
    finally:
        os.kill(creator.pid, signal.SIGKILL)
        creator.wait()
        assert creator.stdout is not None
        creator.stdout.close()
    began = time.monotonic()
    wait_gone(
        lambda: {p: line for p, line in our_processes().items() if p not in before},
        _LEASE + GONE_SECONDS,
    )
    assert time.monotonic() - began < _LEASE + GONE_SECONDS
