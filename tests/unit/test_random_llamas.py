"""Llamas of many small shapes, cut anywhere, killed anywhere: always the uncut model's bits."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.kinds import Level
from sharding.cutting.cut import cut
from sharding.sequences.stages import pipeline_of_manifest, stage_specs
from tests.native_hosts import NativeHosts
from tests.unit.test_pipeline import generate, reference, same

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from make_random_llama import Sizes, make

NEW = 4


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Sizes, list[tuple[int, int]]]:
    """Sizes, and spans of layers that follow one another."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([16, 32]))  # the kernel takes multiples of 16
    layers = draw(st.integers(1, 4))
    sizes = Sizes(
        layers=layers,
        hidden=heads * head,
        ffn=draw(st.sampled_from([24, 40, 72])),
        heads=heads,
        kv_heads=kv_heads,
        vocabulary=draw(st.sampled_from([33, 50])),
        positions=64,
        tied=draw(st.booleans()),
    )
    ends = [*sorted(draw(st.sets(st.integers(1, layers - 1)))), layers] if layers > 1 else [1]
    return sizes, list(zip([0, *ends], ends, strict=False))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shapes(),
    st.lists(st.integers(1, 32), min_size=1, max_size=7),
    st.sampled_from([Level.MEDIUM, Level.HIGH]),
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(1, 6),
            st.sampled_from(["dies", "dies after", "lost before", "lost after"]),
        ),
        max_size=3,
    ),
    st.booleans(),
    st.integers(0, 5),
)
def test_any_llama_cut_anywhere_and_struck_anywhere(
    tmp_path_factory, shape, prompt, level, faults, chained, seed
):
    sizes, spans = shape
    folder = tmp_path_factory.mktemp("random")
    path = folder / "model.onnx"
    make(path, sizes, seed)
    manifest = cut(path, spans, folder / "cut")
    pipeline = pipeline_of_manifest("m", manifest)
    hosts = NativeHosts(pipeline, stage_specs("m", folder / "cut", manifest))
    hosts.chains = chained
    for name, when, fault in faults:
        hosts.script(name, when, fault)
    same(asyncio.run(_generate(pipeline, hosts, level, prompt)), reference(path, prompt, NEW))
    assert not hosts.charged


async def _generate(pipeline, hosts, level, prompt):
    from sharding.sequences.decoding import Decoding

    decoding = Decoding(max_new_tokens=NEW, logits=True)
    return await generate(pipeline, hosts, level, decoding, prompt)
