"""Real browsers: shared launches, one Ray for all, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.browser.host import BrowserHost
from actors.driver.binaries import find_binaries
from actors.messages import HostConfig, LaunchOrder, LaunchReport
from actors.ray import connection
from pool import BrowserPool
from pool.models.bundled import silero_vad_path
from recovery.control import ModelPhase, Phase, Repair
from recovery.errors import BrowserMissing
from recovery.kinds import BrowserType
from recovery.records import HostRef
from recovery.supervision import RestartLimit

GONE_SECONDS = 5.0  # the promise: nothing outlives its owner by more
ENGINES = (BrowserType.CHROME, BrowserType.FIREFOX, BrowserType.SAFARI)
_MARKS = (
    "tabpool-profile-",
    "actors/driver/reaper.py",
    "chromedriver",
    "geckodriver",
    "WebKitWebDriver",
)


def pytest_configure() -> None:
    """Give each of several test processes (`-n 2`) folders of its own.

    By them it tells its browsers, and Ray's clusters, from those of the others.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        folder = Path("/tmp") / f"tabpool-{worker}-{os.getpid()}"
        folder.mkdir(mode=0o700)
        os.environ["TMPDIR"] = os.environ["RAY_TMPDIR"] = tempfile.tempdir = str(folder)


def pytest_unconfigure() -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser" in str(item.path):
            item.add_marker(pytest.mark.browser)


def require(kind: BrowserType) -> None:
    """Skip, saying why, where this engine is not installed."""
    try:
        find_binaries(kind)
    except BrowserMissing as error:
        pytest.skip(str(error))


def our_processes() -> dict[int, str]:
    """Every driver, browser, display and reaper that was started by this test process's pools."""
    found = {}
    for process in psutil.process_iter(["pid", "cmdline", "name", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        named = process.info["name"] in ("Xvfb", "MiniBrowser", "WebKitWebProcess")
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            named or any(mark in line for mark in _MARKS)
        ):
            with contextlib.suppress(psutil.Error):
                if _is_ours(process, line):
                    found[process.info["pid"]] = line[:120]
    return found


def _is_ours(process: psutil.Process, line: str) -> bool:
    """Whether it has a profile in this process's temporary directory: another's has its own."""
    own = os.path.join(tempfile.gettempdir(), "tabpool-profile-")
    return own in line or process.environ().get("TMPDIR", "").startswith(own)


def stale_displays() -> set[str]:
    """Locks of X displays whose server has ended."""
    found = set()
    for lock in glob.glob("/tmp/.X*-lock"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int(Path(lock).read_text())):
                found.add(lock)
    return found


# Profiles, and what the engines put into the temporary directory themselves.
_FILES = (
    "tabpool-profile-*",
    "*org.chromium.*",
    "rust_mozprofile*",
    "Temp-*",
    "WebKit*",
)


def our_files() -> set[str]:
    folder = tempfile.gettempdir()
    found = {path for mark in _FILES for path in glob.glob(os.path.join(folder, mark))}
    return found | stale_displays()


def wait_gone(condition: Callable[[], object], seconds: float = GONE_SECONDS) -> None:
    """Return when `condition` is falsy; fail, showing it, if it still is not in time."""
    deadline = time.monotonic() + seconds
    while left := condition():
        if time.monotonic() > deadline:
            pytest.fail(f"left behind after {seconds} s: {left}")
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    processes, files = our_processes(), our_files()
    yield
    wait_gone(lambda: {p: line for p, line in our_processes().items() if p not in processes})
    wait_gone(lambda: our_files() - files)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """One Ray for all pools of the run; its address, for other processes to join."""
    session = connection.connect(None, dashboard=False)
    yield connection.cluster_address()
    connection.disconnect(session)


LaunchedHost = tuple[BrowserHost, LaunchReport]


@asynccontextmanager
async def launched(kind: BrowserType, **config: object) -> AsyncIterator[LaunchedHost]:
    """A browser host in this process, without Ray."""
    require(kind)
    lost: list[bool] = []
    settings = HostConfig(**{"lease_seconds": 300.0, **config})  # type: ignore[arg-type]
    host = BrowserHost(f"{kind}-0", kind, settings, lambda: lost.append(True))
    try:
        yield host, await host.launch(LaunchOrder(HostRef(f"{kind}-0", 0), term=1))
    finally:
        await host.stop()


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it never became so"


LIMIT = RestartLimit(restarts_max=100)
FRAME = {  # Silero VAD: 32 ms of noise at 16 kHz, and no memory of what was before
    "input": np.random.default_rng(5).standard_normal((1, 512), dtype=np.float32),
    "state": np.zeros((2, 1, 128), np.float32),
    "sr": np.array(16000, np.int64),
}


@asynccontextmanager
async def pool_of(
    browsers: dict[str, int],
    tmp_path: Path,
    example: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[BrowserPool]:
    """A pool that has loaded Silero VAD as `vad`."""
    for kind in browsers:
        require(BrowserType(kind))
    settings = {"backend": "wasm", "restart_limit": LIMIT, "state_dir": str(tmp_path), **options}
    async with BrowserPool(browsers, **settings) as pool:
        await pool.load("vad", silero_vad_path(), example=example)
        yield pool


async def repairs_of(pool: BrowserPool) -> Counter[str]:
    """How many repairs of each browser are over."""
    return Counter(repair.browser_id for repair in (await pool.control()).repairs)


async def repaired(
    pool: BrowserPool, browser_id: str, before: Mapping[str, int] | None = None
) -> Repair:
    """The repair of this browser that follows those counted in `before`, once it is over.

    A small operation may be answered before a kill takes effect, and other browsers may be under
    repair at the same time: neither is what is waited for.
    """
    number = (before or {}).get(browser_id, 0)
    found: list[Repair] = []

    async def holds() -> bool:
        repairs = (await pool.control()).repairs
        found[:] = [repair for repair in repairs if repair.browser_id == browser_id]
        return len(found) > number

    await eventually(holds, 60.0)
    return found[number]


async def settled(pool: BrowserPool, count: int = 0, seconds: float = 30.0) -> None:
    """Every repair is over, and all browsers in service, at least `count`, have the model."""

    async def holds() -> bool:
        records = (await pool.control()).browsers.values()
        serving = [r for r in records if r.phase is Phase.READY]
        loaded = [r for r in serving if r.models.get("vad") is ModelPhase.LOADED]
        whole = len(serving) == len(loaded) >= count
        return whole and all(r.repair is None for r in records)

    await eventually(holds, seconds)
