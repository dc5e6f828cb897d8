"""What the kernel says of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pool.chaos.evidence import GONE, STOPPED
from pool.chaos.processes import resident_bytes, states
from recovery.faults import Fault, FaultKind
from tests.chaos import injected


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def state(pid: int, kind: FaultKind = FaultKind.TAB_CRASH, at: float | None = None) -> str:
    when = time.time() if at is None else at
    return states(injected(Fault(kind), when, pids=(pid,)))[pid]


def until(pid: int, wanted: str) -> str:
    deadline = time.monotonic() + 5.0
    while (now := state(pid)) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return now


def test_a_process_that_runs_is_there(child):
    assert state(child.pid) == "there"
    assert states(injected(Fault(FaultKind.TAB_CRASH))) == {}


def test_a_stopped_one_is_stopped(child):
    child.send_signal(signal.SIGSTOP)
    assert until(child.pid, STOPPED) == STOPPED


def test_one_that_ended_is_gone_also_if_nobody_has_collected_it(child):
    child.kill()
    assert until(child.pid, GONE) == GONE
    child.wait()
    assert state(child.pid) == GONE


def test_another_one_that_got_its_number_later_is_not_it(child):
    assert state(child.pid, at=time.time() - 3600.0) == GONE


def test_limits_are_told_for_the_faults_that_set_them(child):
    process = psutil.Process(child.pid)
    assert state(child.pid, FaultKind.FULL_DISK) == "there"
    assert state(child.pid, FaultKind.MEMORY_EXHAUSTION) == "there"
    process.rlimit(psutil.RLIMIT_FSIZE, (0, process.rlimit(psutil.RLIMIT_FSIZE)[1]))
    process.rlimit(psutil.RLIMIT_DATA, (1 << 30, process.rlimit(psutil.RLIMIT_DATA)[1]))
    assert state(child.pid, FaultKind.FULL_DISK) == "mute"
    assert state(child.pid, FaultKind.MEMORY_EXHAUSTION) == "limited"
    assert state(child.pid) == "there"


def test_memory_of_no_process_is_none(child):
    assert resident_bytes(os.getpid()) > 1 << 20
    assert resident_bytes(0) == 0
    child.kill()
    child.wait()
    assert resident_bytes(child.pid) == 0
