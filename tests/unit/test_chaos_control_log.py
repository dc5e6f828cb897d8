"""The control log is read from where the last reading ended, and its clock is told."""

from __future__ import annotations

import asyncio
import time

import pytest

from pool.chaos.clock import SupervisorClock
from pool.chaos.control_log import ControlLogReader, noticed_in
from recovery.control import BrowserWanted
from recovery.failures import Category
from recovery.faults import Fault, FaultKind
from recovery.kinds import BrowserType
from tests.chaos import FakePool


@pytest.fixture
def pool(tmp_path):
    return FakePool(tmp_path)


async def test_each_failure_is_read_once(pool):
    reader = ControlLogReader(pool, SupervisorClock())
    pool.log(BrowserWanted("chrome-0", BrowserType.CHROME))
    first = pool.log_failure("chrome-0", 3)
    await reader.read()
    await reader.read()
    (noticed,) = reader.noticed
    assert (noticed.browser_id, noticed.epoch, noticed.seq) == ("chrome-0", 3, first)
    assert (noticed.category, noticed.what) == ("crash", "fact")
    pool.log_failure("firefox-0", category=Category.TIMEOUT)
    await reader.read()
    assert [failure.category for failure in reader.noticed] == ["crash", "timeout"]
    assert reader.last_seq == 3


async def test_lines_that_can_not_be_read_are_passed_over(pool, tmp_path):
    reader = ControlLogReader(pool, SupervisorClock())
    with (tmp_path / "00000001.jsonl").open("ab") as file:
        file.write(b"no event at all\n")
    pool.log_failure()
    await reader.read()
    assert reader.last_seq == 1
    assert len(reader.noticed) == 1


async def test_a_pool_without_a_log_tells_nothing(tmp_path):
    for folder in (None, tmp_path / "missing"):
        pool = FakePool()
        pool.log_folder = folder
        reader = ControlLogReader(pool, SupervisorClock())
        await reader.read()
        assert (list(reader.noticed), reader.last_seq) == ([], 0)


async def test_times_are_told_by_our_clock(pool):
    clock = SupervisorClock()
    clock.note(Fault(FaultKind.CLOCK_STEP))
    reader = ControlLogReader(pool, clock)
    pool.ahead = 86_400.0
    pool.log_failure()
    await reader.read()
    assert reader.noticed[0].at == pytest.approx(time.time(), abs=30.0)


async def test_skew_is_by_an_event_of_now(pool):
    reader = ControlLogReader(pool, SupervisorClock())
    assert await reader.skew() == pytest.approx(0.0, abs=10.0)
    pool.ahead = -86_400.0
    assert await reader.skew() == pytest.approx(-86_400.0, abs=10.0)
    assert reader.last_seq == 2, "something was logged for each"


async def test_without_a_model_nothing_can_be_logged(pool):
    pool.loaded = ()
    reader = ControlLogReader(pool, SupervisorClock())
    await reader.log_an_event()
    await reader.read()
    assert reader.last_seq == 0


def test_only_failures_of_browsers_are_noticed():
    assert noticed_in({"seq": 1, "body": None}) is None
    assert noticed_in({"seq": 1, "body": {"browser_id": "chrome-0"}}) is None
    failure = {"category": "crash", "at": 1.0}
    assert noticed_in({"seq": 1, "body": {"failure": failure}}) is None
    found = noticed_in({"seq": 7, "body": {"failure": failure, "browser_id": "b", "model": "m"}})
    assert found is not None
    assert (found.epoch, found.what, found.model, found.seq) == (-1, "", "m", 7)


async def test_two_reads_at_once_take_no_event_twice(pool):
    reader = ControlLogReader(pool, SupervisorClock())
    pool.log_failure()
    await asyncio.gather(reader.read(), reader.read())
    assert len(reader.noticed) == 1
