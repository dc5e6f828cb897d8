"""A sequence over stages in the native runtime: the same tokens and logits, whatever dies.

The reference is the uncut model in native onnxruntime, run in the same steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recovery.errors import SequenceLost
from recovery.kinds import Level
from sharding.cutting.cut import cut
from sharding.cutting.layers import find_boundaries
from sharding.models.native import NativeSession
from sharding.sequences.barrier import Barrier
from sharding.sequences.decoding import Decoding
from sharding.sequences.pipeline import Generation
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import pipeline_of_manifest, pipeline_of_map, stage_specs
from tests.native_hosts import NativeHosts

DECODERS = Path(__file__).parent.parent / "assets" / "decoders"
PROMPT = [5, 17, 42, 8, 23]
NEW = 6
GREEDY = Decoding(max_new_tokens=NEW, logits=True)


def reference(path: Path, prompt=PROMPT, new: int = NEW) -> tuple[list[int], np.ndarray]:
    """Tokens and logits of the uncut model, step by step."""
    pipeline = pipeline_of_map("whole", find_boundaries(path))
    (stage,) = pipeline.stages
    session = NativeSession(path)
    session.open()
    past = {cache.past: np.zeros(cache.shape, cache.dtype) for cache in stage.caches}
    ids, position, tokens, rows = list(prompt), 0, [], []
    for _ in range(new):
        outputs = session.run({**pipeline.inputs_of_step(ids, position), **past})
        past = {cache.past: outputs[cache.present] for cache in stage.caches}
        position += len(ids)
        rows.append(outputs["logits"][0, -1])
        tokens.append(int(rows[-1].argmax()))
        ids = [tokens[-1]]
    session.close()
    return tokens, np.stack(rows)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The tiny llama of the builder in three shards, and what the uncut one answers."""
    path = DECODERS / "builder-llama.onnx"
    folder = tmp_path_factory.mktemp("cut")
    manifest = cut(path, [(0, 1), (1, 2), (2, 3)], folder)
    return pipeline_of_manifest("m", manifest), stage_specs("m", folder, manifest), reference(path)


def rules(level=Level.MEDIUM, **options) -> PipelineRules:
    return PipelineRules(level, step_seconds=2.0, **options)


@pytest.fixture(params=[False, True], ids=["asked", "chained"])
def chains(request, monkeypatch):
    """Whether steps go from host to host by themselves, or each is asked by the caller."""
    monkeypatch.setattr(NativeHosts, "chains_by_default", request.param)


@pytest.fixture(autouse=True)
def both(chains):
    """Every test holds either way."""


async def generate(pipeline, hosts, level=Level.MEDIUM, decoding=GREEDY, prompt=PROMPT, **options):
    generation = Generation("s", pipeline, hosts, rules(level, **options), decoding)
    tokens = [token async for token in generation.tokens(prompt)]
    rows = [token.scores for token in tokens]
    return [token.id for token in tokens], rows, generation.statistics


def same(got, right) -> None:
    tokens, rows, _ = got
    assert tokens == right[0]
    assert np.stack(rows).tobytes() == right[1].tobytes(), "not bit for bit"


@pytest.mark.parametrize("path", sorted(DECODERS.glob("*.onnx")), ids=lambda path: path.stem)
async def test_every_export_gives_the_uncut_models_logits(path, tmp_path):
    if "bert" in path.stem or path.stem == "builder-llama-embeds":
        pytest.skip("no decoder of token ids")
    manifest = cut(path, [(0, 1), (1, 3)], tmp_path)
    hosts = NativeHosts(pipeline_of_manifest("m", manifest), stage_specs("m", tmp_path, manifest))
    same(await generate(pipeline_of_manifest("m", manifest), hosts), reference(path))


@pytest.mark.parametrize("level", [Level.NONE, Level.MEDIUM, Level.HIGH, Level.CRITICAL])
async def test_without_faults_every_level_gives_the_same(three, level):
    pipeline, specs, right = three
    same(await generate(pipeline, NativeHosts(pipeline, specs), level), right)


@pytest.mark.parametrize("fault", ["dies", "dies after", "lost before", "lost after"])
@pytest.mark.parametrize("level", [Level.MEDIUM, Level.HIGH, Level.CRITICAL])
async def test_a_fault_at_every_order_of_every_host_changes_no_bit(three, level, fault):
    pipeline, specs, right = three
    fine = NativeHosts(pipeline, specs)
    await generate(pipeline, fine, level)
    orders = {ref.browser_id: sum(o[0] == ref for o in fine.orders) for ref in fine.refs}
    for name, count in orders.items():
        for when in range(1, count + 1):
            hosts = NativeHosts(pipeline, specs)
            hosts.script(name, when, fault)
            same(await generate(pipeline, hosts, level), right)
            assert not hosts.charged


@pytest.mark.parametrize("when", range(1, 7))
async def test_two_hosts_die_and_one_again_while_it_is_rebuilt(three, when):
    pipeline, specs, right = three
    for level in (Level.MEDIUM, Level.HIGH):
        hosts = NativeHosts(pipeline, specs, 4)
        for name in "ab":
            hosts.script(name, when, "dies")
            hosts.script(name, when + 1, "dies")
        same(await generate(pipeline, hosts, level), right)


async def test_at_medium_the_lost_stage_replays_its_inputs_in_their_steps(three):
    pipeline, specs, right = three
    hosts = NativeHosts(pipeline, specs)
    hosts.script("a", 3, "dies")
    got = await generate(pipeline, hosts)
    same(got, right)
    (replayed,) = [step for step in got[2].events if step.what == "replayed"]
    # The prompt as one step, then one step a token: a single one for all is not bit-exact.
    assert replayed.outcome == "0 positions copied, 2 steps replayed"
    assert got[2].copied_bytes == 0 < got[2].history_bytes


async def test_at_high_copies_of_the_caches_stand_for_the_inputs(three):
    pipeline, specs, right = three
    hosts = NativeHosts(pipeline, specs)
    hosts.script("a", 3, "dies")
    got = await generate(pipeline, hosts, Level.HIGH)
    same(got, right)
    (restored,) = [step for step in got[2].events if step.what == "restored"]
    assert restored.outcome.endswith(" positions copied, 0 steps replayed")
    assert got[2].history_bytes == 0 < got[2].copied_bytes


async def test_copies_are_bounded_and_the_rest_is_replayed(three):
    pipeline, specs, right = three
    hosts = NativeHosts(pipeline, specs)
    hosts.script("a", 5, "dies")
    one_layer = 2 * 16 * 4  # keys and values of one position: 1 head of 16 float32
    got = await generate(pipeline, hosts, Level.HIGH, copy_bytes_max=6 * one_layer)
    same(got, right)
    (restored,) = [step for step in got[2].events if step.what == "restored"]
    assert restored.outcome == "6 positions copied, 2 steps replayed"
    assert got[2].copied_bytes == 3 * 6 * one_layer


async def test_ring_cache_is_replayed_since_it_can_not_be_copied(tmp_path):
    path = DECODERS / "builder-gemma2.onnx"
    manifest = cut(path, [(0, 3)], tmp_path)
    pipeline = pipeline_of_manifest("m", manifest)
    hosts = NativeHosts(pipeline, stage_specs("m", tmp_path, manifest))
    hosts.script("a", 3, "dies")
    got = await generate(pipeline, hosts, Level.HIGH)
    same(got, reference(path))
    assert got[2].copied_bytes == 0


@pytest.mark.parametrize("fault", ["dies", "dies after"])
@pytest.mark.parametrize("level", [Level.NONE, Level.LOW])
async def test_death_is_not_survived_below_medium_and_the_error_says_so(three, level, fault):
    pipeline, specs, _ = three
    hosts = NativeHosts(pipeline, specs)
    hosts.script("a", 3, fault)
    with pytest.raises(SequenceLost, match=f"level {level} does not recover from this"):
        await generate(pipeline, hosts, level)


async def test_at_low_a_lost_connection_leaves_the_page_its_caches(three):
    pipeline, specs, right = three
    for fault in ("lost before", "lost after"):
        hosts = NativeHosts(pipeline, specs)
        hosts.script("a", 3, fault)
        got = await generate(pipeline, hosts, Level.LOW)
        same(got, right)
        assert [step.what for step in got[2].events] in (["failed"], ["interrupted"])
        assert got[2].history_bytes == 0, "nothing is kept at low"


async def test_at_critical_a_wrong_answer_is_outvoted_and_its_host_charged(three):
    pipeline, specs, right = three
    for when in range(1, 10):
        hosts = NativeHosts(pipeline, specs, 4)
        hosts.script("b", when, "lies")
        got = await generate(pipeline, hosts, Level.CRITICAL)
        same(got, right)
        assert [ref.browser_id for ref in hosts.charged] == ["b"]
        assert "outvoted" in [step.what for step in got[2].events]


async def test_at_critical_two_hosts_are_enough_to_agree_and_one_is_not(three):
    pipeline, specs, right = three
    same(await generate(pipeline, NativeHosts(pipeline, specs, 2), Level.CRITICAL), right)
    with pytest.raises(SequenceLost, match="no answer within 2 s"):
        await generate(pipeline, NativeHosts(pipeline, specs, 1), Level.CRITICAL)
    lone = NativeHosts(pipeline, specs, 1)
    same(await generate(pipeline, lone, Level.CRITICAL, strict=False), right)


async def test_at_high_a_hang_costs_the_hedging_delay_and_no_bit(three):
    pipeline, specs, right = three
    hosts = NativeHosts(pipeline, specs)
    hosts.script("a", 3, "hangs")
    hosts.late_seconds = 0.05
    got = await generate(pipeline, hosts, Level.HIGH)
    same(got, right)
    assert {"hedged", "interrupted"} & {step.what for step in got[2].events}


async def test_host_that_never_comes_back_ends_the_sequence_in_time(three):
    pipeline, specs, _ = three
    hosts = NativeHosts(pipeline, specs, 1)
    hosts.restart = False
    hosts.script("a", 4, "dies")
    with pytest.raises(SequenceLost, match="no answer within 2 s"):
        await generate(pipeline, hosts)


async def test_sequences_are_forgotten_however_they_end(three):
    pipeline, specs, _ = three
    hosts = NativeHosts(pipeline, specs)
    generation = Generation("s", pipeline, hosts, rules(), GREEDY)
    tokens = generation.tokens(PROMPT)
    await anext(tokens)
    assert any(len(c) for caches in hosts.caches.values() for c in caches.values())
    await tokens.aclose()
    for _ in range(5):
        await hosts.change(0.0)
    assert not any(len(c) for caches in hosts.caches.values() for c in caches.values())


async def test_several_sequences_go_on_side_by_side(three):
    import asyncio

    pipeline, specs, right = three
    hosts = NativeHosts(pipeline, specs)
    hosts.script("b", 5, "dies")
    together = Barrier()

    async def one(name: str) -> list[int]:
        generation = Generation(name, pipeline, hosts, rules(), GREEDY, barrier=together)
        return [token.id async for token in generation.tokens(PROMPT)]

    assert await asyncio.gather(*map(one, "xyz")) == [right[0]] * 3


async def test_generation_stops_with_a_stop_token(three):
    pipeline, specs, right = three
    stop = right[0][2]
    decoding = Decoding(max_new_tokens=NEW, stop=frozenset({stop}))
    tokens, _, _ = await generate(pipeline, NativeHosts(pipeline, specs), decoding=decoding)
    assert tokens == right[0][: right[0].index(stop) + 1]


async def test_sampling_is_the_same_whatever_dies(three):
    pipeline, specs, _ = three
    decoding = Decoding(max_new_tokens=NEW, temperature=1.5, top_k=20, top_p=0.9, seed=7)
    fine, _, _ = await generate(pipeline, NativeHosts(pipeline, specs), decoding=decoding)
    hosts = NativeHosts(pipeline, specs)
    hosts.script("a", 4, "dies")
    again, _, _ = await generate(pipeline, hosts, decoding=decoding)
    assert fine == again
    other = Decoding(max_new_tokens=NEW, temperature=1.5, top_k=20, top_p=0.9, seed=8)
    assert (await generate(pipeline, NativeHosts(pipeline, specs), decoding=other))[0] != fine
    # A caller that died resumes with prompt, delivered tokens and seed.
    resumed, _, _ = await generate(
        pipeline, NativeHosts(pipeline, specs), decoding=decoding, prompt=PROMPT + fine[:3]
    )
    assert resumed[: NEW - 3] == fine[3:]
