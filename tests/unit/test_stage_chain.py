"""Steps by the chain: laid through the places of all stages, left when it breaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recovery.kinds import Level
from sharding.sequences.caches import DELTA
from sharding.sequences.chain import ChainedSteps
from sharding.sequences.hosts import StagePlacement
from tests.stage_hosts import HIDDEN, KEYS, SENT, STAGE, A, B, PaperHosts, context_of

SECOND = replace(STAGE, model="m@1", receives=(SENT,), sends=())
FIRST = replace(STAGE, receives=(), shared=(HIDDEN,))
INPUTS = {"hidden": np.zeros((1, 1, 2), np.float32)}
ANSWERS = [
    {"sent": np.ones((1, 1, 2), np.float32), DELTA + KEYS.past: np.ones((1, 1, 1, 2), np.float32)},
    {"choice": np.ones(1, np.int32)},
]


class Worker:
    """A stage that stands at `position` in one browser, unless it is `lost`."""

    def __init__(self, stage, ref) -> None:
        self.stage = stage
        self.position, self.fence, self.lost = 0, 1, False
        self.absorbed: list = []
        self._ref = ref

    def place(self, position: int) -> StagePlacement | None:
        if self.lost or position != self.position:
            return None
        return StagePlacement(self.stage, self._ref, self.fence, None, False)

    def absorb(self, step, answer) -> None:
        self.absorbed.append((step.position, sorted(step.tensors), sorted(answer)))

    def moved(self, position: int) -> None:
        self.position = position


class PaperChain:
    trouble = ("no way", None)

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.left, self.limits = broken, 0, []

    async def step(self, position, tokens, tensors, seconds):
        self.limits.append(seconds)
        return None if self.broken else (ANSWERS, 3.0)

    def leave(self) -> None:
        self.left += 1


async def made(level=Level.MEDIUM, chains=(), stages=2):
    hosts = PaperHosts(A, B)
    hosts.chains = list(chains)
    context = context_of(hosts, level)
    workers = [Worker(FIRST, A), Worker(SECOND, B)][:stages]
    steps = ChainedSteps("s", "m", hosts, context.rules, context.events, workers)
    return steps, hosts, workers, context.events.statistics


async def test_step_goes_by_the_chain_and_every_stage_has_moved():
    steps, hosts, workers, statistics = await made(chains=[PaperChain()])
    assert await steps.take(INPUTS, 0, 1) is ANSWERS[-1]
    assert [worker.position for worker in workers] == [1, 1]
    assert workers[0].absorbed == [(0, ["hidden"], sorted(ANSWERS[0]))]
    assert workers[1].absorbed == [(0, ["sent"], ["choice"])]
    assert statistics.in_page_ms == 3
    assert hosts.timed == ["chain of m"]


async def test_chain_is_laid_once_and_anew_only_when_a_stage_is_elsewhere():
    first, second = PaperChain(), PaperChain()
    steps, hosts, workers, _ = await made(chains=[first, second])
    for position in (0, 1):
        await steps.take(INPUTS, position, 1)
    assert len(hosts.laid) == 1
    assert first.left == 0
    workers[0].fence = 2
    await steps.take(INPUTS, 2, 1)
    assert len(hosts.laid) == 2
    assert first.left == 1


@pytest.mark.parametrize(("level", "keeps"), [(Level.LOW, False), (Level.MEDIUM, True)])
async def test_answers_of_all_stages_are_wanted_where_they_are_kept(level, keeps):
    steps, hosts, workers, _ = await made(level, [PaperChain()])
    await steps.take(INPUTS, 0, 1)
    assert [copies for _, copies in hosts.laid] == [keeps]
    assert bool(workers[0].absorbed) is keeps


@pytest.mark.parametrize(("level", "stages"), [(Level.CRITICAL, 2), (Level.MEDIUM, 1)])
async def test_replicas_and_single_stages_have_no_chain(level, stages):
    steps, hosts, _, _ = await made(level, [PaperChain()], stages)
    assert await steps.take(INPUTS, 0, 1) is None
    assert hosts.laid == []


async def test_chain_is_left_while_a_stage_is_lost():
    chain = PaperChain()
    steps, _, workers, _ = await made(chains=[chain])
    await steps.take(INPUTS, 0, 1)
    workers[1].lost = True
    assert await steps.take(INPUTS, 1, 1) is None
    assert chain.left == 1


async def test_hosts_may_have_no_chain_and_are_not_asked_again():
    steps, hosts, _, _ = await made()
    assert await steps.take(INPUTS, 0, 1) is None
    assert await steps.take(INPUTS, 0, 1) is None
    assert len(hosts.laid) == 1


async def test_step_that_does_not_come_through_is_told_and_after_three_the_chain_given_up():
    chains = [PaperChain(broken=True) for _ in range(4)]
    steps, hosts, workers, statistics = await made(chains=chains)
    for _ in range(5):
        assert await steps.take(INPUTS, 0, 1) is None
    assert len(hosts.laid) == 3
    assert [chain.left for chain in chains] == [1, 1, 1, 0]
    assert [(step.what, step.stage, step.outcome) for step in statistics.events] == 3 * [
        ("interrupted", -1, "no way")
    ]
    assert [worker.position for worker in workers] == [0, 0]


async def test_step_that_comes_through_makes_good_for_earlier_breaks():
    chains = [PaperChain(broken=True), PaperChain(broken=True), PaperChain()]
    steps, _, _, _ = await made(chains=[*chains, PaperChain(broken=True), PaperChain()])
    for _ in range(2):
        await steps.take(INPUTS, 0, 1)
    assert await steps.take(INPUTS, 0, 1) is not None
    chains[-1].broken = True
    assert await steps.take(INPUTS, 1, 1) is None
    assert await steps.take(INPUTS, 1, 1) is None
    assert await steps.take(INPUTS, 1, 1) is not None, "the count began anew"


async def test_caller_takes_over_after_a_part_of_the_time_or_when_hedging_would():
    chain = PaperChain()
    steps, hosts, _, _ = await made(Level.HIGH, [chain])
    await steps.take(INPUTS, 0, 1)
    hosts.late_seconds = 0.1
    await steps.take(INPUTS, 1, 1)
    assert chain.limits == [0.25, 0.1]
