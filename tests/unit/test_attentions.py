"""Caches and attentions: one of each layer, fused or in many nodes."""

import pytest

from sharding.cutting.attentions import cache_specs, find_caches
from tests.layer_graphs import anchors_of, graph_of, levels_of, live_of

LAYERS = 3


@pytest.mark.parametrize("name", ["builder-llama", "optimum-llama", "optimum-gpt2"])
def test_every_layer_has_two_caches_that_come_out_again(name):
    found = list(find_caches(graph_of(name)))
    assert sorted((past, present) for _, past, present in found) == [
        (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ]


def test_encoder_has_none_and_an_attention_in_each_layer():
    assert list(find_caches(graph_of("optimum-bert"))) == []
    assert len(anchors_of("optimum-bert")) == LAYERS


@pytest.mark.parametrize("name", ["builder-llama", "optimum-llama", "optimum-bert"])
def test_levels_count_the_attentions_on_the_way(name):
    levels = levels_of(name)
    assert set(levels) == {node.index for node in live_of(name).nodes}
    assert set(levels.values()) == set(range(LAYERS + 1))
    assert {levels[index] for index in anchors_of(name)} == set(range(1, LAYERS + 1))


def test_size_of_a_head_is_known_even_where_the_export_leaves_it_open():
    graph = graph_of("builder-llama")
    for node, past, present in find_caches(graph):
        both = cache_specs(graph, node, graph.inputs[past], graph.outputs[present])
        assert [spec.shape[-1] for spec in both] == [16, 16]
