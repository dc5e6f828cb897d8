"""The browsers at work on a stage: chosen, fenced, counted, and told to forget."""

import asyncio
from collections import Counter

from recovery.kinds import Level
from sharding.sequences.copies import Copies, StageStatus
from sharding.sequences.hosts import StepReply
from tests.stage_hosts import A, B, C, PaperHosts, context_of, fails


def copies_on(hosts: PaperHosts, load: Counter | None = None, level=Level.MEDIUM) -> Copies:
    return Copies(context_of(hosts, level), Counter() if load is None else load)


async def test_every_copy_is_elsewhere_and_has_a_higher_fence():
    hosts, load = PaperHosts(A, B), Counter()
    copies = copies_on(hosts, load)
    first, second = copies.new(set()), copies.new(set())
    assert [(copy.ref, copy.fence) for copy in (first, second)] == [(A, 1), (B, 2)]
    assert copies.new(set()) is None
    assert not copies.elsewhere(set())
    assert load == {A: 1, B: 1}
    copies.drop(first, forget=False)
    assert copies.elsewhere(set())
    assert not copies.elsewhere({A})
    again = copies.new(set())
    assert (again.ref, again.fence) == (A, 3)
    assert list(copies) == [second, again]


async def test_stages_of_a_sequence_are_spread():
    copies = copies_on(PaperHosts(A, B), Counter({A: 1}))
    assert copies.new(set()).ref == B
    assert copies_on(PaperHosts(A, B)).new({A}).ref == B


async def test_chain_is_only_for_one_copy_that_stands_there_and_owes_nothing():
    copies = copies_on(PaperHosts(A, B))
    assert copies.only_at(0) is None
    copy = copies.new(set())
    assert copies.only_at(0) is None, "it has not answered yet"
    copy.built, copy.position = True, 4
    assert copies.only_at(4) is copy
    assert copies.only_at(5) is None
    copies.moved(5)
    assert copies.only_at(5) is copy
    copy.lag = 1
    assert copies.only_at(5) is None
    copy.lag = 0
    copies.new(set())
    assert copies.only_at(5) is None


async def test_standing_names_first_who_was_believed():
    copies = copies_on(PaperHosts(A, B, C))
    assert copies.status() == StageStatus()
    first, second = copies.new(set()), copies.new(set())
    second.built, second.position = True, 3
    copies.accept(second)
    assert copies.at == B
    assert copies.status() == StageStatus((B, A), 3, False)
    copies.drop(second, forget=False)
    assert copies.status() == StageStatus((A,), 0, True)
    assert not first.dropped


async def test_dropped_copy_is_told_to_forget_once_and_only_if_it_should():
    hosts, load = PaperHosts(A, B), Counter()
    copies = copies_on(hosts, load)
    first, second = copies.new(set()), copies.new(set())
    for _ in range(2):
        copies.drop(first, forget=True)
    copies.drop(second, forget=False)
    await asyncio.sleep(0.01)
    assert hosts.asked("forget") == [(A, 1, 0)]
    assert first.dropped
    assert second.dropped
    assert load == {A: 0, B: 0}


async def test_forgetting_is_told_until_it_was_heard():
    hosts = PaperHosts(A)
    hosts.replies[A].extend([StepReply(busy=True), fails("socket_closed"), StepReply()])
    copies = copies_on(hosts)
    copies.new(set())
    copies.end()
    await asyncio.sleep(0.5)
    assert len(hosts.asked("forget")) == 3
    assert not hosts.replies[A]
    assert not len(copies)
