"""What lies on the way from the embedding to the result, and what every shard computes again."""

import pytest

from recovery.errors import NotAModel
from sharding.cutting.graph import read_graph
from sharding.cutting.liveness import find_live
from tests import models
from tests.layer_graphs import graph_of, live_of


@pytest.mark.parametrize("name", ["builder-llama", "optimum-llama", "optimum-gpt2", "optimum-bert"])
def test_way_begins_with_the_look_ups_of_ids_and_ends_in_the_result(name):
    graph, live = graph_of(name), live_of(name)
    assert live.seeds == frozenset()
    assert live.embeddings
    assert all(node.op == "Gather" for node in live.embeddings)
    assert not live.tensors.isdisjoint(graph.outputs)
    assert live.tensors.isdisjoint(graph.inputs)
    assert live.tensors.isdisjoint(live.weights)


def test_export_that_takes_embeddings_is_live_from_them_on():
    assert live_of("builder-llama-embeds").seeds == {"inputs_embeds"}


def test_nodes_are_in_their_order_and_use_what_is_live():
    live = live_of("optimum-llama")
    order = [node.index for node in live.nodes]
    assert order == [node.index for node in graph_of("optimum-llama").nodes if node in live.nodes]
    lookups = {node.index for node in live.embeddings}
    assert all(live.inputs(node) or node.index in lookups for node in live.nodes)
    for name, users in live.consumers.items():
        assert all(name in live.inputs(user) for user in users)


def test_model_without_an_embedding_is_refused(tmp_path):
    with pytest.raises(NotAModel, match="looks up token ids"):
        find_live(read_graph(models.add_model(tmp_path / "add.onnx")), ())
