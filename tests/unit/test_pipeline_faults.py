"""Sequences under random faults, and under single ones that are hard to meet by chance."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.errors import SequenceLost
from recovery.kinds import Level
from recovery.records import HostRef
from sharding.cutting.cut import cut
from sharding.sequences.decoding import Decoding
from sharding.sequences.hosts import StepReply
from sharding.sequences.pipeline import Generation
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import pipeline_of_manifest, stage_specs
from tests.native_hosts import NativeHosts
from tests.unit.test_pipeline import DECODERS, NEW, PROMPT, reference

GREEDY = Decoding(max_new_tokens=NEW, logits=True)
SPANS = {2: [(0, 1), (1, 3)], 3: [(0, 1), (1, 2), (2, 3)]}
CACHE_BYTES = 2 * 16 * 4  # keys and values of one position in one layer: 1 head of 16 float32


class Hosts(NativeHosts):
    """Hosts that share the sessions of others, and may be slow, or cut off.

    Orders are taken one after the other, as a page does. `slow`: seconds that one takes there.
    `cut_off`: no order reaches these.
    """

    def __init__(self, like: NativeHosts, count: int = 3) -> None:
        super().__init__(replace(like._line, stages=()), (), count)
        self._line, self._stages = like._line, like._stages
        for ref in self.refs:
            self._begin(ref)
        self.slow: dict[str, float] = defaultdict(float)
        self.cut_off: set[str] = set()
        self._turns: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take(self, ref, model, order, tensors, seconds) -> StepReply:
        name = ref.browser_id
        async with self._turns[name]:
            await asyncio.sleep(self.slow[name])
            if name in self.cut_off:
                return self._fails("socket_closed", ref)
            script, at = self._script[name], self._count[name] + 1
            if order.what == "restore" and script.get(at) == "lies":
                script[at + 1] = script.pop(at)  # its answer holds nothing that could be wrong
            return await super().take(ref, model, order, tensors, seconds)

    def kept(self) -> dict[str, int]:
        """How many sequences are still kept, by host, over all stages."""
        counts = {str(ref): sum(map(len, by.values())) for ref, by in self.caches.items()}
        return {name: count for name, count in counts.items() if count}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The tiny llama in so many shards: hosts that have them open."""
    path, opened = DECODERS / "builder-llama.onnx", {}
    for count, spans in SPANS.items():
        folder = tmp_path_factory.mktemp(f"cut{count}")
        manifest = cut(path, spans, folder)
        pipeline = pipeline_of_manifest("m", manifest)
        opened[count] = NativeHosts(pipeline, stage_specs("m", folder, manifest), 1)
    return opened


@pytest.fixture(scope="module")
def right():
    return reference(DECODERS / "builder-llama.onnx")


async def generate(hosts: Hosts, level: Level, decoding=GREEDY, *, settle=0.0, **options):
    rules = PipelineRules(level, **{"step_seconds": 2.0, **options})
    generation = Generation("s", hosts._line, hosts, rules, decoding)
    tokens = [token async for token in generation.tokens(PROMPT)]
    await asyncio.sleep(settle)
    return tokens, generation.statistics


def same(tokens, right) -> None:
    assert [token.id for token in tokens] == right[0][: len(tokens)]
    got = np.stack([token.scores for token in tokens])
    assert got.tobytes() == right[1][: len(tokens)].tobytes(), "not bit for bit"


# -- random faults ---------------------------------------------------------------------------------

FAULTS = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.integers(1, 30),
        st.sampled_from(["dies", "dies after", "lost before", "lost after"]),
    ),
    max_size=5,
)
LIE = st.none() | st.tuples(st.sampled_from("abcd"), st.integers(1, 24))


@pytest.mark.parametrize("level", [Level.MEDIUM, Level.HIGH, Level.CRITICAL])
def test_whatever_strikes_no_bit_differs_and_none_is_charged_who_did_not_lie(shards, right, level):
    lies = LIE if level is Level.CRITICAL else st.none()

    @settings(max_examples=60, deadline=None)
    @given(st.sampled_from(sorted(SPANS)), st.booleans(), st.sampled_from([3, 4]), FAULTS, lies)
    def holds(count, chains, browsers, faults, lie):
        hosts = Hosts(shards[count], browsers)
        hosts.chains = chains
        if lie is not None:  # with a lost connection: the test after this one
            faults = [fault for fault in faults if fault[2].startswith("dies")]
        for name, when, fault in faults:
            hosts.script(name, when, fault)
        if lie is not None:
            hosts.script(*lie, "lies")
        tokens, statistics = asyncio.run(generate(hosts, level, failures_max=10, step_seconds=10.0))
        assert len(tokens) == NEW
        same(tokens, right)
        assert {ref.browser_id for ref in hosts.charged} <= {lie[0] if lie else ""}
        assert statistics.steps == NEW

    holds()


@pytest.mark.parametrize("slow", "abc")
def test_slow_host_at_critical_is_not_charged_whatever_strikes(shards, right, slow):
    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from([0.002, 0.01]), FAULTS)
    def holds(seconds, faults):
        hosts = Hosts(shards[2], 4)
        hosts.slow[slow] = seconds
        for name, when, fault in faults:
            hosts.script(name, when, fault)
        tokens, _ = asyncio.run(generate(hosts, Level.CRITICAL, failures_max=10, settle=0.03))
        same(tokens, right)
        assert not hosts.charged

    holds()


async def test_copy_that_waits_to_be_asked_again_does_not_miss_a_step(shards, right):
    hosts = Hosts(shards[3])
    hosts.script("a", 6, "lost before")
    hosts.script("b", 9, "lies")
    tokens, _ = await generate(hosts, Level.CRITICAL, step_seconds=1.0)
    same(tokens, right)


# -- single ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Level.MEDIUM, Level.HIGH])
async def test_browser_that_stays_cut_off_is_left_for_another(shards, right, level):
    hosts = Hosts(shards[2])
    generation = Generation("s", hosts._line, hosts, PipelineRules(level), GREEDY)
    tokens = []
    async for token in generation.tokens(PROMPT):
        tokens.append(token)
        hosts.cut_off = {"a"}
    same(tokens, right)


async def test_restore_whose_reply_was_lost_is_made_good_by_the_only_host(shards, right):
    hosts = Hosts(shards[2], 1)
    hosts.script("a", 5, "dies")
    hosts.script("a", 6, "lost after")
    tokens, _ = await generate(hosts, Level.HIGH, step_seconds=1.0)
    same(tokens, right)


async def test_only_host_is_tried_again_after_a_failure_of_one_operation(shards, right):
    hosts = Hosts(shards[2], 1)
    once = iter([True])
    take = hosts.take

    async def fails_once(ref, model, order, tensors, seconds):
        if order.position == 6 and next(once, False):
            return hosts._fails("run_failed", ref)
        return await take(ref, model, order, tensors, seconds)

    hosts.take = fails_once
    tokens, _ = await generate(hosts, Level.MEDIUM, step_seconds=1.0)
    same(tokens, right)


async def test_standby_that_comes_while_a_step_hangs_takes_it_over(shards, right):
    hosts = Hosts(shards[2], 2)
    hosts.late_seconds = 0.05
    hosts.frozen = {HostRef("b")}
    hosts.script("a", 5, "hangs")

    async def comes() -> None:
        await asyncio.sleep(0.2)
        hosts.frozen = set()
        hosts._changed.set()

    coming = asyncio.create_task(comes())
    tokens, _ = await generate(hosts, Level.HIGH, step_seconds=1.0)
    same(tokens, right)
    await coming


async def test_late_copy_is_not_charged_when_copies_of_the_caches_end(shards, right):
    hosts = Hosts(shards[2])
    hosts.slow["c"] = 0.01
    most = 6 * CACHE_BYTES
    tokens, _ = await generate(hosts, Level.CRITICAL, copy_bytes_max=most, settle=0.2)
    same(tokens, right)
    assert not hosts.charged


async def test_late_liar_is_charged_once(shards, right):
    hosts = Hosts(shards[2], 4)
    for when in range(1, 9):
        hosts.script("c", when, "lies")
    take, gone_on = hosts.take, asyncio.Event()

    async def late(ref, model, order, tensors, seconds):
        if ref == HostRef("c"):
            await gone_on.wait()
        elif order.position == len(PROMPT):
            gone_on.set()
        return await take(ref, model, order, tensors, seconds)

    def exclude_faulty(ref, failure):
        hosts.charged.append(ref)
        hosts.frozen.add(ref)

    hosts.take, hosts.outvoted = late, exclude_faulty
    tokens, statistics = await generate(hosts, Level.CRITICAL, settle=0.1)
    same(tokens, right)
    charges = [(step.stage, step.where) for step in statistics.events if step.what == "outvoted"]
    assert charges
    assert len(charges) == len(set(charges)), "one incarnation, one stage, one charge"


async def test_sequence_that_has_ended_is_not_begun_again_by_a_copy_that_waited(shards):
    hosts = Hosts(shards[2])
    hosts.script("c", 1, "lost before")
    one = Decoding(max_new_tokens=1)
    await generate(hosts, Level.CRITICAL, one, settle=0.2)
    assert hosts.kept() == {}


async def test_late_copy_whose_connection_fails_forgets_the_sequence(shards, right):
    hosts = Hosts(shards[2], 4)
    take, gone_on, lost = hosts.take, asyncio.Event(), []

    async def late(ref, model, order, tensors, seconds):
        reply = await take(ref, model, order, tensors, seconds)
        if order.position == len(PROMPT) + 1:
            gone_on.set()
        if ref == HostRef("c") and model == "m@0" and order.position == len(PROMPT) and not lost:
            lost.append(order)
            await gone_on.wait()
            hosts.frozen.add(ref)  # not to be chosen again while it is away
            return hosts._fails("socket_closed", ref)
        return reply

    hosts.take = late
    tokens, _ = await generate(hosts, Level.CRITICAL, settle=0.3)
    same(tokens, right)
    assert lost
    assert hosts.kept() == {}


async def test_forgetting_is_asked_again_while_the_browser_is_busy(shards):
    hosts = Hosts(shards[2])
    take, refusals = hosts.take, iter([True, True])

    async def busy(ref, model, order, tensors, seconds):
        if order.what == "forget" and next(refusals, False):
            return StepReply(busy=True)
        return await take(ref, model, order, tensors, seconds)

    hosts.take = busy
    await generate(hosts, Level.MEDIUM, settle=0.5)
    assert hosts.kept() == {}


class _NoWay:
    """A chain that nothing ever comes through."""

    trouble = ("no way", None)

    async def step(self, position, tokens, tensors, seconds):
        return None

    def leave(self) -> None:
        pass


async def test_chain_that_never_works_is_given_up(shards, right):
    hosts, laid = Hosts(shards[2]), []

    async def chain(sequence, places, *, copies, seconds):
        laid.append(places)
        return _NoWay()

    hosts.chain = chain
    tokens, statistics = await generate(hosts, Level.MEDIUM, replace(GREEDY, max_new_tokens=20))
    same(tokens[:NEW], right)
    assert len(laid) < 10
    assert len(statistics.events) < 10


async def test_what_is_kept_of_one_step_s_failures_is_bounded(shards):
    hosts = Hosts(shards[2])

    async def nowhere(ref, model, order, tensors, seconds):
        await asyncio.sleep(0)
        return hosts._fails("not_loaded", ref)

    async def change(seconds):  # there is always some news
        await asyncio.sleep(0)

    hosts.take, hosts.change = nowhere, change
    rules = PipelineRules(Level.MEDIUM, step_seconds=0.3)
    generation = Generation("s", hosts._line, hosts, rules, GREEDY)
    with pytest.raises(SequenceLost):
        await anext(generation.tokens(PROMPT))
    assert len(generation.statistics.events) < 100
