"""Where a model can be cut by layer, found from its computation, not from names.

Nodes that depend only on masks, positions and constants are left out first: every shard recomputes
them. Of the others, the live nodes (`liveness`), those on every path from the embedding to the
result are where the model is narrow (`places`). A layer is the part between two such places and
has one attention (`attentions`). This module must not touch a file (`sharding.cutting.graph`
reads it) and must not cut (`sharding.cutting.cut` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sharding.cutting.attentions import (
    attention_anchors,
    attention_levels,
    cache_anchors,
    cache_specs,
    find_caches,
)
from sharding.cutting.crossings import Cut, check_cut, cut_tensors
from sharding.cutting.graph import Graph, Node, read_graph
from sharding.cutting.liveness import Live, ShapeOf, find_live
from sharding.cutting.manifest import Cache
from sharding.cutting.places import descendants, find_place, find_trunk, joins
from sharding.cutting.weighing import EMBEDDING, HEAD, SHARED, weigh_parts
from sharding.models.signature import TensorSpec


@dataclass(frozen=True)
class Layer:
    """One layer. `weight_bytes` are those of the weights that its live nodes use."""

    index: int
    weight_bytes: int
    caches: tuple[Cache, ...]


@dataclass(frozen=True)
class LayerMap:
    """The layers of a model, first to last, and the cut before each of them but the first.

    `cuts[i]` lies between layers `i` and `i + 1`. The embedding is in the first layer's part
    and the head (the last norm, the logits) in the last one's; their weights are counted apart:
    `embedding_bytes`, `head_bytes`. A tied table counts in both, since both parts carry it if
    they lie in different shards. `shared_bytes` are weights that every shard may need, such as
    rotary tables. `kind` is "decoder" (it has caches) or "encoder".
    """

    path: str
    kind: str
    layers: tuple[Layer, ...]
    cuts: tuple[Cut, ...]
    embedding_bytes: int
    head_bytes: int
    shared_bytes: int
    inputs: tuple[TensorSpec, ...]  # of the uncut model, without the caches
    outputs: tuple[TensorSpec, ...]  # of the uncut model, without the caches
    # For `sharding.cutting.cut`: the layer of every live node by its index in the file, and shapes
    # of the embedding that later layers need.
    owner: Mapping[int, int] = field(repr=False)
    shapes: tuple[ShapeOf, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.layers)


def find_boundaries(path: str | Path) -> LayerMap:
    """The layers of the ONNX model at `path`, a decoder or an encoder. Reads no external data.

    Raises `NotAModel`, saying why and where: no ONNX, nothing that looks like an embedding or
    another float input, no attention, or two layers between which more than `CUT_TENSORS_MAX`
    live tensors pass everywhere.
    """
    return map_layers(read_graph(path))


def map_layers(graph: Graph) -> LayerMap:
    """The same for a graph that was already read."""
    caches = tuple(find_caches(graph))
    live = find_live(graph, caches)
    anchors = cache_anchors(graph, live, caches) if caches else attention_anchors(graph, live)
    if not anchors:
        raise graph.refuse(
            "a graph without any",
            "attention (a softmax before a product, or a fused operator) to count layers by",
            "It can be run whole in one browser.",
        )
    levels = attention_levels(live, anchors)
    n_layers = max(levels.values())
    trunk = find_trunk(graph, live)
    places = [
        find_place(graph, live, levels, trunk, anchors, level) for level in range(1, n_layers)
    ]
    owner = {node.index: sum(node.index in place.later for place in places) for node in live.nodes}
    cuts = [
        Cut(str(place.before), cut_tensors(graph, live, place.before, place.names))
        for place in places
    ]
    for layer, cut in enumerate(cuts, start=1):
        check_cut(graph, live, owner, cut, layer)
    return _layer_map(graph, live, levels, trunk, caches, tuple(cuts), owner)


def _layer_map(
    graph: Graph,
    live: Live,
    levels: Mapping[int, int],
    trunk: Sequence[Node],
    caches: Sequence[tuple[Node, str, str]],
    cuts: tuple[Cut, ...],
    owner: dict[int, int],
) -> LayerMap:
    n_layers = len(cuts) + 1
    # The head begins where another layer would.
    last = [node for node in trunk if levels[node.index] == n_layers]
    joints = [node for node in last if joins(graph, live, trunk, node)]
    head = descendants(live, joints[-1]) if joints else set()
    sizes = weigh_parts(graph, live, owner, head, n_layers)
    kept: dict[int, list[Cache]] = {}
    for node, past, present in caches:
        layer = owner[node.index]
        specs = (graph.inputs[past], graph.outputs[present])
        window = node.ints["local_window_size"] if node.ints.get("sliding_window_cache") else 0
        kept.setdefault(layer, []).append(Cache(layer, *cache_specs(graph, node, *specs), window))
    pasts = {past for _, past, _ in caches}
    presents = {present for _, _, present in caches}
    return LayerMap(
        str(graph.path),
        "decoder" if caches else "encoder",
        tuple(Layer(i, sizes[i], tuple(kept.get(i, ()))) for i in range(n_layers)),
        cuts,
        sizes[EMBEDDING],
        sizes[HEAD],
        sizes[SHARED],
        tuple(spec for spec in graph.inputs.values() if spec.name not in pasts),
        tuple(spec for spec in graph.outputs.values() if spec.name not in presents),
        owner,
        tuple(live.shapes.values()),
    )
