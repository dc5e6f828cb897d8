"""The tensors that need no layer: computed from weights alone, or from inputs such as ids.

Every shard can compute these again for itself. This module must not know where a model is cut.
"""

from __future__ import annotations

from sharding.cutting.graph import Graph

FLOATS = frozenset({"float16", "float32", "float64", "bfloat16"})


def table_shape(graph: Graph, name: str) -> tuple[int, ...]:
    """The shape of `name`, which is made of weights; if unknown, that of the largest of them."""
    if name in graph.constants:
        return graph.constants[name].shape
    node = graph.producer[name]
    spec = graph.specs.get(name)
    if spec is not None and spec.shape is not None and None not in spec.shape:
        return tuple(dim for dim in spec.shape if isinstance(dim, int))
    shapes = [table_shape(graph, used) for used in node.uses]
    shape = max(shapes, key=lambda one: (len(one), one), default=())
    return shape[::-1] if node.op == "Transpose" else shape


def constant_tensors(graph: Graph) -> set[str]:
    constant = set(graph.constants)
    for node in graph.nodes:
        if constant.issuperset(node.uses):
            constant.update(node.outputs)
    return constant


def value_dependent(graph: Graph) -> set[str]:
    """Tensors that depend on the elements of an input, not on its shape alone."""
    found = {spec.name for spec in graph.inputs.values() if spec.dtype not in FLOATS}
    for node in graph.nodes:
        if node.op not in ("Shape", "Size") and not found.isdisjoint(node.uses):
            found.update(node.outputs)
    return found


def folded_weights(graph: Graph) -> dict[str, set[str]]:
    """For tensors computed from weights alone: these weights."""
    folded: dict[str, set[str]] = {}
    constant = constant_tensors(graph)
    for node in graph.nodes:
        if node.uses and constant.issuperset(node.uses):
            names = set()
            for name in node.uses:
                names |= {name} if name in graph.constants else folded.get(name, set())
            folded.update(dict.fromkeys(node.outputs, names))
    return folded
