"""A sample tells who holds how much, and launches that are met are remembered."""

from __future__ import annotations

import os

from actors.messages import LaunchReport
from pool.chaos.memory import MemorySampler
from tests.chaos import FakePool
from tests.fakes import FACTS


class SeenTraces:
    def __init__(self) -> None:
        self.noted: list[LaunchReport] = []

    def note(self, reports) -> None:
        self.noted += reports


def launch(**pids: int) -> LaunchReport:
    return LaunchReport(FACTS, 0, {}, pids, "profile")


async def test_a_sample_is_of_all_who_hold_memory():
    pool, traces, seconds = FakePool(), SeenTraces(), iter((1.5, 2.5))
    here = os.getpid()
    pool.pids = {"supervisor": here, "history": here}
    pool.launches = {"chrome-0": launch(worker=here), "chrome-1": launch(browser=here)}
    pool.memory_bytes = {"chrome-0": 3, "chrome-1": 4}
    sampler = MemorySampler(pool, traces, lambda: next(seconds))
    await sampler.take(0)
    await sampler.take(20)
    assert [(sample.operations, sample.at) for sample in sampler.samples] == [(0, 1.5), (20, 2.5)]
    sample = sampler.samples[0]
    assert set(sample.control) == {"client", "supervisor", "history"}
    assert sample.workers > 1 << 20
    assert all(held > 1 << 20 for held in sample.control.values())
    assert sample.browsers == 7
    assert traces.noted == 2 * list(pool.launches.values())


async def test_a_pool_that_does_not_answer_leaves_the_client():
    pool = FakePool()
    pool.away = 1
    sampler = MemorySampler(pool, SeenTraces(), lambda: 0.0)
    await sampler.take(5)
    (sample,) = sampler.samples
    assert set(sample.control) == {"client"}
    assert (sample.workers, sample.browsers) == (0, 0)
