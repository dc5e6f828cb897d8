"""The narrow places between two attentions."""

import pytest

from sharding.cutting.places import CUT_TENSORS_MAX, descendants, find_place, find_trunk
from tests.layer_graphs import anchors_of, graph_of, levels_of, live_of

NAMES = ["builder-llama", "optimum-llama", "optimum-gpt2", "optimum-bert"]


@pytest.mark.parametrize("name", NAMES)
def test_trunk_leads_to_the_result_through_all_layers(name):
    graph, live, levels = graph_of(name), live_of(name), levels_of(name)
    trunk = find_trunk(graph, live)
    assert not set(trunk[-1].outputs).isdisjoint(graph.outputs)
    passed = [levels[node.index] for node in trunk]
    assert passed == sorted(passed)
    assert set(passed) >= {1, 2, 3}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [1, 2])
def test_place_parts_the_attentions_before_it_from_those_after(name, level):
    graph, live, levels, anchors = (f(name) for f in (graph_of, live_of, levels_of, anchors_of))
    place = find_place(graph, live, levels, find_trunk(graph, live), anchors, level)
    assert 1 <= len(place.names) <= CUT_TENSORS_MAX
    assert set(place.names) <= live.tensors
    for index in anchors:
        assert (index in place.later) is (levels[index] > level)


def test_descendants_are_all_that_need_a_node():
    live = live_of("builder-llama")
    first, last = live.nodes[0], live.nodes[-1]
    assert descendants(live, last) == {last.index}
    assert last.index in descendants(live, first)
