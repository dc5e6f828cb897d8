"""The live part of a graph: what depends on the embedding, or another float input.

The rest depends on masks, positions and constants only: every shard recomputes it
(`sharding.cutting.derived`). This module must not know where a model is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sharding.cutting.derived import FLOATS, constant_tensors, table_shape, value_dependent
from sharding.cutting.graph import Graph, Node

_SAME_SHAPE = frozenset(
    {"Cast", "Identity", "Dropout", "DequantizeLinear", "LayerNormalization"}
    | {"SimplifiedLayerNormalization", "RMSNormalization"}
)
_ELEMENTWISE = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})


@dataclass(frozen=True)
class ShapeOf:
    """`output` is the shape of an embedding, or of a sum of several.

    Each of `tables` is (ids, width): looking up the ids gives their shape and a last dimension
    of `width`. A shard without the embedding computes it from the ids, which are an input or
    derived from one; of a sum it is the largest in each dimension.
    """

    output: str
    tables: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Live:
    """`nodes` in order; `seeds` are the live tensors that no live node produces."""

    nodes: tuple[Node, ...]
    tensors: frozenset[str]
    seeds: frozenset[str]
    embeddings: tuple[Node, ...]  # the look-ups among the live nodes
    shapes: Mapping[int, ShapeOf]  # by the index of the Shape node, which does not count as live
    consumers: Mapping[str, tuple[Node, ...]]
    weights: frozenset[str]  # and what is computed from weights alone

    def inputs(self, node: Node) -> tuple[str, ...]:
        return tuple(name for name in node.uses if name in self.tensors)


def find_live(graph: Graph, caches: Sequence[tuple[Node, str, str]]) -> Live:
    """Seeds are the embedding look-ups and embeddings given as inputs (`inputs_embeds`, which have
    three dimensions); without any of them, an image (four). A float mask has four as well.
    """
    past = {name for _, name, _ in caches}
    floats = [
        spec
        for spec in graph.inputs.values()
        if spec.name not in past and spec.dtype in FLOATS and (spec.rank or 3) >= 3
    ]
    embeddings = _embeddings(graph)
    seeds = {spec.name for spec in floats if spec.rank in (3, None)}
    if not seeds and not embeddings:
        seeds = {spec.name for spec in floats}
    if not seeds and not embeddings:
        raise graph.refuse(
            f"inputs {', '.join(map(str, graph.inputs))} and no such look-up",
            "a graph that looks up token ids in a table, or takes embeddings or an image",
            "It can be run whole in one browser.",
        )
    lookups = {node.index for node in embeddings}
    tensors = set(seeds)
    nodes = []
    shapes: dict[int, ShapeOf] = {}
    for node in graph.nodes:
        if node.index in lookups or not tensors.isdisjoint(node.uses):
            if node.op == "Shape":
                if node.inputs[0] in graph.inputs:
                    continue  # any shard can be given the input
                if shape := _embedding_shape(graph, node, lookups):
                    shapes[node.index] = shape
                    continue
            nodes.append(node)
            tensors.update(filter(None, node.outputs))
    live = frozenset(tensors)
    consumers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.uses:
            if name in live:
                consumers.setdefault(name, []).append(node)
    return Live(
        tuple(nodes),
        live,
        frozenset(seeds),
        embeddings,
        shapes,
        {name: tuple(users) for name, users in consumers.items()},
        frozenset(constant_tensors(graph)),
    )


def _embeddings(graph: Graph) -> tuple[Node, ...]:
    """Look-ups of input ids in the widest tables.

    Narrower tables are rotary ones (as wide as half a head), which every shard may have.
    """
    from_values = value_dependent(graph)
    constant = constant_tensors(graph)
    found: list[tuple[int, Node]] = []
    for node in graph.nodes:
        if node.op not in _LOOKUPS or len(node.inputs) < 2 or node.ints.get("axis", 0) != 0:
            continue
        table, ids = node.inputs[:2]
        if table not in constant or ids not in from_values:
            continue
        width, out = _width(graph, node), graph.specs.get(node.outputs[0])
        if width is None or (out is not None and out.rank is not None and out.rank < 3):
            continue
        found.append((width, node))
    widest = max((width for width, _ in found), default=0)
    return tuple(node for width, node in found if width == widest)


def _embedding_shape(graph: Graph, node: Node, lookups: AbstractSet[int]) -> ShapeOf | None:
    """The embeddings whose shape this is, if they were at most added, scaled or cast since."""
    if node.ints.get("start", 0) != 0 or "end" in node.ints:
        return None
    tables: dict[tuple[str, int], int | None] = {}
    stack = [node.inputs[0]]
    while stack:
        maker = graph.producer.get(stack.pop())
        if maker is None:
            return None
        if maker.index in lookups:
            width, ids = _width(graph, maker), graph.specs.get(maker.inputs[1])
            if width is None:
                return None
            tables[maker.inputs[1], width] = ids.rank if ids is not None else None
        elif maker.op in _SAME_SHAPE:
            stack.append(maker.inputs[0])
        elif maker.op in _ELEMENTWISE:
            stack += [name for name in maker.inputs if not _is_scalar(graph, name)]
        else:
            return None
    if len(tables) > 1 and (None in tables.values() or len(set(tables.values())) > 1):
        return None  # they might be aligned at their ends
    return ShapeOf(node.outputs[0], tuple(tables)) if tables else None


def _width(graph: Graph, lookup: Node) -> int | None:
    """The last dimension of what is looked up."""
    out = graph.specs.get(lookup.outputs[0])
    width = out.shape[-1] if out is not None and out.shape else None
    if isinstance(width, int):
        return width
    shape = table_shape(graph, lookup.inputs[0])
    # A packed table is narrower than what comes out of it.
    return shape[1] if len(shape) == 2 and lookup.op == "Gather" else None


def _is_scalar(graph: Graph, name: str) -> bool:
    if name in graph.constants:
        return graph.constants[name].shape in ((), (1,))
    maker = graph.producer.get(name)
    if maker is None:
        return False
    spec = graph.specs.get(name)
    return maker.op in ("Constant", "Cast") and spec is not None and spec.shape in ((), (1,))
