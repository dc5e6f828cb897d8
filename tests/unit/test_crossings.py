"""What passes a cut: known by type and shape, and nothing beside it."""

from dataclasses import replace

import pytest

from recovery.errors import NotAModel
from sharding.cutting.crossings import Cut, check_cut, cut_tensors
from sharding.cutting.places import find_place, find_trunk
from sharding.models.signature import TensorSpec
from tests.layer_graphs import anchors_of, graph_of, levels_of, live_of

NAME = "builder-llama"


@pytest.fixture
def place():
    graph, live = graph_of(NAME), live_of(NAME)
    return find_place(graph, live, levels_of(NAME), find_trunk(graph, live), anchors_of(NAME), 1)


def test_tensors_have_the_shape_of_the_embedding_where_the_export_says_none(place):
    graph = graph_of(NAME)
    bare = replace(graph, specs={n: s for n, s in graph.specs.items() if n not in place.names})
    for known in (graph, bare):
        found = cut_tensors(known, live_of(NAME), place.before, place.names)
        assert [spec.name for spec in found] == list(place.names)
        assert {spec.dtype for spec in found} == {"float32"}
        assert {spec.shape for spec in found} == {("batch_size", "sequence_length", 32)}


def test_tensor_of_a_type_that_no_frame_carries_is_refused(place):
    graph = graph_of(NAME)
    odd = {name: TensorSpec(name, "complex64", None) for name in place.names}
    with pytest.raises(NotAModel, match="complex64"):
        cut_tensors(replace(graph, specs={**graph.specs, **odd}), live_of(NAME), place.before, odd)


def test_what_else_gets_past_a_cut_is_named(place):
    graph, live = graph_of(NAME), live_of(NAME)
    owner = {node.index: int(node.index in place.later) for node in live.nodes}
    tensors = cut_tensors(graph, live, place.before, place.names)
    check_cut(graph, live, owner, Cut(str(place.before), tensors), 1)
    with pytest.raises(NotAModel, match=tensors[0].name):
        check_cut(graph, live, owner, Cut(str(place.before), tensors[1:]), 1)
