"""How many bytes of weights each part of a model has: every layer, the embedding, the head.

What several layers use is shared: every shard may need it. This module must not read a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from sharding.cutting.derived import folded_weights
from sharding.cutting.graph import Graph
from sharding.cutting.liveness import Live

EMBEDDING, HEAD, SHARED = "embedding", "head", "shared"


def weigh_parts(
    graph: Graph, live: Live, owner: Mapping[int, int], head: AbstractSet[int], n_layers: int
) -> dict[int | str, int]:
    """Bytes by part: each layer's number, and `EMBEDDING`, `HEAD`, `SHARED`.

    `owner` is the layer of every live node, `head` are the nodes of the head, both by index.
    """
    lookups = {node.index for node in live.embeddings}
    alive = {node.index for node in live.nodes}
    used: dict[int | str, set[str]] = {}
    for node in graph.nodes:
        part: int | str = SHARED
        if node.index in head:
            part = HEAD
        elif node.index in lookups:
            part = EMBEDDING
        elif node.index in alive:
            part = owner[node.index]
        used.setdefault(part, set()).update(n for n in node.uses if n in graph.constants)
    # A weight that is transposed or unpacked first belongs to the node that uses the result.
    folded = folded_weights(graph)
    for node in graph.nodes:
        if node.index in alive:
            part = HEAD if node.index in head else owner[node.index]
            part = EMBEDDING if node.index in lookups else part
            for name in node.uses:
                used.setdefault(part, set()).update(folded.get(name, ()))
    taken = set().union(*(names for part, names in used.items() if part != SHARED))
    used[SHARED] = used.get(SHARED, set()) - taken
    # A weight that several layers use is shared.
    layers_using: dict[str, int] = {}
    for layer in range(n_layers):
        for name in used.get(layer, ()):
            layers_using[name] = layers_using.get(name, 0) + 1
    shared = {name for name, count in layers_using.items() if count > 1}
    used[SHARED] |= shared

    def size(part: int | str) -> int:
        names = used.get(part, set()) - (shared if part != SHARED else set())
        return sum(graph.constants[name].bytes for name in names)

    return {part: size(part) for part in (*range(n_layers), EMBEDDING, HEAD, SHARED)}
