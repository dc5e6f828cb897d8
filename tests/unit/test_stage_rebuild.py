"""How a new copy of a stage comes to where the others are: restored, replayed, or not at all."""

import asyncio

import numpy as np
import pytest

from recovery.kinds import Level
from sharding.sequences.barrier import Barrier
from sharding.sequences.caches import DELTA
from sharding.sequences.copies import Copy
from sharding.sequences.history import RecordedStep, StageHistory
from sharding.sequences.hosts import StepReply
from sharding.sequences.rebuild import Rebuild
from tests.stage_hosts import KEYS, NUMERIC, STAGE, A, PaperHosts, context_of, fails


def taken(position: int, tokens: int = 1) -> RecordedStep:
    return RecordedStep(position, tokens, {"hidden": np.full((1, tokens, 2), position, np.float32)})


def memory_of(*steps: RecordedStep, copied: int = 0) -> StageHistory:
    """Of so many of these steps, what they added was copied."""
    memory = StageHistory(STAGE, copies=bool(copied), copy_bytes_max=1 << 20)
    for n, step in enumerate(steps):
        memory.note(step)
        if n < copied:
            memory.copy({DELTA + KEYS.past: np.ones((1, 1, step.tokens, 2), np.float32)})
    return memory


async def rebuilt(hosts: PaperHosts, memory: StageHistory, position: int, together=None):
    context, copy = context_of(hosts, Level.HIGH), Copy(A, NUMERIC, 3)
    reply = await Rebuild(context, memory, together).catch_up(copy, position, 1.0)
    return reply, copy, list(context.events.statistics.events)


async def test_inputs_are_replayed_in_their_original_steps():
    hosts = PaperHosts(A)
    memory = memory_of(taken(0, 4), taken(4), taken(5))
    reply, copy, (told,) = await rebuilt(hosts, memory, 5)
    assert reply is None
    assert hosts.asked("step") == [(A, 3, 0), (A, 3, 4)]
    assert [order.tokens for _, order, _ in hosts.orders] == [4, 1]
    assert copy.position == 5
    assert not copy.built
    assert (told.what, told.outcome) == ("replayed", "0 positions copied, 2 steps replayed")


async def test_copies_are_restored_and_what_is_beyond_them_replayed():
    hosts = PaperHosts(A)
    memory = memory_of(taken(0, 4), taken(4), taken(5), copied=2)
    _, copy, (told,) = await rebuilt(hosts, memory, 6)
    assert hosts.asked("restore") == [(A, 3, 5)]
    (_, _, caches), *_ = hosts.orders
    assert caches["past.k"].shape == (1, 1, 5, 2)
    assert hosts.asked("step") == [(A, 3, 5)]
    assert copy.position == 6
    assert (told.what, told.outcome) == ("restored", "5 positions copied, 1 steps replayed")


async def test_copy_that_was_halfway_goes_on_from_there():
    hosts = PaperHosts(A)
    copy = Copy(A, NUMERIC, 3, position=4)
    rebuild = Rebuild(context_of(hosts), memory_of(taken(0, 4), taken(4)), None)
    await rebuild.catch_up(copy, 5, 1.0)
    assert hosts.asked("step") == [(A, 3, 4)]


@pytest.mark.parametrize(("copied", "fails_at"), [(0, 0), (0, 1), (1, 0), (1, 1)])
async def test_failure_is_handed_back_and_nothing_told(copied, fails_at):
    hosts = PaperHosts(A)
    failed = fails("browser_exited")
    hosts.replies[A].extend([*[StepReply({})] * fails_at, failed])
    memory = memory_of(taken(0, 4), taken(4), copied=copied)
    reply, copy, happened = await rebuilt(hosts, memory, 5)
    assert reply is failed
    assert copy.position == (4 if fails_at else 0)
    assert happened == []


async def test_coordinated_sequences_wait_meanwhile():
    hosts, together, order = PaperHosts(A), Barrier(), []
    take = hosts.take

    async def another() -> None:
        await together.passable()
        order.append("another goes on")

    async def looks(*args):
        waiting.append(asyncio.create_task(another()))
        reply = await take(*args)
        order.append("replayed")
        return reply

    hosts.take, waiting = looks, []
    await rebuilt(hosts, memory_of(taken(0, 4)), 4, together)
    await asyncio.gather(*waiting)
    assert order == ["replayed", "another goes on"]
