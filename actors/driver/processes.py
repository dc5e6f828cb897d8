"""Processes of one browser: their reaper, and which of them serve its page.

The process tree below the reaper is the record of what was started, so it neither misses a process
nor includes a foreign one. This module must not know Selenium or the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from actors.driver.engines import ENGINES
from recovery.errors import LaunchFailed
from recovery.kinds import BrowserType

_OWN_UI = "--top-chrome-webui"  # a renderer that draws Chromium's own toolbar
_STARTED_SECONDS = 15.0
_WORKED_SECONDS = 0.1  # CPU time has a resolution of 0.01 s, and idle processes collect garbage
_WORKED_RATIO = 4.0  # CPU time of the page's process relative to other busy ones
_ENDED_SECONDS = 6.0  # longer than the reaper's own limit


@dataclass(frozen=True)
class ReaperOrder:
    """What a reaper must start, and the profile (a copy of `template`, if there is one).

    `environment` holds all variables of the processes. With a `page_port` they get a private
    network, if the system allows one, and the page's server listens on that port in it.
    """

    driver: Sequence[str]
    xvfb: Sequence[str] | None
    profile: str
    template: str | None
    environment: Mapping[str, str]
    driver_port: int = 0
    page_port: int | None = None

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class ProcessReaper:
    """A running reaper, from the side of its actor."""

    def __init__(self) -> None:
        self.pid = 0
        self.driver_pid = 0
        self.private_network = False  # of the driver and the browser
        self.why_shared = ""  # why they have none, if one was ordered
        self._stdin: asyncio.StreamWriter | None = None
        self._reader: asyncio.Task[None] | None = None
        self._done = False
        self._profile = ""

    async def start(self, order: ReaperOrder, on_exit: Callable[[int, int], None]) -> None:
        """Start the driver below a new reaper.

        `on_exit(pid, status)` is called for each direct or adopted child that ends.
        Raises `LaunchFailed` when the driver (or its display) can't be started.
        """
        launcher = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(Path(__file__).with_name("reaper.py")),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(order.environment),
            start_new_session=True,
        )
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        self._profile = order.profile
        self._stdin = launcher.stdin
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(
            self._read(launcher.stdout, started, on_exit), name="reaper-reader"
        )
        try:
            async with asyncio.timeout(_STARTED_SECONDS):
                self._stdin.write(order.line())
                await self._stdin.drain()
                await started
        except (TimeoutError, OSError) as error:
            await self.end()
            raise LaunchFailed(
                f"{order.driver[0]} could not be started: {str(error) or 'no answer'}. "
                "Run `tabpool doctor` to see what this machine has."
            ) from error

    async def _read(
        self,
        stdout: asyncio.StreamReader,
        started: asyncio.Future[int],
        on_exit: Callable[[int, int], None],
    ) -> None:
        async for line in stdout:
            match json.loads(line):
                case {"started": int(pid), "what": "reaper"}:
                    self.pid = pid
                case {"private_network": bool(private), "why": str(why)}:
                    self.private_network, self.why_shared = private, why
                case {"started": int(pid), "what": "driver"} if not started.done():
                    self.driver_pid = pid  # set before its exit can be reported
                    started.set_result(pid)
                case {"error": str(text)} if not started.done():
                    started.set_exception(OSError(text))
                case {"exited": int(pid), "status": int(status)}:
                    on_exit(pid, status)
                case {"done": True}:
                    self._done = True
        if not started.done():
            started.set_exception(OSError("its reaper ended"))
            started.exception()  # mark as retrieved: the waiter may be gone
        if not self._done:  # it was killed, and its driver with it
            on_exit(self.driver_pid, -signal.SIGKILL)

    def tree(self) -> list[psutil.Process]:
        """Every running process below the reaper."""
        try:
            return psutil.Process(self.pid).children(recursive=True) if self.pid else []
        except psutil.NoSuchProcess:
            return []

    def memory_bytes(self) -> int:
        """Resident bytes of the whole tree; memory shared by its processes counts in each."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    async def end(self, survivors: Sequence[int] = ()) -> None:
        """Have the reaper kill everything below it and remove the profile.

        If the reaper itself was killed, `survivors` (known pids of this browser) are killed with
        their descendants. Does not raise.
        """
        stdin, self._stdin = self._stdin, None
        reader, self._reader = self._reader, None
        if stdin is None or reader is None:
            return
        stdin.close()
        try:
            async with asyncio.timeout(_ENDED_SECONDS):
                await asyncio.shield(reader)
        except TimeoutError:
            reader.cancel()
        pid, self.pid = self.pid, 0
        if self._done:  # reported last; it exits right after
            await asyncio.to_thread(wait_for_end, pid, 1.0)
        else:
            kill_trees([known for known in (pid, *survivors) if known])
            await asyncio.to_thread(shutil.rmtree, self._profile, ignore_errors=True)


def page_processes(tree: Callable[[], Sequence[psutil.Process]], kind: BrowserType) -> list[int]:
    """The pids in `tree()` that serve pages, by their command lines; includes spare ones."""
    found = []
    for process in tree():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if ENGINES[kind].page_mark in line and _OWN_UI not in line:
                found.append(process.pid)
    return found


@dataclass(frozen=True)
class BrowserProcesses:
    """A browser's processes, for fault injection.

    `pids` are those known by name; all of them are descendants of `root`.
    """

    kind: BrowserType
    pids: Mapping[str, int]
    root: int

    def tree(self) -> list[psutil.Process]:
        """All of them. Empty if `root` has ended."""
        try:
            return psutil.Process(self.root).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def named(self, which: str) -> list[psutil.Process]:
        """The "browser" or the "driver", if it still is below `root`."""
        return [process for process in self.tree() if process.pid == self.pids.get(which)]

    def pages(self) -> list[psutil.Process]:
        """Those that serve pages, including spare ones, but not the browser itself."""
        tree = self.tree()
        pids = set(page_processes(lambda: tree, self.kind)) - {self.pids.get("browser")}
        return [process for process in tree if process.pid in pids]

    def marked(self, mark: str) -> list[psutil.Process]:
        """Those with `mark` in their command line."""
        found = []
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                if any(mark in word for word in process.cmdline()):
                    found.append(process)
        return found

    def network(self) -> list[psutil.Process]:
        """Chromium's network process."""
        return self.marked("network.mojom.NetworkService")

    def gpu(self) -> list[psutil.Process]:
        """Chromium's GPU process."""
        return self.marked("--type=gpu-process")


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """CPU time of each process in seconds. Omits those that have ended."""
    used = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            used[pid] = times.user + times.system
    return used


def busiest(before: Mapping[int, float], after: Mapping[int, float]) -> int:
    """The one process that worked between the two measurements, or 0 if ambiguous."""
    worked = sorted((after[pid] - before.get(pid, 0.0), pid) for pid in after)
    if not worked or worked[-1][0] < _WORKED_SECONDS:
        return 0
    rest = worked[-2][0] if len(worked) > 1 else 0.0
    return worked[-1][1] if worked[-1][0] >= _WORKED_RATIO * rest else 0


def kill_trees(pids: Sequence[int]) -> None:
    """SIGKILL the given processes and all their descendants. Does not raise."""
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in [*root.children(recursive=True), root]:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def wait_for_end(pid: int, seconds: float | None = None) -> None:
    if sys.platform == "linux":  # a pidfd also works for unreaped zombies
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(pid)
            select.select([fd], [], [], seconds)
            os.close(fd)
    else:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).wait(seconds)
