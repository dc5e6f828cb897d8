"""What is seen of browsers and repairs, and what is waited for."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from pool.chaos import observer as module
from pool.chaos.clock import SupervisorClock
from pool.chaos.control_log import ControlLogReader
from pool.chaos.observer import Observer, is_repaired
from pool.leaks import Traces
from recovery.control import ModelPhase, Phase
from recovery.faults import Fault, FaultKind, Intensity
from tests.chaos import FakePool, injected, record, repair, state_of

CRASH = Fault(FaultKind.TAB_CRASH, Intensity.SEVERE, "chrome-0")
LONG_SECONDS = 7.0  # half of the time that a fault which must be noticed is waited for


@pytest.fixture
def pool(tmp_path):
    return FakePool(tmp_path)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "_SETTLE_POLL_SECONDS", 0.001)
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.02)


def observer(pool: FakePool, clock: SupervisorClock | None = None) -> Observer:
    clock = SupervisorClock() if clock is None else clock
    return Observer(pool, ControlLogReader(pool, clock), clock, Traces())


async def test_browsers_are_known_once_they_were_looked_at(pool):
    seen = observer(pool)
    assert (dict(seen.products), seen.engine_of("chrome-0")) == ({}, "")
    pool.control_state = state_of(record(), record("firefox-0", facts=None))
    await seen.look()
    assert seen.products == {"chrome-0": "Fake 1"}
    assert (seen.engine_of("firefox-0"), seen.engine_of("edge-0")) == ("firefox", "")


async def test_repairs_are_taken_once_by_our_clock(pool):
    clock = SupervisorClock(lambda: 1000.0)
    clock.note(Fault(FaultKind.CLOCK_STEP, Intensity.MILD))  # a minute ahead
    done = repair(began=1058.0, ready=1059.5)
    pool.control_state = state_of(record(), repairs=(done, repair(epoch=1, began=999.0)))
    seen = observer(pool, clock)
    await seen.look()
    await seen.until_repaired()
    first, second = seen.repairs
    assert (first.began, first.ready, first.repair) == (998.0, 999.5, done)
    assert (second.began, second.ready) == (999.0, None)


async def test_a_pool_is_repaired_when_it_says_so_and_not_before(pool):
    pool.away = 3  # so often nobody answers
    assert await observer(pool).until_repaired(5.0)
    pool.control_state = state_of(record(phase=Phase.STARTING))
    assert not await observer(pool).until_repaired(0.02)


async def test_waiting_ends_when_the_fault_was_noticed(pool):
    at = time.time()
    pool.log_failure("chrome-0", 0)
    before = time.monotonic()
    await observer(pool).until_noticed(injected(CRASH, at))
    assert time.monotonic() - before < LONG_SECONDS


@pytest.mark.parametrize(
    ("browser_id", "epoch", "later"),
    [("chrome-1", 0, 0.0), ("chrome-0", 1, 0.0), ("chrome-0", 0, 5.0)],
)
async def test_other_failures_are_not_taken_for_it(pool, monkeypatch, browser_id, epoch, later):
    monkeypatch.setattr(module, "_NOTICED_SECONDS", 0.1)
    pool.log_failure(browser_id, epoch)
    before = time.monotonic()
    await observer(pool).until_noticed(injected(CRASH, time.time() + later))
    assert time.monotonic() - before >= 0.1


async def test_what_hurts_nobody_is_not_waited_for(pool):
    hidden = Fault(FaultKind.TAB_HIDDEN, Intensity.SEVERE, "chrome-0")
    before = time.monotonic()
    await observer(pool).until_noticed(injected(hidden, time.time()))
    assert time.monotonic() - before < LONG_SECONDS


async def test_what_may_go_by_unnoticed_is_waited_for_shortly(pool):
    quiet = Fault(FaultKind.GPU_PROCESS_CRASH, Intensity.SEVERE, "chrome-0")
    before = time.monotonic()
    await observer(pool).until_noticed(injected(quiet, time.time()))
    assert 0.02 <= time.monotonic() - before < LONG_SECONDS


async def test_a_full_disk_is_waited_for_until_it_has_room_again(pool):
    full = injected(Fault(FaultKind.FULL_DISK), until=time.time() + 0.1)
    before = time.monotonic()
    await observer(pool).until_noticed(full)
    assert time.monotonic() - before >= 0.09


def test_a_pool_is_repaired_only_with_every_browser_and_model():
    given_up = record("chrome-1", phase=Phase.GIVEN_UP)
    loading = record(models={"m": ModelPhase.LOADING})
    loaded = record(models={"m": ModelPhase.LOADED, "n": ModelPhase.FAILED})
    assert is_repaired(state_of(loaded))
    assert is_repaired(state_of(record(), replace(given_up, replaced_by="chrome-2")))
    assert not is_repaired(state_of(record(), given_up))
    assert not is_repaired(state_of(loading))
    assert not is_repaired(state_of(record(), record("chrome-1", repair=repair())))
    assert not is_repaired(state_of(record(phase=Phase.STOPPED))), "nobody serves"
    assert not is_repaired(state_of())
    for phase in (Phase.STARTING, Phase.RECONNECTING, Phase.REPLACING):
        assert not is_repaired(state_of(record(), record("chrome-1", phase=phase)))
