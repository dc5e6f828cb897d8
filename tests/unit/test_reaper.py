"""The reaper, for real, over a driver that spawns and detaches as browsers do."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from actors.driver.processes import ProcessReaper, ReaperOrder, busiest, cpu_seconds, kill_trees
from actors.injection.signals import ignored_by
from recovery.errors import LaunchFailed
from tests.fakes import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="subreapers are Linux's")

# One child in a session of its own, and a grandchild whose parent has gone; their pids, and the
# driver's own, go to a file. It ends when a file `end` appears beside it.
_DRIVER = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleep = ["sleep", "300"]
detached = subprocess.Popen(sleep, start_new_session=True)
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    orphan = subprocess.Popen(sleep, start_new_session=True)
    os.write(write, str(orphan.pid).encode())
    os._exit(0)
orphan = os.read(read, 20).decode()
os.wait3(os.WNOHANG)
text = f"{os.getpid()} {detached.pid} {orphan} {os.environ.get('GREETING', '')}"
(folder / "pids.new").write_text(text)
(folder / "pids.new").rename(folder / "pids")
while not (folder / "end").exists():
    time.sleep(0.005)
os._exit(7)
"""
_HOLDER = """
import asyncio, os, sys
from actors.driver.processes import ProcessReaper, ReaperOrder
async def main():
    reaper = ProcessReaper()
    driver = [sys.executable, "-I", "-S", "-c", sys.argv[1], sys.argv[2]]
    order = ReaperOrder(
        driver=driver, xvfb=None, profile=sys.argv[3], template=None, environment={}
    )
    await reaper.start(order, lambda *_: None)
    print(reaper.pid, flush=True)
    await asyncio.sleep(300)
asyncio.run(main())
"""


class Family:
    """A reaper with its driver, and the pids below it."""

    def __init__(self, folder: Path, profile: Path) -> None:
        self.folder = folder
        self.profile = profile
        self.template = folder / "template"
        self.reaper = ProcessReaper()
        self.exits: list[tuple[int, int]] = []
        self.pids: list[int] = []
        self.greeting = ""

    def order(self, *driver: str, xvfb: list[str] | None = None, **environment: str) -> ReaperOrder:
        return ReaperOrder(
            driver=driver,
            xvfb=xvfb,
            profile=str(self.profile),
            template=str(self.template),
            environment=environment,
        )

    async def start(self) -> None:
        driver = [sys.executable, "-I", "-S", "-c", _DRIVER, str(self.folder)]
        order = self.order(*driver, GREETING="hello")
        await self.reaper.start(order, lambda pid, status: self.exits.append((pid, status)))
        await self.spawned()

    async def spawned(self) -> None:
        await until((self.folder / "pids").exists)
        driver, detached, orphan, *rest = (self.folder / "pids").read_text().split(" ")
        self.pids = [int(driver), int(detached), int(orphan)]
        self.greeting = rest[0]

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "300"])


def holder_of(family: Family) -> subprocess.Popen[str]:
    """A process that holds a reaper of its own, over the family's driver."""
    arguments = [_DRIVER, str(family.folder), str(family.profile)]
    return subprocess.Popen(
        [sys.executable, "-c", _HOLDER, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
async def family(tmp_path) -> AsyncIterator[Family]:
    folder, profile = tmp_path / "driver", tmp_path / "profile"
    folder.mkdir()
    made = Family(folder, profile)
    (made.template / "deep").mkdir(parents=True)
    (made.template / "deep" / "file").write_text("warm")
    yield made
    await made.reaper.end(made.pids)
    for pid in made.pids:  # by pid, and only what this test started
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


async def test_end_kills_everything_below_and_removes_the_profile(family):
    await family.start()
    assert family.greeting == "hello"
    assert (family.profile / "deep" / "file").read_text() == "warm"
    assert family.alive() == family.pids
    assert {process.pid for process in family.reaper.tree()} >= set(family.pids)
    assert family.reaper.memory_bytes() > 0
    reaper = family.reaper.pid
    await family.reaper.end()
    assert family.alive() == []
    assert not is_alive(reaper)
    assert not family.profile.exists()
    assert family.reaper.tree() == []
    await family.reaper.end()  # again is no error


async def test_reaper_can_be_ended_the_moment_it_has_started(family):
    await family.reaper.start(family.order("sleep", "300"), lambda *_: None)
    family.pids = [family.reaper.driver_pid]
    await family.reaper.end()
    assert family.alive() == []


async def test_driver_that_ends_is_reported_with_its_status(family):
    await family.start()
    (family.folder / "end").touch()
    await until(lambda: (family.reaper.driver_pid, 7) in family.exits)
    # What it left behind has a parent still: the reaper.
    assert {process.pid for process in family.reaper.tree()} >= set(family.pids[1:])
    await family.reaper.end()
    assert family.alive() == []


async def test_driver_that_is_killed_is_reported_with_the_signal(family):
    await family.start()
    os.kill(family.reaper.driver_pid, signal.SIGKILL)
    await until(lambda: (family.reaper.driver_pid, -signal.SIGKILL) in family.exits)


async def test_reaper_passes_over_polite_signals(family):
    await family.start()
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(family.reaper.pid, polite)
    (family.folder / "end").touch()
    await until(lambda: (family.reaper.driver_pid, 7) in family.exits)  # it still serves
    await family.reaper.end()
    assert family.alive() == []


async def test_reaper_that_is_killed_takes_the_driver_along_and_is_reported(family):
    await family.start()
    os.kill(family.reaper.pid, signal.SIGKILL)
    await until(lambda: family.exits != [])
    await until(lambda: not is_alive(family.pids[0]))
    await family.reaper.end(survivors=family.pids)
    await until(lambda: family.alive() == [])


async def test_death_of_the_process_that_holds_the_reaper_ends_everything(family):
    holder = holder_of(family)
    try:
        await family.spawned()
        assert holder.stdout is not None
        reaper = int(await asyncio.to_thread(holder.stdout.readline))
        assert family.alive() == family.pids
        holder.kill()
        await asyncio.to_thread(holder.wait)
        await until(lambda: family.alive() == [] and not is_alive(reaper), seconds=5.0)
        assert not family.profile.exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


async def test_driver_that_cannot_be_started_is_a_failed_launch(family):
    order = family.order("/nowhere/driver")
    with pytest.raises(LaunchFailed, match="/nowhere/driver could not be started"):
        await family.reaper.start(order, lambda *_: None)
    assert not family.profile.exists()
    assert family.reaper.pid == 0


async def test_display_that_gives_no_number_is_a_failed_launch(family):
    order = family.order("sleep", "300", xvfb=["true"])
    with pytest.raises(LaunchFailed, match="no display"):
        await family.reaper.start(order, lambda *_: None)


async def test_driver_gets_the_display_that_was_started_for_it(family, tmp_path):
    xvfb = tmp_path / "xvfb"
    xvfb.write_text(
        f'#!/bin/sh\necho "$@" > {family.folder}/xvfb-arguments\necho 42 >&"$2"\nexec sleep 300\n'
    )
    xvfb.chmod(0o755)
    script = f'echo "$DISPLAY" > {family.folder}/display; exec sleep 300'
    order = family.order("sh", "-c", script, xvfb=[str(xvfb)])
    await family.reaper.start(order, lambda *_: None)
    await asyncio.sleep(0)
    await until(lambda: (family.folder / "display").exists())
    await until(lambda: (family.folder / "display").read_text() == ":42\n")
    family.pids = [process.pid for process in family.reaper.tree()]
    assert len(family.pids) == 2
    secret = family.profile / "t/xauthority"
    assert secret.stat().st_mode & 0o077 == 0
    assert f"-auth {secret}" in (family.folder / "xvfb-arguments").read_text()
    await family.reaper.end()
    assert family.alive() == []


def test_order_is_one_line_of_json():
    order = ReaperOrder(("d", "--port=1"), None, "/p", None, {"A": "b\nc"})
    line = order.line()
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "driver": ["d", "--port=1"],
        "xvfb": None,
        "profile": "/p",
        "template": None,
        "environment": {"A": "b\nc"},
        "driver_port": 0,
        "page_port": None,
    }


def test_kill_trees_kills_descendants_and_takes_no_offence_at_the_dead():
    process = subprocess.Popen(["sh", "-c", "sleep 300 & echo $!; wait"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    kill_trees([process.pid, 2**22 - 1])
    process.wait(timeout=5)
    psutil.wait_procs([p for p in [_process(child)] if p], timeout=5)
    assert not is_alive(child)
    process.stdout.close()
    kill_trees([process.pid])


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def test_process_that_worked_is_told_from_those_that_are_merely_awake():
    before = {1: 5.0, 2: 1.0, 3: 0.0}
    assert busiest(before, {1: 5.05, 2: 1.5, 3: 0.0}) == 2
    assert busiest(before, {1: 5.2, 2: 1.5, 3: 0.0}) == 0  # two did
    assert busiest(before, {1: 5.01, 2: 1.06, 3: 0.0}) == 0  # too little to tell
    assert busiest(before, {2: 1.5}) == 2  # the others are gone
    assert busiest({}, {}) == 0


def test_cpu_time_is_of_those_that_live():
    assert cpu_seconds([os.getpid(), 2**22 - 1]).keys() == {os.getpid()}


async def test_driver_does_not_inherit_that_a_signal_is_ignored(tmp_path):
    """A program that a shell runs in the background ignores SIGQUIT."""
    family = Family(tmp_path, tmp_path / "profile")
    (tmp_path / "template").mkdir()
    before = signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        await family.start()
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert signal.SIGQUIT in ignored_by(family.reaper.pid)
    assert signal.SIGQUIT not in ignored_by(family.pids[0])
    await family.reaper.end()
