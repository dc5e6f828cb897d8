"""What a fault did is seen by others than whoever made it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from pool.background import BackgroundTasks
from pool.chaos import watch as module
from pool.chaos.clock import SupervisorClock
from pool.chaos.control_log import ControlLogReader
from pool.chaos.evidence import GONE, Seen
from pool.chaos.watch import Before, FaultWatch
from recovery.faults import Due, Fault, FaultKind, Intensity
from tests.chaos import FakePool, injected, record, state_of

HIDDEN = Fault(FaultKind.TAB_HIDDEN, Intensity.SEVERE, "chrome-0")
DEATH = Fault(FaultKind.SUPERVISOR_DEATH)
STEP = Fault(FaultKind.CLOCK_STEP)
GROWTH = Fault(FaultKind.MEMORY_EXHAUSTION, Intensity.MILD, "chrome-0")


@pytest.fixture
def pool(tmp_path):
    return FakePool(tmp_path)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("_ENDED_POLL_SECONDS", "_TERM_POLL_SECONDS", "_GROWN_SECONDS"):
        monkeypatch.setattr(module, name, 0.001)
    monkeypatch.setattr(module, "_ENDED_SECONDS", 5.0)
    monkeypatch.setattr(module, "_SUPERVISOR_AWAY_SECONDS", 0.2)


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def watch_of(pool, tasks=None, on_node_death=lambda: None) -> FaultWatch:
    log = ControlLogReader(pool, SupervisorClock())
    return FaultWatch(pool, log, tasks or BackgroundTasks(), on_node_death)


async def seen_of(watch: FaultWatch, fault: Fault, before: Before | None = None, **more) -> Seen:
    await watch.watch(0, injected(fault, time.time(), **more), before or Before())
    return watch.seen[0]


async def test_a_page_says_whether_it_is_hidden(pool):
    watch = watch_of(pool)
    assert (await seen_of(watch, HIDDEN)).visibility == "hidden"
    pool.visibility = "visible"
    assert (await seen_of(watch, HIDDEN)).visibility == "visible"


async def test_a_dead_supervisor_has_a_successor(pool, monkeypatch):
    monkeypatch.setattr(module, "_SUPERVISOR_AWAY_SECONDS", 30.0)
    pool.control_state = state_of(record(), term=4)
    watch = watch_of(pool)
    before = await watch.before(Due(1.0, DEATH))
    assert before == Before(term=4)
    watching = asyncio.create_task(seen_of(watch, DEATH, before))
    await asyncio.sleep(0.05)
    assert not watching.done()
    pool.control_state = state_of(record(), term=5)
    seen = await watching
    assert (seen.term_before, seen.term_after) == (4, 5)


async def test_a_supervisor_that_stays_away_is_not_waited_for_for_ever(pool):
    pool.control_state = state_of(record(), term=4)
    assert await seen_of(watch_of(pool), DEATH, Before(term=4)) == Seen()
    pool.away = 1
    assert await seen_of(watch_of(pool), DEATH, Before(term=3)) == Seen()


async def test_a_browser_is_weighed_before_and_after(pool):
    pool.memory_bytes = {"chrome-0": 100}
    watch = watch_of(pool)
    before = await watch.before(Due(1.0, GROWTH))
    pool.memory_bytes = {"chrome-0": 170}
    assert (await seen_of(watch, GROWTH, before)).grown_bytes == 70


async def test_a_clock_is_read_before_and_after(pool, monkeypatch):
    monkeypatch.setattr(module, "_SUPERVISOR_AWAY_SECONDS", 30.0)
    watch = watch_of(pool)
    pool.ahead = 50.0
    before = await watch.before(Due(1.0, STEP))
    pool.ahead = 110.0
    seen = await seen_of(watch, STEP, before)
    assert seen.skew_seconds == pytest.approx(60.0, abs=10.0)


async def test_other_faults_need_no_look_before(pool):
    pool.away = 1
    assert await watch_of(pool).before(Due(1.0, HIDDEN)) == Before()


async def test_processes_are_waited_for_until_they_have_ended(pool, child):
    crash = Fault(FaultKind.TAB_CRASH, Intensity.SEVERE, "chrome-0")
    watching = asyncio.create_task(seen_of(watch_of(pool), crash, pids=(child.pid,)))
    await asyncio.sleep(0.05)
    assert not watching.done()
    child.kill()
    assert (await watching).processes == {child.pid: GONE}


async def test_a_full_disk_is_given_something_to_write(pool, tmp_path):
    await seen_of(watch_of(pool), Fault(FaultKind.FULL_DISK))
    assert (tmp_path / "00000001.jsonl").read_bytes().count(b"\n") == 1


async def test_another_node_may_be_started_after_one_died(pool):
    told = []
    watch = watch_of(pool, on_node_death=lambda: told.append(len(watch.seen)))
    await seen_of(watch, Fault(FaultKind.NODE_DEATH, Intensity.SEVERE, "chrome-0"))
    assert told == [1], "after it was seen"
    await seen_of(watch, HIDDEN)
    assert told == [1]


async def test_it_is_seen_beside_the_operations(pool):
    tasks = BackgroundTasks()
    watch = watch_of(pool, tasks)
    watch.start(7, injected(HIDDEN, time.time()), Before())
    assert watch.seen == {}
    assert await tasks.finish() == []
    assert list(watch.seen) == [7]
