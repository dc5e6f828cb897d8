"""The narrow places of a graph: where to cut between two attentions.

Those on every path from the embedding to the result. This module must not know the specs of the
tensors there (`sharding.cutting.crossings` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sharding.cutting.derived import table_shape
from sharding.cutting.graph import Graph, Node
from sharding.cutting.liveness import Live

CUT_TENSORS_MAX = 2  # live tensors that may cross a cut: the residual sum, and what is added to it


def find_trunk(graph: Graph, live: Live) -> tuple[Node, ...]:
    """The nodes that every path from the seeds to the result passes, first to last.

    A node is on all paths if the paths to it times the paths from it equal all paths.
    The result is the output that the most nodes lead to.
    """
    depth: dict[str, int] = {}
    to_node: dict[int, int] = {}
    to_tensor: dict[str, int] = dict.fromkeys(live.seeds, 1)
    lookups = {node.index for node in live.embeddings}
    for node in live.nodes:
        inputs = live.inputs(node)
        depth.update(
            dict.fromkeys(node.outputs, 1 + max((depth.get(name, 0) for name in inputs), default=0))
        )
        paths = sum(to_tensor.get(name, 0) for name in inputs) + (node.index in lookups)
        to_node[node.index] = paths
        to_tensor.update(dict.fromkeys(node.outputs, paths))
    results = [name for name in graph.outputs if name in live.tensors]
    if not results:
        raise graph.refuse(
            "outputs that do not depend on it",
            "a result that depends on the embedding",
            "It can be run whole in one browser.",
        )
    result = max(results, key=lambda name: depth.get(name, 0))
    from_tensor: dict[str, int] = {result: 1}
    from_node: dict[int, int] = {}
    for node in reversed(live.nodes):
        paths = sum(from_tensor.get(name, 0) for name in node.outputs)
        from_node[node.index] = paths
        for name in live.inputs(node):
            from_tensor[name] = from_tensor.get(name, 0) + paths
    total = to_tensor[result]
    return tuple(
        node for node in live.nodes if to_node[node.index] * from_node[node.index] == total
    )


@dataclass(frozen=True)
class CutPlace:
    """Before node `before`, where `names` are live; `later` are the nodes after it, by index."""

    before: Node
    names: tuple[str, ...]
    later: frozenset[int]


def find_place(
    graph: Graph,
    live: Live,
    levels: Mapping[int, int],
    trunk: Sequence[Node],
    anchors: AbstractSet[int],
    level: int,
) -> CutPlace:
    """Where to cut between the attention number `level` and the next one.

    That is before the last node on the trunk at which two live tensors become one: the residual
    sum with what is added to it. So a norm after the sum stays with it, in the later shard, and
    the runtime can fuse the two as it does in the uncut model. Without one, before the
    last node with one input. Without a trunk (a tensor bypasses all layers), at the last place in
    the order of the nodes where no more than two tensors are live.
    """
    candidates = [node for node in trunk if levels[node.index] == level]
    joints = [node for node in candidates if joins(graph, live, trunk, node)]
    singles = [node for node in candidates if len(live.inputs(node)) == 1]
    if joint := next(iter((joints or singles)[::-1]), None):
        names = tuple(_before_bias(graph, live, name) for name in live.inputs(joint))
        biases = {graph.producer[name].index for name in set(live.inputs(joint)) - set(names)}
        return CutPlace(joint, names, frozenset(descendants(live, joint) | biases))
    return _narrowest(graph, live, levels, anchors, level)


def joins(graph: Graph, live: Live, trunk: Sequence[Node], joint: Node) -> bool:
    """Whether two paths join at `joint`, one through a matrix (not so in a norm)."""
    if len(live.inputs(joint)) != CUT_TENSORS_MAX:
        return False
    on_trunk = {node.index for node in trunk}
    stack = list(live.inputs(joint))
    seen = set(stack)
    while stack:
        node = graph.producer.get(stack.pop())
        if node is None or node.index in on_trunk:
            continue
        if any(len(table_shape(graph, name)) > 1 for name in node.uses if name in live.weights):
            return True
        fresh = [name for name in live.inputs(node) if name not in seen]
        seen.update(fresh)
        stack += fresh
    return False


def _narrowest(
    graph: Graph,
    live: Live,
    levels: Mapping[int, int],
    anchors: AbstractSet[int],
    level: int,
) -> CutPlace:
    """The last place between the two attentions where the fewest tensors are live."""
    last_use: dict[str, int] = {}
    for place, node in enumerate(live.nodes):
        last_use.update(dict.fromkeys(live.inputs(node), place))
    attentions = {
        place: levels[node.index] for place, node in enumerate(live.nodes) if node.index in anchors
    }
    start = max(place for place, its in attentions.items() if its <= level)
    end = min(place for place, its in attentions.items() if its > level)
    alive = [*live.seeds]
    best: tuple[int, list[str]] | None = None
    for place, node in enumerate(live.nodes[:end]):
        alive = [name for name in (*alive, *node.outputs) if last_use.get(name, -1) > place]
        if place >= start and (best is None or len(alive) <= len(best[1])):
            best = place + 1, alive
    if best is not None and len(best[1]) <= CUT_TENSORS_MAX:
        place, names = best
        later = frozenset(node.index for node in live.nodes[place:])
        return CutPlace(live.nodes[place], tuple(names), later)
    found = f"{len(best[1])} ({', '.join(best[1])})" if best else "mixed layers"
    raise graph.refuse(
        f"{found} at the narrowest place between layers {level - 1} and {level}",
        f"at most {CUT_TENSORS_MAX} live tensors there",
        "It can be run whole in one browser.",
    )


def descendants(live: Live, start: Node) -> set[int]:
    """The nodes that need `start`, and itself, by index."""
    found = {start.index}
    made = set(start.outputs)
    for node in live.nodes:
        if node.index not in found and not made.isdisjoint(node.uses):
            found.add(node.index)
            made.update(node.outputs)
    return found


def _before_bias(graph: Graph, live: Live, name: str) -> str:
    """`name`, or what it was before a bias was added to a product.

    The runtime fuses such a bias into the norm that follows; that of a quantized product it
    fuses into the product.
    """
    node = graph.producer.get(name)
    if node is None or node.op != "Add" or len(live.consumers.get(name, ())) > 1:
        return name
    inputs = live.inputs(node)
    others = [other for other in node.inputs if other not in inputs]
    if len(inputs) != 1 or len(others) != 1 or name in graph.outputs:
        return name
    product = graph.producer.get(inputs[0])
    is_bias = others[0] in live.weights and len(table_shape(graph, others[0])) == 1
    return inputs[0] if is_bias and product is not None and product.op == "MatMul" else name
