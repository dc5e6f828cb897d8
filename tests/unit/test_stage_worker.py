"""One stage of a sequence: its steps, what is kept of them, and where it is."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from recovery.errors import SequenceLost
from recovery.kinds import Level
from sharding.sequences.copies import StageStatus
from sharding.sequences.history import RecordedStep
from sharding.sequences.hosts import StagePlacement, StepReply
from sharding.sequences.stage_worker import StageWorker
from tests.stage_hosts import STAGE, A, B, PaperHosts, answer, context_of, fails


def taken(position: int, tokens: int = 1) -> RecordedStep:
    return RecordedStep(position, tokens, {"hidden": np.full((1, tokens, 2), position, np.float32)})


def worker_on(hosts: PaperHosts, level=Level.MEDIUM, choice=None, **options):
    context = context_of(hosts, level, **options)
    return StageWorker(context, choice, Counter(), None), context.events.statistics


async def test_steps_are_ordered_with_fence_position_and_choice():
    hosts = PaperHosts(A)
    worker, statistics = worker_on(hosts, Level.HIGH, choice=3)
    await worker.take(taken(0, 4))
    await worker.take(taken(4))
    orders = [order for _, order, _ in hosts.orders]
    assert [(o.sequence, o.fence, o.position, o.tokens) for o in orders] == [
        ("s", 1, 0, 4),
        ("s", 1, 4, 1),
    ]
    assert all((order.choice, order.deltas) == (3, True) for order in orders)
    assert statistics.in_page_ms == 2
    assert statistics.copied_bytes
    assert hosts.timed == [STAGE.model] * 2


async def test_lost_stage_is_built_elsewhere_and_goes_on():
    hosts = PaperHosts(A, B)
    worker, statistics = worker_on(hosts)
    await worker.take(taken(0, 4))
    hosts.replies[A].append(fails("browser_exited"))
    await worker.take(taken(4))
    assert hosts.asked("step") == [(A, 1, 0), (A, 1, 4), (B, 2, 0), (B, 2, 4)]
    assert [step.what for step in statistics.events] == ["failed", "replayed"]
    assert worker.at == B
    assert worker.status() == StageStatus((B,), 5, False)


async def test_place_is_for_a_chain_and_moves_with_it():
    hosts = PaperHosts(A)
    worker, statistics = worker_on(hosts, choice=2)
    assert worker.place(0) is None
    await worker.take(taken(0, 4))
    assert worker.place(4) == StagePlacement(STAGE, A, 1, 2, False)
    worker.absorb(taken(4), {})
    worker.moved(5)
    assert worker.place(4) is None
    assert worker.place(5) is not None
    assert statistics.history_bytes == 5 * 8


async def test_busy_browser_is_asked_again_in_turn():
    hosts = PaperHosts(A)
    hosts.replies[A].append(StepReply(busy=True))
    worker, _ = worker_on(hosts)
    assert (await worker.take(taken(0)))["sent"].tolist() == [[[1, 1]]]
    assert hosts.asked("step") == [(A, 1, 0)] * 2


async def test_inputs_beyond_the_limit_end_the_sequence_before_anybody_is_asked():
    hosts = PaperHosts(A)
    worker, _ = worker_on(hosts, history_bytes_max=8)
    with pytest.raises(SequenceLost, match="inputs kept"):
        await worker.take(taken(0, 4))
    assert hosts.orders == []


async def test_end_tells_every_browser_to_forget():
    hosts = PaperHosts(A, B)
    worker, _ = worker_on(hosts)
    await worker.take(taken(0))
    worker.end()
    await asyncio.sleep(0.01)
    assert hosts.asked("forget") == [(A, 1, 0)]
    assert worker.status() == StageStatus((), 0, True)


async def test_replicas_are_asked_in_the_same_form():
    hosts = PaperHosts(A, B)
    worker, _ = worker_on(hosts, Level.CRITICAL)
    got = await worker.take(taken(0))
    assert got.keys() == answer(hosts.orders[0][1]).keys()
    assert {ref for ref, order, _ in hosts.orders if order.deltas} == {A, B}
