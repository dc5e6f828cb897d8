"""The injector: what it refuses, and that it touches what it says and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.driver.binaries import Binaries
from actors.driver.processes import BrowserProcesses
from actors.injection import on_processes
from actors.injection.actions import ACTIONS
from actors.injection.injector import BrowserFailureInjector
from actors.injection.signals import SIGNALS, ignored_by
from actors.injection.supervisor import SupervisorFailureInjector
from actors.injection.target import InjectionTarget
from recovery.breaker import CircuitState
from recovery.errors import FaultRefused
from recovery.faults import FAULTS, Fault, FaultKind, FaultSite, Intensity
from recovery.kinds import BrowserType
from recovery.records import HostRef

REF = HostRef("chrome-0", 3)


class Said:
    """A page's server and driver that write down what they are told."""

    def __init__(self):
        self.told = []

    def drop(self, names):
        self.told.append(("drop", tuple(names)))

    def stay_away(self, seconds):
        self.told.append(("away", seconds))

    def spoil(self, how):
        self.told.append(("spoil", tuple(how)))

    async def tell(self, message):
        self.told.append(("tell", message["what"]))

    async def ask(self, message):
        self.told.append(("ask", message["what"]))

    async def reload(self):
        self.told.append(("driver", "reload"))

    async def leave(self):
        self.told.append(("driver", "leave"))

    async def hide(self):
        self.told.append(("driver", "hide"))

    async def show(self):
        self.told.append(("driver", "show"))


def run(*command):
    """Exit status and output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


@pytest.fixture
def tree():
    """A process with a child that looks like a page: a browser and what is below it."""
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"page = subprocess.Popen([sys.executable, '-c', {child!r}, '--type=renderer'])\n"
        "print('up', flush=True)\npage.wait()\ntime.sleep(60)"
    )
    root = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert root.stdout is not None
    root.stdout.readline()
    yield root
    for process in [*psutil.Process(root.pid).children(recursive=True), psutil.Process(root.pid)]:
        process.kill()
    root.wait()
    root.stdout.close()


def target_of(said, root=0, *, circuit=CircuitState.CLOSED, kind=BrowserType.CHROME, pids=None):
    processes = BrowserProcesses(kind, pids or {}, root)
    return InjectionTarget(REF, processes, said, said.ask, said, circuit, 1 << 20, device=False)


async def test_it_is_off_unless_asked_for_and_touches_nothing():
    said = Said()
    with pytest.raises(FaultRefused, match="faults=True") as refused:
        await BrowserFailureInjector(False).inject(target_of(said), Fault(FaultKind.SOCKET_DROP))
    assert refused.value.fields["what"] == "off"
    assert said.told == []


@pytest.mark.parametrize(
    ("circuit", "how", "may"),
    [
        (CircuitState.CLOSED, Intensity.SEVERE, True),
        (CircuitState.HALF_OPEN, Intensity.MODERATE, True),
        (CircuitState.HALF_OPEN, Intensity.SEVERE, False),
        (CircuitState.OPEN, Intensity.MILD, False),
    ],
)
async def test_it_obeys_the_circuit_of_its_target_unless_told_not_to(circuit, how, may):
    said, injector = Said(), BrowserFailureInjector(True)
    fault, target = Fault(FaultKind.SOCKET_DROP, how), target_of(said, circuit=circuit)
    if may:
        await injector.inject(target, fault)
    else:
        with pytest.raises(FaultRefused, match="circuit") as refused:
            await injector.inject(target, fault)
        assert refused.value.fields["what"] == "circuit_open"
        assert said.told == []
        await injector.inject(target, fault, use_circuit_breaker=False)
    assert [word for word, _ in said.told] == ["drop"]


async def test_only_what_is_below_the_reaper_is_hit(tree):
    injector = BrowserFailureInjector(True)
    own = {"browser": os.getpid(), "driver": os.getppid()}  # known by name, and not below it
    for kind in (FaultKind.BROWSER_CRASH, FaultKind.DRIVER_DEATH, FaultKind.GPU_PROCESS_CRASH):
        with pytest.raises(FaultRefused, match="no such process"):
            await injector.inject(target_of(Said(), tree.pid, pids=own), Fault(kind))
    (page,) = psutil.Process(tree.pid).children()
    made = await injector.inject(
        target_of(Said(), tree.pid, pids=own), Fault(FaultKind.TAB_CRASH, Intensity.SEVERE)
    )
    assert made.pids == (page.pid,)
    assert (made.target, made.epoch) == (REF.browser_id, REF.epoch)
    page.wait(5)
    assert tree.poll() is None, "the process above the page lives"


async def test_a_stop_ends_by_itself_where_it_says_so(tree, monkeypatch):
    monkeypatch.setitem(on_processes._STOPPED_SECONDS, Intensity.MILD, 1.0)
    (page,) = psutil.Process(tree.pid).children()
    made = await BrowserFailureInjector(True).inject(
        target_of(Said(), tree.pid), Fault(FaultKind.MACHINE_SUSPENDED, Intensity.MILD)
    )
    assert made.until == pytest.approx(made.at + 1.0)
    async with asyncio.timeout(10):
        while page.status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110  # a process tells nobody
            await asyncio.sleep(0.01)
        while page.status() == psutil.STATUS_STOPPED:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_engines_that_have_no_such_thing_are_left_alone():
    for kind, facts in FAULTS.items():
        for engine in set(BrowserType) - facts.engines:
            with pytest.raises(FaultRefused, match="does not support it") as refused:
                await BrowserFailureInjector(True).inject(
                    target_of(Said(), kind=engine), Fault(kind)
                )
            assert refused.value.fields["what"] == "impossible"
    with pytest.raises(FaultRefused, match="WebGPU"):
        await BrowserFailureInjector(True).inject(target_of(Said()), Fault(FaultKind.DEVICE_LOSS))


async def test_only_a_raylet_is_taken_for_a_node():
    injector = BrowserFailureInjector(True, raylet=os.getpid)
    with pytest.raises(FaultRefused, match="not a raylet") as refused:
        await injector.inject(target_of(Said()), Fault(FaultKind.NODE_DEATH))
    assert refused.value.fields["what"] == "not_ours"


async def test_launches_to_come_fail_as_often_as_was_said(tree, tmp_path):
    injector = BrowserFailureInjector(True)
    real = Binaries(BrowserType.CHROME, sys.executable, "driver")
    assert injector.launched_with(real, tmp_path) == real
    (page,) = psutil.Process(tree.pid).children()
    target = target_of(Said(), tree.pid, pids={"browser": page.pid})
    await injector.inject(target, Fault(FaultKind.LAUNCH_FAILURE, Intensity.MODERATE))
    page.wait(5)
    for _ in range(2):
        broken = injector.launched_with(real, tmp_path)
        assert run(broken.browser, "--headless") == (1, "")
        assert broken.driver == real.driver
    assert injector.launched_with(real, tmp_path) == real


async def test_every_kind_says_something_at_every_intensity(tree):
    """That nothing of the table is forgotten; what it comes to is for real browsers to show."""
    raised = []
    for kind, facts in FAULTS.items():
        if (
            kind in (FaultKind.WORKER_DEATH, FaultKind.NODE_DEATH)
            or facts.place is not FaultSite.BROWSER
        ):
            continue
        for how in Intensity:
            try:
                await BrowserFailureInjector(True).inject(target_of(Said()), Fault(kind, how))
            except FaultRefused as error:
                raised.append(str(error))
    assert not [words for words in raised if "nobody knows how" in words]


async def test_a_supervisors_disk_is_full_for_as_long_as_it_says_and_its_clock_jumps(tmp_path):
    script = (
        "import asyncio, sys, time\n"
        "from actors.injection.supervisor import SupervisorFailureInjector\n"
        "from recovery.faults import Fault, FaultKind, Intensity\n"
        "async def main(path):\n"
        "    injector = SupervisorFailureInjector()\n"
        "    injector.inject(Fault(FaultKind.FULL_DISK, Intensity.MILD))\n"
        "    try:\n"
        "        with open(path, 'w') as file:\n"
        "            file.write('a' * 100)\n"
        "        print('written')\n"
        "    except OSError as error:\n"
        "        print('refused')\n"
        "    await asyncio.sleep(1.3)\n"
        "    with open(path, 'w') as file:\n"
        "        file.write('a' * 100)\n"
        "asyncio.run(main(sys.argv[1]))\n"
    )
    path = tmp_path / "log"
    assert run(sys.executable, "-c", script, str(path)) == (0, "refused\n")
    assert path.stat().st_size == 100

    injector = SupervisorFailureInjector(lambda: 1000.0)
    injector.inject(Fault(FaultKind.CLOCK_STEP, Intensity.MODERATE))
    assert injector.wall() == 1000.0 + 86_400
    injector.inject(Fault(FaultKind.CLOCK_STEP, Intensity.SEVERE))
    assert injector.wall() == 1000.0
    with pytest.raises(FaultRefused):
        injector.inject(Fault(FaultKind.TAB_CRASH))


def test_signals_are_such_that_no_engine_ignores():
    assert signal.SIGTERM not in SIGNALS.values()


_ENDS_ITSELF = """
import asyncio, signal, sys
from actors.injection.supervisor import SupervisorFailureInjector
from recovery.faults import Fault, FaultKind, Intensity
signal.signal(signal.SIGQUIT, signal.SIG_IGN)  # as a shell does for what it runs in the background
async def main():
    SupervisorFailureInjector().inject(Fault(FaultKind.SUPERVISOR_DEATH, Intensity(sys.argv[1])))
    await asyncio.sleep(30)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", Intensity)
def test_death_of_its_own_process_comes_even_where_the_signal_was_ignored(how):
    command = [sys.executable, "-c", _ENDS_ITSELF, how]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=60, check=False)
    assert done.returncode == -SIGNALS[how]


def test_what_a_process_ignores_is_read_from_the_kernel():
    command = "import signal; signal.signal(signal.SIGQUIT, signal.SIG_IGN); print('up'); input()"
    with subprocess.Popen(
        [sys.executable, "-uc", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        assert signal.SIGQUIT in ignored_by(process.pid)
        assert signal.SIGTERM not in ignored_by(process.pid)
        process.stdin.close()
    assert ignored_by(process.pid) == set()


def test_table_has_every_fault_of_a_browser_and_no_other():
    of_browsers = {kind for kind, facts in FAULTS.items() if facts.place is FaultSite.BROWSER}
    assert set(ACTIONS) == of_browsers
