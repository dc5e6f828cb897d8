"""The attentions of a graph, by which its layers are counted, and the caches that they use.

A layer holds one: the one that uses a cache in a decoder, any in an encoder. This module must not
know where a model is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

from sharding.cutting.graph import Graph, Node
from sharding.cutting.liveness import Live
from sharding.models.signature import TensorSpec

# Fused attention: (input, output) of each cache tensor.
_FUSED_CACHES = {
    "GroupQueryAttention": ((3, 1), (4, 2)),
    "MultiHeadAttention": ((6, 1), (7, 2)),
    "DecoderMaskedMultiHeadAttention": ((5, 1), (6, 2)),
    "Attention": ((4, 1), (5, 2)),  # ai.onnx since opset 23, and its contrib namesake: (4, 1)
}
_FUSED_ATTENTION = frozenset(
    {*_FUSED_CACHES, "QAttention", "PackedAttention", "PackedMultiHeadAttention", "SparseAttention"}
)
# Operators that a cache may pass on its way into an attention and out of it.
_CACHE_STEPS = frozenset(
    {"Cast", "Concat", "Expand", "Gather", "Identity", "Pad", "Reshape", "ScatterElements"}
    | {"ScatterND", "Slice", "Split", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"}
    | {"DequantizeLinear", "QuantizeLinear"}
)
_CACHE_STEPS_MAX = 12
_PRODUCTS = frozenset({"MatMul", "MatMulInteger", "QLinearMatMul", "Einsum", "FusedMatMul", "Gemm"})
_PRODUCTS |= {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
_SOFTMAX_STEPS_MAX = 8  # from a softmax to the product with the values


def find_caches(graph: Graph) -> Iterator[tuple[Node, str, str]]:
    """Each cache: the node at which it meets the layer, its past input, its present output.

    A cache is an input that comes out again, longer: through a fused attention, or through
    steps that compute nothing.
    """
    for spec in graph.inputs.values():
        if spec.rank is not None and spec.rank < 3:
            continue
        if spec.name not in graph.consumers:
            continue
        if found := _follow_cache(graph, spec.name):
            yield found[0], spec.name, found[1]


def _follow_cache(graph: Graph, past: str) -> tuple[Node, str] | None:
    edge: list[tuple[str, Node | None]] = [(past, None)]
    seen = {past}
    for _ in range(_CACHE_STEPS_MAX):
        onward: list[tuple[str, Node | None]] = []
        for name, meeting in edge:
            if name != past and name in graph.outputs:
                return (meeting or graph.producer[name]), name
            for node in graph.consumers.get(name, ()):
                for output in _cache_outputs(node, name):
                    if output and output not in seen:
                        seen.add(output)
                        # It meets the layer where something else comes in.
                        meets = node.op in _FUSED_CACHES or node.op in (
                            "Concat",
                            "ScatterElements",
                            "ScatterND",
                            "TensorScatter",
                        )
                        onward.append((output, meeting or (node if meets else None)))
        edge = onward
    return None


def _cache_outputs(node: Node, name: str) -> Iterable[str]:
    pairs = _FUSED_CACHES.get(node.op)
    if pairs is not None:
        return [
            node.outputs[made]
            for taken, made in pairs
            if taken < len(node.inputs) and node.inputs[taken] == name and made < len(node.outputs)
        ]
    if node.op in _CACHE_STEPS and (node.inputs[0] == name or node.op == "Concat"):
        return node.outputs
    return ()


def cache_anchors(
    graph: Graph, live: Live, caches: Sequence[tuple[Node, str, str]]
) -> frozenset[int]:
    alive = {node.index for node in live.nodes}
    for node, past, _ in caches:
        if node.index not in alive:
            raise graph.refuse(
                f"cache {past!r}, which meets nothing live at {node}",
                "caches that each layer adds its own keys or values to",
                "Encoder-decoder models cannot be cut by layer yet.",
            )
    return frozenset(node.index for node, _, _ in caches)


def attention_anchors(graph: Graph, live: Live) -> frozenset[int]:
    found = set()
    for node in live.nodes:
        if node.op in _FUSED_ATTENTION or (node.op == "Softmax" and _reaches_product(live, node)):
            found.add(node.index)
    return frozenset(found)


def _reaches_product(live: Live, softmax: Node) -> bool:
    """Whether its output is multiplied with a live tensor (a classifier's is not)."""
    edge, seen = [softmax], {softmax.index}
    for _ in range(_SOFTMAX_STEPS_MAX):
        onward = []
        for node in edge:
            for name in node.outputs:
                for user in live.consumers.get(name, ()):
                    if user.op in _PRODUCTS and len(live.inputs(user)) > 1:
                        return True
                    if user.index not in seen:
                        seen.add(user.index)
                        onward.append(user)
        edge = onward
    return False


def attention_levels(live: Live, anchors: AbstractSet[int]) -> dict[int, int]:
    """For each live node, how many attentions there are on the way to it, itself included.

    Keys and values of one layer are parallel, so they have the same number.
    """
    level: dict[str, int] = {}
    levels: dict[int, int] = {}
    for node in live.nodes:
        before = max((level.get(name, 0) for name in live.inputs(node)), default=0)
        levels[node.index] = before + (node.index in anchors)
        for name in node.outputs:
            level[name] = levels[node.index]
    return levels


def cache_specs(
    graph: Graph, node: Node, past: TensorSpec, present: TensorSpec
) -> tuple[TensorSpec, TensorSpec]:
    """Both with the size of a head, which the builder leaves open; it is needed to make the first,
    empty cache."""
    if node.op != "GroupQueryAttention" or past.shape is None or isinstance(past.shape[-1], int):
        return past, present
    query = graph.specs.get(node.inputs[0])
    width = query.shape[-1] if query is not None and query.shape else None
    heads = node.ints["num_heads"]
    if not (len(node.inputs) > 1 and node.inputs[1]):  # keys and values lie behind the queries
        heads += 2 * node.ints["kv_num_heads"]
    if not isinstance(width, int) or width % heads or present.shape is None:
        return past, present
    size = (width // heads,)
    return (
        replace(past, shape=past.shape[:-1] + size),
        replace(present, shape=present.shape[:-1] + size),
    )
