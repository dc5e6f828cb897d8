"""How the bytes of a model's weights are parted."""

import pytest

from sharding.cutting.layers import map_layers
from sharding.cutting.weighing import EMBEDDING, HEAD, SHARED, weigh_parts
from tests.layer_graphs import graph_of, live_of


@pytest.mark.parametrize("name", ["builder-llama", "optimum-llama", "optimum-bert"])
def test_every_weight_that_is_used_is_in_a_part(name):
    graph, layers = graph_of(name), map_layers(graph_of(name))
    sizes = weigh_parts(graph, live_of(name), layers.owner, set(), len(layers))
    used = {name for node in graph.nodes for name in node.uses if name in graph.constants}
    assert set(sizes) == {0, 1, 2, EMBEDDING, HEAD, SHARED}
    assert sum(sizes.values()) == sum(graph.constants[name].bytes for name in used)
    assert sizes[HEAD] == 0, "no node was said to be the head"
    assert max(sizes[0], sizes[1]) < sizes[2], "the head is then of the last layer"


def test_head_is_what_its_nodes_use():
    name = "builder-llama"
    graph, layers = graph_of(name), map_layers(graph_of(name))
    live = live_of(name)
    last = live.nodes[-1]
    sizes = weigh_parts(graph, live, layers.owner, {last.index}, len(layers))
    own = [graph.constants[used].bytes for used in last.uses if used in graph.constants]
    assert sizes[HEAD] == sum(own) > 0
